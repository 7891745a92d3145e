"""What the machine offers a model: memory, and arithmetic in half precision."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path

import psutil
import torch

from llava.utils import UserError

SKIP_VARIABLE = "LLAVA_SKIP_MEMORY_CHECK"
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
# Instructions for half precision: x86's, and ARM's.
_FAST_HALF = frozenset({"amx_bf16", "amx_fp16", "avx512_bf16", "avx512_fp16", "bf16", "asimdhp"})


def check_memory(needed: int, held: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse a load that cannot fit, before anything is converted.

    Args:
        needed: bytes of the weights in the precision the model runs in.
        held: how many of them are memory of the process's own; the others stay mapped from the files, and the system
            can drop and read them again.
        device: where all weights go.
        dtype: that precision.

    Returns:
        A warning where it fits, but only with the help of the disk.

    Raises:
        UserError: says how much is needed and available, and what to do.
    """
    available = free_memory(device)
    if available is None or needed <= available or os.environ.get(SKIP_VARIABLE):
        return None
    figures = f"the weights need {_gb(needed)} in {_name(dtype)}, available are {_gb(available)}"
    if device.type == "cpu" and held <= available:
        return (
            f"{figures}: parts will be read from the disk again and again, which is slow; "
            "close other programs or take a smaller checkpoint"
        )
    on_cpu = device.type == "cpu"
    remedies = ["close other programs"]
    if dtype.itemsize > 2:
        remedies.append(f"--dtype bfloat16 (half the memory{'; slower on most CPUs' if on_cpu else ''})")
    remedies += ["a smaller checkpoint", "a machine with more memory" if on_cpu else "4-bit loading or --device cpu"]
    raise UserError(
        f"not enough memory{'' if on_cpu else f' on {device}'}: {figures}. What to do: {', '.join(remedies)}; "
        f"{SKIP_VARIABLE}=1 tries all the same"
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; None where nobody tells."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return torch.cuda.mem_get_info(device)[0]
        return None
    if device.type != "cpu":
        return None
    limits = [psutil.virtual_memory().available + psutil.swap_memory().free]
    limits += [room for room in (_cgroup_room(), _address_room()) if room is not None]
    return max(min(limits), 0)


def _cgroup_room() -> int | None:
    """What is left below the limits of the control groups this process is in (containers, batch systems)."""
    rooms = []
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in groups:
        _, controllers, place = line.split(":", 2)
        if controllers == "":  # version 2: one tree
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = _CGROUPS / "memory"
        else:
            continue
        group = root / place.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            room = _group_room(folder, *names)
            if room is not None:
                rooms.append(room)
    return min(rooms, default=None)


def _group_room(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    try:
        most = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):  # no such file at the root; "max"
        return None
    if most >= _UNLIMITED:
        return None
    found = re.search(rf"^{cached} (\d+)$", stat, re.MULTILINE)
    return most - used + (int(found.group(1)) if found else 0)


def _address_room() -> int | None:
    """What `ulimit -v` leaves."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError, ValueError):
        return None
    if limit == resource.RLIM_INFINITY:
        return None
    return limit - psutil.Process().memory_info().vms


@functools.cache
def cpu_features() -> frozenset[str] | None:
    """Instruction sets as the kernel lists them; None where it does not."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return frozenset(found.group(1).split())
    return None


def slow_half_precision(dtype: torch.dtype) -> str | None:
    """A notice for who runs half precision on a CPU that has no instructions for it; None for all others."""
    features = cpu_features()
    if features is None or dtype.itemsize != 2 or features & _FAST_HALF:
        return None
    return (
        f"{_name(dtype)} on this CPU is several times slower than float32 (five to six times where measured): it "
        "has no instructions for it (AMX or AVX512-BF16); --dtype float32 is faster and needs twice the memory"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
