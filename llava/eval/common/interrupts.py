"""SIGINT and SIGTERM during a run: the program stops where nothing can be torn, and ends with the signal's status.

Knows signals; nothing of what the run does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop. `exit_status` is what a shell expects: 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Interrupts:
    """Context in which SIGINT and SIGTERM raise `Interrupted` in the main thread, but not inside `held()`.

    Outside the main thread it does nothing: only the main thread may set handlers.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._holds = 0
        self._waiting: int | None = None
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked child that has not set its own handlers yet
            os._exit(128 + number)
        if self._holds:
            self._waiting = number
        else:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What happens inside is finished before a signal takes effect; keep it short."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._waiting is not None and not self._holds:
            number, self._waiting = self._waiting, None
            raise Interrupted(number)
