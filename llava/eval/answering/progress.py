"""How far a run is: a bar on a terminal, plain lines in a log file, nothing when it shall be quiet."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from llava.utils import visible

LINE_INTERVAL = 30.0  # seconds between lines of a log


class Progress:
    """Context manager that is told of every sample with `advance` and prints on stderr.

    what: the samples, in the plural. process: (number, how many) where several processes share the work; their bars
    stand below one another and their lines say whose they are.
    """

    def __init__(
        self, total: int, label: str, quiet: bool = False, process: tuple[int, int] = (0, 1), what: str = "questions"
    ) -> None:
        self.total, self.quiet, self.what = total, quiet, what
        number, processes = process
        self.label = label if processes == 1 else f"{label} [{number + 1}/{processes}]"
        self.done = 0
        self._tokens: float | None = None
        self._started = self._printed = time.perf_counter()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                unit="q",
                desc=self.label,
                mininterval=0.5,
                position=number if processes > 1 else None,
                leave=processes == 1,  # below one another, bars that stay would leave holes
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def relabel(self, label: str) -> None:
        """Another part of the same work begins."""
        self.label = label
        if self._bar is not None:
            self._bar.set_description(label)

    def advance(self, tokens: float | None = None, count: int = 1) -> None:
        """Samples are done. tokens: mean of the visual tokens that a layer keeps, over the samples so far."""
        self.done += count
        self._tokens = tokens if tokens is not None else self._tokens
        if self._bar is not None:
            if self._tokens is not None:
                self._bar.set_postfix_str(f"{self._tokens:.1f} tokens/layer", refresh=False)
            self._bar.update(count)
        elif not self.quiet and (self.done == self.total or time.perf_counter() - self._printed >= LINE_INTERVAL):
            self._printed = time.perf_counter()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """One line: counts, rate, what is left, tokens."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rate = self.done / seconds
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
        text = f"{self.label}: {self.done}/{self.total} {self.what}, {rate:.2f} {self.what}/s, {left} left"
        return text if self._tokens is None else f"{text}, {self._tokens:.1f} tokens/layer"

    def message(self, text: str) -> None:
        """Prints a line that must not be lost, above the bar."""
        text = visible(text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
