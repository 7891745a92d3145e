"""On what a measurement was made: hardware, versions, threads, allocator. Also: fixed allocator settings.

Measured times without these are worth nothing, so every result carries them and every file is named by them.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import llava

RESULTS = Path(__file__).resolve().parent / "results"
# Freed memory stays with the process instead of going back to the system and being faulted in again page by page, which
# on large score matrices takes longer than computing them.
FIXED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
# What `environment` tells, and with it the columns that every line of a saved result repeats.
ENVIRONMENT = (
    "hardware", "device", "cores", "threads", "load_average", "system", "python", "torch", "cuda", "transformers",
    "llava", "allocator", "variables",
)  # fmt: skip
_ALLOCATOR = (*FIXED_ALLOCATOR, "MALLOC_ARENA_MAX", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")


def use_fixed_allocator(module: str, arguments: list[str]) -> None:
    """Starts this process again with `FIXED_ALLOCATOR`, which glibc reads only at the start; no-op if it is set."""
    if platform.system() != "Linux" or all(os.environ.get(k) == v for k, v in FIXED_ALLOCATOR.items()):
        return
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, **FIXED_ALLOCATOR})


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.processor() or 'Apple'} GPU"
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that a figure depends on beside its own arguments; plain values."""
    shown = {name: os.environ[name] for name in (*_ALLOCATOR, *_THREADS) if name in os.environ}
    fixed = all(os.environ.get(name) == value for name, value in FIXED_ALLOCATOR.items())
    return {
        "hardware": hardware_name(device),
        "device": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "llava": llava.__version__,
        "allocator": "fixed" if fixed else "default",
        "variables": shown,
    }


def describe(env: Mapping[str, Any]) -> str:
    """One paragraph for people."""
    variables = ", ".join(f"{name}={value}" for name, value in env["variables"].items()) or "none set"
    threads = f"{env['threads']} thread" + ("" if str(env["threads"]) == "1" else "s")
    return (
        f"{env['hardware']}, {threads} on {env['cores']} cores, load average {env['load_average']} at "
        f"the end; torch {env['torch']}, transformers {env['transformers']}, python {env['python']}; allocator "
        f"{env['allocator']} ({variables})"
    )


def slug(text: str) -> str:
    """Text as part of a file name."""
    text = re.sub(r"\((R|TM|C)\)|\bCPU\b|@.*$|\bProcessor\b", " ", text)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower()


def result_path(tool: str, label: str, env: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """CSV named by tool, what was measured, hardware, threads, allocator and versions."""
    where = slug(env["hardware"]) + (f"-{env['threads']}t" if env["device"] == "cpu" else "")
    versions = f"torch{env['torch'].split('+')[0]}-transformers{env['transformers']}"
    return folder / f"{tool}--{slug(label)}--{where}-{env['allocator']}--{versions}.csv"
