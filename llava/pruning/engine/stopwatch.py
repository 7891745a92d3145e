"""Times of blocks of a prefill, without making the host wait for the device."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Times a block: the host clock on CPU, a pair of events on CUDA that nobody waits for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.elapsed = 0.0
        self.events: tuple[Any, ...] = ()
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            self.events = tuple(event(enable_timing=True) for _ in range(2))

    def __enter__(self) -> Stopwatch:
        if self.events:
            self.events[0].record()
        else:
            self.started = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.events:
            self.events[1].record()
        else:
            self.elapsed = time.perf_counter() - self.started

    def seconds(self) -> float:
        if not self.events:
            return self.elapsed
        start, end = self.events
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
