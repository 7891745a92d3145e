"""A lock on an output file that dies with its process."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
import threading
import time
import weakref
from pathlib import Path

from llava.utils import UserError

try:
    import fcntl
except ImportError:  # no POSIX locks on this system
    fcntl = None  # type: ignore[assignment]

_UNSUPPORTED = {
    getattr(errno, name) for name in ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL") if hasattr(errno, name)
}
_HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK}
_MARK = "process "
# Record locks are invisible within the process that holds them, and closing any descriptor of the lock file gives them
# away: the file must not even be opened here while it is held.
_held_here: weakref.WeakValueDictionary[tuple[int, int], FileLock] = weakref.WeakValueDictionary()
_guard = threading.Lock()
_told: set[str] = set()


class FileLock:
    """Exclusive right to write what `path` leads to, from construction until `release` or the death of the process.

    Two locks in one, so that no second name of the file is a way around it:

    - a POSIX record lock on a hidden file beside the real file (links resolved), because the file itself is replaced
      when its lines are put in order and may not be there yet. Child processes that read images do not inherit it, and
      network file systems pass it on to other machines.
    - `flock` on the file itself, where it is there: hard links have no common folder, but one inode. Forked children
      close what they inherit of it.

    Where the file system has no locks, a warning says so and nothing is refused.

    wait: seconds to wait for another holder.

    Raises:
        UserError: another process, or another part of this one, writes the file; or somebody has put a link in the
            place of the lock file.
    """

    def __init__(self, path: Path, what: str, wait: float = 0.0) -> None:
        self._target = Path(os.path.realpath(path))
        self.path = self._target.with_name(f".{self._target.name}.lock")
        self._what, self._shown = what, path
        self._descriptor: int | None = None
        self._inode_lock: int | None = None
        self._key: tuple[int, int] | None = None
        self._process = os.getpid()
        if fcntl is None:
            self._tell_unsupported("this system has no file locks")
            return
        deadline = time.monotonic() + wait
        while not self._acquire():
            if time.monotonic() >= deadline:
                raise self._refusal(self._holder())
            time.sleep(0.05)

    def _refusal(self, holder: str) -> UserError:
        return UserError(
            f"{self._what} {self._shown} is being written by another run{holder}; "
            "wait for it or give another --answers-file"
        )

    def _acquire(self) -> bool:
        with _guard:
            if not self._lock_name():
                return False
            try:
                if self.hold_file():
                    return True
            except BaseException:
                self._give_back()
                raise
            self._give_back()
            return False

    # --- the hidden file ---

    def _lock_name(self) -> bool:
        if self._held_in_this_process():
            return False
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(self.path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise self._planted() from None
            raise
        mine = True  # to close, until the lock is held
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise self._planted()
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD:
                    return False
                if error.errno not in _UNSUPPORTED:
                    raise
                self._tell_unsupported(os.strerror(error.errno or 0))
                self.path.unlink(missing_ok=True)
                return True
            # The last holder removes the file; who opened it before that holds a lock that nobody else can see.
            try:
                current: int | None = os.lstat(self.path).st_ino
            except FileNotFoundError:
                current = None
            if current != status.st_ino:
                return False
            with contextlib.suppress(OSError):  # who holds it is only a help; a full disk must not stop a run here
                if not status.st_size or os.pread(descriptor, len(_MARK), 0) == _MARK.encode():
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{_MARK}{self._process} on {socket.gethostname()}".encode(), 0)
            self._descriptor, mine = descriptor, False
            self._key = status.st_dev, status.st_ino
            _held_here[self._key] = self
            return True
        finally:
            if mine:
                os.close(descriptor)

    def _held_in_this_process(self) -> bool:
        try:
            status = os.lstat(self.path)
        except OSError:
            return False
        holder = _held_here.get((status.st_dev, status.st_ino))
        return holder is not None and holder._process == os.getpid()

    def _planted(self) -> UserError:
        return UserError(f"{self.path}: a lock file must be a file of its own, not a link or anything else; remove it")

    def _holder(self) -> str:
        if self._held_in_this_process():
            return f" ({_MARK}{os.getpid()}, this one)"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            with open(descriptor, encoding="utf-8") as file:
                text = file.read(200).strip()
            return f" ({text})" if text.startswith(_MARK) else ""
        return ""

    # --- the file itself ---

    def hold_file(self) -> bool:
        """Locks the file itself, which its writer calls again when it has made the file; False if another holds it."""
        if fcntl is None or self._inode_lock is not None:
            return True
        try:
            descriptor = os.open(self._target, os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return True  # not there yet, or not ours to write: its writer will say so
        mine = True
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return True
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _UNSUPPORTED:
                raise
            self._tell_unsupported(os.strerror(error.errno or 0))
            return True
        else:
            self._inode_lock, mine = descriptor, False
            _inode_locks.add(self)
            return True
        finally:
            if mine:
                os.close(descriptor)

    def _tell_unsupported(self, reason: str) -> None:
        folder = str(self._target.parent)
        if folder not in _told:
            _told.add(folder)
            print(
                f"warning: files in {folder} cannot be locked ({reason}): nothing keeps a second run off {self._shown}",
                file=sys.stderr,
            )

    def release(self) -> None:
        """Gives the lock back; does nothing in a forked child, which never had it."""
        if self._process == os.getpid():
            with _guard:
                self._give_back()

    def _give_back(self) -> None:
        if self._inode_lock is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._inode_lock, fcntl.LOCK_UN)
            os.close(self._inode_lock)
            self._inode_lock = None
            _inode_locks.discard(self)
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            if self._key is not None:
                _held_here.pop(self._key, None)
            os.close(self._descriptor)
            self._descriptor = None


_inode_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _in_child() -> None:
    """A forked child closes its copies: `flock` lasts until the last of them is closed."""
    global _guard
    _guard = threading.Lock()
    for lock in list(_inode_locks):
        if lock._inode_lock is not None:
            os.close(lock._inode_lock)
            lock._inode_lock = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
