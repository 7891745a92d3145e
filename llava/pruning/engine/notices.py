"""What a method could not do as it was asked to: the one place where pruning says anything, and says it once.

- :func:`say`: something that a model or prompt lacks, and what takes its place; as soon as it is known.
- Budgets that were not met, at the end of a run: for how many samples, and what they got instead.
- Options that were given and changed nothing in the whole run.

Each is said once per program, however often methods are attached.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from llava.pruning.engine.trace import Trace

_LOGGER = logging.getLogger(__name__)

_ROUNDING = 1.0
"""Layers keep whole tokens, so a mean that is off by one token is met."""
_FEW, _SHARE = 8, 0.04
"""Budgets of so few tokens are small beside one token: there it is this share of them."""


@dataclass
class _Tally:
    """``of_all``: means are shares of the visual tokens."""

    of_all: bool = False
    samples: int = 0
    missed: int = 0
    least: float = float("inf")
    most: float = 0.0


_SAID: set[Hashable] = set()
_NEEDS = {
    "pospad": "no method dropped tokens in front of the decoder",
    "noise_seed": "no tokens were merged into two or more clusters",
}
"""Options that may come to nothing, and why that is."""


def say(name: str, text: str) -> None:
    """Log a line about the method of this name, unless this program has done so before."""
    if _first_time((name, text)):
        _LOGGER.warning("%s: %s", name, text)


def forget() -> None:
    """Say everything anew: a program that counts as several, such as tests."""
    _SAID.clear()


def _first_time(key: Hashable) -> bool:
    new = key not in _SAID
    _SAID.add(key)
    return new


class Notices:
    """Of a run: per method and budget the samples and those whose mean is off by more than rounding, and which options
    had an effect.
    """

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str, str], _Tally] = {}
        self._given: set[tuple[str, str]] = set()
        self._effects: set[tuple[str, str]] = set()

    def given(self, parts: Iterable[Any], effects: Iterable[tuple[str, str]]) -> None:
        """Note a prefill: the methods that took part in it, and the options that changed something, by method."""
        self._given |= {(part.name, option) for part in parts for option in _NEEDS if _is_given(part, option)}
        self._effects |= set(effects)

    def add(self, method: str, traces: Iterable[Trace]) -> None:
        """Count the samples that had visual tokens and a budget."""
        for trace in traces:
            error = trace.budget_error
            if error is None or trace.target_tokens is None or not trace.visual_tokens:
                continue
            # Rows whose targets are one share of their tokens have one budget, not as many as there are targets.
            ratio = trace.target_ratio
            wanted = f"{trace.target_tokens} visual tokens" if ratio is None else f"{ratio} of the visual tokens"
            tally = self._tallies.setdefault((method, wanted, trace.budget), _Tally(of_all=ratio is not None))
            tally.samples += 1
            if abs(error) > (_ROUNDING if trace.target_tokens > _FEW else _SHARE * trace.target_tokens):
                tally.missed += 1
                mean = trace.mean_tokens(trace.budget) / (trace.visual_tokens if tally.of_all else 1)
                tally.least, tally.most = min(tally.least, mean), max(tally.most, mean)

    def report(self) -> None:
        """Say what was missed, or leave it to :func:`missed_budgets` around; then start anew."""
        around = _AROUND.get()
        for (method, wanted, budget), tally in self._tallies.items():
            if around is not None:
                around._join((method, wanted, budget), tally)
            elif tally.missed and _first_time((method, wanted, budget)):
                least, most = (f"{mean:.{3 if tally.of_all else 1}f}" for mean in (tally.least, tally.most))
                means = least if least == most else f"{least} to {most}"
                _LOGGER.warning(
                    "%s: for %d of %d samples these options cannot meet %s per layer; their %s mean is %s",
                    method, tally.missed, tally.samples, wanted, budget, means,
                )  # fmt: skip
        if around is not None:
            around._given |= self._given
            around._effects |= self._effects
        else:
            for method, option in sorted(self._given - self._effects):
                say(method, f"{option} had no effect: {_NEEDS[option]}")
        for noted in (self._tallies, self._given, self._effects):
            noted.clear()

    def _join(self, key: tuple[str, str, str], other: _Tally) -> None:
        own = self._tallies.setdefault(key, _Tally(of_all=other.of_all))
        own.samples += other.samples
        own.missed += other.missed
        own.least, own.most = min(own.least, other.least), max(own.most, other.most)


def _is_given(part: Any, option: str) -> bool:
    value = getattr(part, option, None)
    return value is not None and value is not False  # a seed may be 0


_AROUND: ContextVar[Notices | None] = ContextVar("notices", default=None)


@contextmanager
def missed_budgets(report: bool = True) -> Iterator[None]:
    """Join what all runs inside have to say at their ends: one line per method and budget, given at the end.

    For programs that attach methods again and again, by turns. ``report=False`` drops them: for a pass that only warms
    up.
    """
    joined = Notices()
    token = _AROUND.set(joined)
    try:
        yield
    finally:
        _AROUND.reset(token)
        if report:
            joined.report()
