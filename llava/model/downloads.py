"""An end to every download: an overall deadline, and one for downloads that stand still.

The hub's client waits for single answers with a limit, but as long as now and then a byte arrives it waits for ever.
"""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava.utils import UserError

DEADLINE_VARIABLE = "LLAVA_DOWNLOAD_DEADLINE"
SMALL_DEADLINE_S = 600.0
"""For configuration and tokenizer files (a few MB)."""
WEIGHTS_DEADLINE_S = 12 * 3600.0
"""For weights: 26 GB at 5 Mbit/s."""
STALLED_S = 600.0
"""Without any change in the cache: the client writes pieces of 10 MB, so less than about 17 kB a second."""


class DownloadTimeout(Exception):
    """A download took too long. The message says how long, and how to wait longer."""


def within(deadline_s: float, download: Callable[[], Any], poll_s: float = 1.0) -> Any:
    """The result of `download()`, or its exception.

    It runs in a thread of its own. One that is given up goes on in the background until its next answer; what it has
    fetched stays in the cache, and the interpreter does not wait for it at the end.

    Args:
        deadline_s: for the whole; the environment variable `LLAVA_DOWNLOAD_DEADLINE` (seconds) takes its place.
        download: the call.
        poll_s: how often the cache's size is looked at.

    Raises:
        DownloadTimeout: not done in time, or nothing has arrived for `STALLED_S` seconds.
    """
    deadline_s = _wished(deadline_s)
    outcome: list[tuple[Any, BaseException | None]] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append((download(), None))
        except BaseException as error:  # noqa: BLE001 - handed on to the caller's thread
            outcome.append((None, error))
        finally:
            done.set()

    before = set(threading.enumerate())
    # A daemon, and with it every thread that it starts.
    threading.Thread(target=run, name="llava-download", daemon=True).start()
    started = grown = time.monotonic()
    state: tuple[int, int, int] | None = None
    try:
        while not done.wait(min(poll_s, max(started + deadline_s - time.monotonic(), 0.01))):
            now = time.monotonic()
            if now - started >= deadline_s:
                raise DownloadTimeout(
                    f"no end after {deadline_s:.0f} s; what has arrived is kept, so try again, or set "
                    f"{DEADLINE_VARIABLE} to more seconds"
                )
            if now - grown >= min(STALLED_S, 60.0) or state is None:
                found = _cache_state()
                if found != state:
                    state, grown = found, now
                elif now - grown >= STALLED_S:
                    raise DownloadTimeout(
                        f"nothing has arrived for {now - grown:.0f} s; what had arrived is kept: check the connection "
                        "and try again"
                    )
    except BaseException:
        _forget(set(threading.enumerate()) - before)
        raise
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _wished(deadline_s: float) -> float:
    text = os.environ.get(DEADLINE_VARIABLE, "").strip()
    if not text:
        return deadline_s
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UserError(f"{DEADLINE_VARIABLE} must be a number of seconds above 0, not {text[:40]!r}")
    return seconds


def _cache_state() -> tuple[int, int, int]:
    """Bytes, blocks on the disk and the latest change of what the hub's client writes; any difference is progress."""
    from huggingface_hub import constants

    size = blocks = changed = 0
    folders = [*Path(constants.HF_HUB_CACHE).glob("*/blobs"), Path(getattr(constants, "HF_XET_CACHE", os.devnull))]
    for folder in folders:
        for place, _, files in os.walk(folder):
            for file in files:
                with contextlib.suppress(OSError):
                    status = os.lstat(os.path.join(place, file))
                    size += status.st_size
                    blocks += getattr(status, "st_blocks", 0)
                    changed = max(changed, status.st_mtime_ns)
    return size, blocks, changed


def _forget(threads: set[threading.Thread]) -> None:
    """Let the interpreter end without waiting for the pool threads of an abandoned download.

    Python joins every thread of an executor at exit, daemon or not; there is no public way to take one out.
    """
    waited_for = getattr(concurrent.futures.thread, "_threads_queues", {})
    for thread in threads:
        if thread.daemon:
            with contextlib.suppress(KeyError, TypeError):
                del waited_for[thread]
