"""On what a measurement was made: hardware, versions, threads, allocator; and how to fix the allocator's settings.

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

# Freed memory stays with the process instead of going back to the system and being faulted in again page by page, which
# on large score matrices takes longer than computing them.
FIXED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
_TOLD = (
    *FIXED_ALLOCATOR, "MALLOC_ARENA_MAX", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS",
)  # fmt: skip


def _allocator_is_fixed() -> bool:
    return all(os.environ.get(name) == value for name, value in FIXED_ALLOCATOR.items())


def use_fixed_allocator() -> None:
    """Starts a benchmark again with `FIXED_ALLOCATOR`, which glibc reads only at the start.

    Nothing happens if it is set, or where this process is no `python -m benchmarks.TOOL`.
    """
    started = getattr(sys.modules["__main__"], "__spec__", None)
    is_tool = started is not None and started.name.startswith("benchmarks.")
    if is_tool and platform.system() == "Linux" and not _allocator_is_fixed():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **FIXED_ALLOCATOR})


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
        "allocator": "fixed" if _allocator_is_fixed() else "default",
        "variables": {name: os.environ[name] for name in _TOLD if name in os.environ},
    }


def describe(env: Mapping[str, Any]) -> str:
    """One paragraph for people."""
    variables = ", ".join(f"{name}={value}" for name, value in env["variables"].items()) or "none set"
    threads = f"{env['threads']} thread" + ("" if env["threads"] == 1 else "s")
    return (
        f"{env['hardware']}, {threads} on {env['cores']} cores, load average {env['load_average']} at "
        f"the end; torch {env['torch']}, transformers {env['transformers']}, python {env['python']}; allocator "
        f"{env['allocator']} ({variables})"
    )
