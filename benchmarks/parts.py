"""A pass cut into parts: while it lasts, functions of models, of the engine and of tools run inside `part(name)`.

`part` is whoever measures: the :class:`Clock` of this file, torch's profiler, the counter of launches.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.timing import synchronize

_ABSENT = object()


@dataclass(frozen=True)
class Cut:
    """A function that is found as `owner.name` and whose calls are a part of the pass.

    Attributes:
        part: the part's name, or what tells it by the arguments of a call.
        owner: an instance (a frozen one too), a class or a Python module.
        block: the function makes a context manager that does nothing, such as `PruningRun.selection_timer`; the part is
            its block.
    """

    part: str | Callable[..., str]
    owner: Any
    name: str
    block: bool = False

    def within(self, part: Callable[[str], AbstractContextManager], calls: Counter[str]) -> Callable[..., Any]:
        """The function with its calls inside `part`; `AttributeError` if there is none of this name."""
        function = getattr(self.owner, self.name)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            name = self.part if isinstance(self.part, str) else self.part(*args, **kwargs)
            calls[name] += 1
            if self.block:
                return part(name)
            with part(name):
                return function(*args, **kwargs)

        return wrapped


@contextmanager
def cut(cuts: Sequence[Cut], part: Callable[[str], AbstractContextManager]) -> Iterator[Counter[str]]:
    """Puts every function inside `part(its part)` while it lasts; yields the calls by part."""
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for one in cuts:
            stack.enter_context(_replaced(one.owner, one.name, one.within(part, calls)))
        yield calls


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    put, take = (setattr, delattr) if isinstance(owner, type) else (object.__setattr__, object.__delattr__)
    own = vars(owner).get(name, _ABSENT)
    put(owner, name, value)
    try:
        yield
    finally:
        if own is _ABSENT:
            take(owner, name)
        else:
            put(owner, name, own)


def selection(run: Any) -> Cut:
    """All that only pruning needs, in the tower, in front of the decoder and between its layers."""
    return Cut("selection", run, "selection_timer", block=True)


class Clock:
    """Seconds by part. A part that runs inside another is taken from the outer one.

    At every change of the part there is a mark: on CUDA an event in the stream, so that a part has the time that the
    device spent on it or waited in it and the host waits for nothing; elsewhere the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        # Marks that are not counted yet, each with the part that ends or pauses there (None: outside of all).
        self._marks: list[tuple[str | None, Any]] = []

    @property
    def seconds(self) -> defaultdict[str, float]:
        """Seconds by part until now; waits for the device."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self.device)
        for (_, before), (name, after) in pairwise(self._marks):
            if name is not None:
                self._seconds[name] += before.elapsed_time(after) / 1000 if on_cuda else after - before
        del self._marks[:-1]
        return self._seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times a block."""
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self.device))
        else:
            synchronize(self.device)
            mark = time.perf_counter()
        self._marks.append((self._open[-1] if self._open else None, mark))
