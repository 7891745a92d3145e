"""Peak memory of a piece of work, above what was in use before it.

CUDA's allocator counts exactly. On Linux the kernel keeps the peak of the process's resident memory and lets a process
reset it; elsewhere there is no such figure and the answer is None.
"""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes(field: str = "VmRSS") -> int | None:
    """Resident memory of this process (``VmHWM``: its peak) in bytes; None where the kernel does not tell."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(match.group(1)) if match else None


def _give_back_freed_memory() -> None:
    # What malloc keeps after a free would count as in use before, and hide what the work itself needs.
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Context manager; afterwards ``bytes`` is the peak above the start, or None if it cannot be known.

    On a CPU the figure holds what malloc took from the system, page by page: buffers that are taken and never touched
    do not count, and the first call of a kernel may count what it keeps. Measure after a warm-up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            _give_back_freed_memory()
            with suppress(OSError):
                _RESET.write_text("5")  # resets VmHWM to VmRSS (man 5 proc)
                self._before = resident_bytes()
        return self

    def __exit__(self, *exc) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resident_bytes("VmHWM")
        self.bytes = None if peak is None else max(peak - self._before, 0)
