"""A lock on an output file that dies with its process.

Knows advisory locks of the operating system; nothing of what the file holds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import weakref
from pathlib import Path
from typing import IO

from llava.utils import UserError

try:
    import fcntl
except ImportError:  # no POSIX locks on this system: nothing is refused there
    fcntl = None

# Record locks are invisible within the process that holds them.
_held_here: weakref.WeakValueDictionary[str, FileLock] = weakref.WeakValueDictionary()


class FileLock:
    """Exclusive right to write `path`, from construction until `release` or the death of the process.

    Lies in a hidden file beside `path`, because the file itself is replaced when its lines are put in order. A POSIX
    record lock: unlike `flock`, child processes that read images do not inherit it and cannot keep it alive, and
    network file systems pass it on to other machines.

    wait: seconds to wait for another holder.

    Raises:
        UserError: another process, or another part of this one, writes the file.
    """

    def __init__(self, path: Path, what: str, wait: float = 0.0) -> None:
        self.path = path.with_name(f".{path.name}.lock")
        self._file: IO[str] | None = None
        self._process = os.getpid()
        if fcntl is None:
            return
        deadline = time.monotonic() + wait
        while not self._acquire():
            if time.monotonic() >= deadline:
                holder = self._holder()
                raise UserError(
                    f"{what} {path} is being written by another run{holder}; wait for it or give another --answers-file"
                )
            time.sleep(0.05)

    def _acquire(self) -> bool:
        key = os.path.abspath(self.path)
        if key in _held_here:
            return False
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                return True
            raise
        # The last holder removes the file; who opened it before that holds a lock that nobody else can see.
        try:
            current = os.stat(self.path).st_ino
        except FileNotFoundError:
            current = None
        if current != os.fstat(file.fileno()).st_ino:
            file.close()
            return False
        with contextlib.suppress(OSError):  # who holds it is only a help; a full disk must not stop a resumed run here
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {self._process} on {socket.gethostname()}".encode())
        self._file = file
        _held_here[key] = self
        return True

    def _holder(self) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = self.path.read_text(encoding="utf-8").strip()
            return f" ({text})" if text else ""
        return ""

    def release(self) -> None:
        """Gives the lock back; does nothing in a forked child, which never had it."""
        if self._file is None or self._process != os.getpid():
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._file.close()
        self._file = None
        _held_here.pop(os.path.abspath(self.path), None)
