"""Timing that can be trusted: warm-up, interleaved rounds, medians with p10 and p90, device clocks."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Columns of a row: median and 10th and 90th percentile in milliseconds, and of how many rounds."""
    low, middle, high = np.percentile(1000 * np.asarray(seconds, dtype=np.float64), [10, 50, 90])
    return {"ms": float(middle), "p10": float(low), "p90": float(high), "rounds": len(seconds)}


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes: CUDA events on CUDA, elsewhere the host clock until the device is done."""
    synchronize(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def interleaved_rounds(
    candidates: Mapping[Key, Any],
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    measure: Callable[[Any, torch.device], Any] = timed,
    description: str = "",
    until: float | None = None,
) -> dict[Key, list[Any]]:
    """Seconds of every candidate, or whatever `measure` finds of it, `rounds` each.

    In every round each candidate runs once, in an order that is shuffled (the same in every run): drifts of clock and
    temperature, other work on the machine, and the state in which a predecessor leaves caches and allocator meet all of
    them alike. In an order that only rotates each would always follow the same one. Compare candidates round by round.

    until: `time.monotonic()` after which no further round begins, once there are three.
    """
    shuffle = random.Random(0).shuffle
    names = list(candidates)
    found: dict[Key, list[Any]] = {name: [] for name in names}
    total = (warmup + rounds) * len(names)
    with torch.inference_mode(), tqdm(total=total, desc=description, file=sys.stderr, mininterval=2.0) as bar:
        for number in range(warmup + rounds):
            if until is not None and number >= warmup + 3 and time.monotonic() > until:
                break
            shuffle(names)
            for name in names:
                measured = measure(candidates[name], device)
                if number >= warmup:
                    found[name].append(measured)
                bar.update()
    return found


def median_ratio(own: Sequence[float], reference: Sequence[float]) -> float:
    """Median of the ratios within the rounds: a disturbance during one round does not spoil it."""
    return float(np.median(np.asarray(own) / np.asarray(reference)))
