"""Splitting a time into parts, without making the host wait for the device in between.

Knows clocks, how a function of an instance is replaced for a while, and that a pruning run times its selection.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import torch

from benchmarks.timing import synchronize

_ABSENT = object()


class Parts:
    """Seconds by part. A part that runs inside another is taken from the outer one.

    At every change of the part there is a mark: on CUDA an event in the stream, so that a part has the time that the
    device spent on it or waited in it; elsewhere the host's clock.
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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (_, before), (name, after) in pairwise(self._marks):
            if name is not None:
                on_cuda = self.device.type == "cuda"
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

    def around(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time counted; `name` may decide by the arguments."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return wrapped

    def _mark(self) -> None:
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self.device))
        else:
            synchronize(self.device)
            mark = time.perf_counter()
        self._marks.append((self._open[-1] if self._open else None, mark))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an instance (a frozen one too), a class or a Python module, for a while."""
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


def selection_apart(run: Any, parts: Parts) -> AbstractContextManager[None]:
    """While it lasts, what the attached run calls selection is the part `selection` and taken from the part around."""
    return replaced(run, "selection_timer", functools.partial(parts.part, "selection"))
