"""One pass under `torch.profiler`: host and device time by part and by operator, and what CUDA was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

PASS, PART = "pass: ", "part: "
OTHER, HOST_ONLY, WAITING = "other", "host only", "waiting"
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


@dataclass
class Pass:
    """Microseconds of one pass.

    Attributes:
        wall: from the start until the device is done.
        host: part -> self time on the host; adds up to `wall`.
        device: part -> time of the kernels and copies that the part asked for; empty without a device's events.
        busy: time during which the device did anything.
        operators: operator -> self time, on the device where there is one.
        calls: operator -> calls.
        cuda: what was asked of CUDA, by kind.
    """

    wall: float
    host: Counter[str] = field(default_factory=Counter)
    device: Counter[str] = field(default_factory=Counter)
    busy: float = 0.0
    operators: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    cuda: Counter[str] = field(default_factory=Counter)

    def times(self, parts: Sequence[str]) -> dict[str, float]:
        """Microseconds by part; `other` is what the rest leaves of `wall`.

        Where no device was seen: the host's. Otherwise the device's, and `host only` for the time in which it had
        nothing to do.
        """
        times = {part: (self.device if self.busy else self.host)[part] for part in parts if part != OTHER}
        if self.busy:
            times[HOST_ONLY] = max(self.wall - self.busy, 0.0)
        return {**times, OTHER: self.wall - sum(times.values())}


def passes_in(events: Iterable[Any]) -> dict[str, Pass]:
    """Name -> pass, from the profiler's events: annotations `pass: NAME` with annotations `part: NAME` in them."""
    events = list(events)
    roots = [event for event in events if event.name.startswith(PASS) and event.device_type == DeviceType.CPU]
    return {root.name.removeprefix(PASS): _taken_apart(root, events) for root in roots}


def _taken_apart(root: Any, events: Sequence[Any]) -> Pass:
    result = Pass(root.time_range.elapsed_us())
    start, end = root.time_range.start, root.time_range.end
    within = [event for event in events if start <= event.time_range.start <= end]
    on_device = [e for e in within if e.device_type != DeviceType.CPU and not _annotation(e.name)]
    result.busy = _covered([(e.time_range.start, e.time_range.end) for e in on_device])
    for event in on_device:
        copies = event.name.startswith(("Memcpy", "Memset"))
        result.cuda["CUDA copies" if copies else "CUDA kernels"] += 1
        result.cuda["CUDA copies to the host"] += event.name.startswith("Memcpy DtoH")
    if on_device:
        result.cuda["CUDA waits"] = sum(e.device_type == DeviceType.CPU and e.name in _WAITS for e in within)

    pending = [(root, OTHER)]
    while pending:
        event, part = pending.pop()
        if event.name.startswith(PART):
            part = event.name.removeprefix(PART)
        kernels = sum(kernel.duration for kernel in event.kernels if not _annotation(kernel.name))
        result.host[part] += event.self_cpu_time_total
        result.device[part] += kernels
        if not _annotation(event.name):
            result.operators[event.name] += kernels if result.busy else event.self_cpu_time_total
            result.calls[event.name] += 1
        pending += [(child, part) for child in event.cpu_children]
    return result


def _annotation(name: str) -> bool:
    return name.startswith((PASS, PART))


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
