"""Makes the miniature benchmarks on first use, and only what is missing.

Every file is compared with its committed checksum before it gets its name, so a folder never holds half a file or a
picture that this machine draws otherwise. Crowded scenes are a set of their own, made only where somebody asks for
them (`ensure_crowded`). What was made is remembered with size and time of change (`.made.json`), so
that looking whether all is there takes milliseconds; a file that changed since is read again. Several processes may
start at once: one makes the files, the others wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llava.utils import UserError

from .benchmarks import DATA, DATA_CROWDED, DATA_DRIVE, DATA_WIDE, ROOT, build_all, build_crowded, build_wide
from .driving import build_driving
from .files import CHECKSUMS, CHECKSUMS_CROWDED, Unreadable, checksum, contents, read_checksums

try:
    import fcntl
except ImportError:  # not a POSIX system: files still appear whole, but two processes may both make them
    fcntl = None

MADE, MADE_CROWDED, LOCK, PART = ".made.json", ".made_crowded.json", ".lock", ".part-"
COMMAND = f"python -m {__package__}"  # playground.tiny.build, and in an installation llava.tiny.build
Record = list  # checksum, size, time of change in nanoseconds


def makers() -> dict[str, Callable[[], bytes]]:
    """What makes the bytes of every file, by path below the data folder."""
    return contents({DATA.name: build_all(), DATA_WIDE.name: build_wide(), DATA_DRIVE.name: build_driving()})


def crowded_makers() -> dict[str, Callable[[], bytes]]:
    """`makers` of the benchmarks on crowded scenes."""
    return contents({DATA_CROWDED.name: build_crowded()})


def ensure(root: Path = ROOT, overwrite: bool = False, checksums: Path = CHECKSUMS) -> int:
    """Make what is missing of the miniature benchmarks in `root`; returns the number of files made.

    overwrite: also replace files whose content was altered, which is an error otherwise.
    """
    return _ensure(root, overwrite, read_checksums(checksums), makers, MADE)


def ensure_crowded(root: Path = ROOT, overwrite: bool = False, checksums: Path = CHECKSUMS_CROWDED) -> int:
    """`ensure` for the benchmarks on crowded scenes, which take longer."""
    return _ensure(root, overwrite, read_checksums(checksums), crowded_makers, MADE_CROWDED)


def _ensure(root: Path, overwrite: bool, wanted: dict[str, str], make: Callable, record: str) -> int:
    made, missing = _survey(root, wanted, overwrite, record)
    if not missing:
        return 0
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            made, missing = _survey(root, wanted, overwrite, record)  # another process may have made them meanwhile
            if missing:
                _make(root, wanted, missing, made, make(), record)
    except OSError as error:
        raise UserError(
            f"{error.filename or root}: {error.strerror or error}; {len(missing)} files of the miniature benchmarks "
            f"are missing in {root}, and {COMMAND} must be able to write there"
        ) from error
    return len(missing)


def _survey(root: Path, wanted: dict[str, str], overwrite: bool, record: str) -> tuple[dict[str, Record], list[str]]:
    """Which files are as they should be, and the paths of those to make. Raises on an altered file."""
    recorded = _recorded(root, record)
    made: dict[str, Record] = {}
    missing: list[str] = []
    for path, digits in wanted.items():
        found = _stat(root / path)
        before = recorded.get(path)
        if found is None:
            missing.append(path)
        elif before == [digits, *found] or _matches(root / path, path, digits):
            made[path] = [digits, *found]
        elif overwrite or (before and before[1:] == found):  # the latter: ours, of an earlier version of the data
            missing.append(path)
        else:
            raise UserError(
                f"{root / path}: not the content that {CHECKSUMS.name} names, so it was altered; remove the file, or "
                f"run `{COMMAND} --overwrite`, to have it made anew"
            )
    if not missing and made != recorded:
        with contextlib.suppress(OSError):  # a folder that cannot be written is read again the next time
            _remember(root, made, record)
    return made, missing


def _make(
    root: Path,
    wanted: dict[str, str],
    missing: list[str],
    made: dict[str, Record],
    make: dict[str, Callable[[], bytes]],
    record: str,
) -> None:
    print(f"[tiny] making the miniature benchmarks: {len(missing)} files in {root}", file=sys.stderr, flush=True)
    for left in root.glob(f"{PART}*"):  # of a process that was killed; we are alone
        left.unlink(missing_ok=True)
    try:
        for path in missing:
            data = make[path]()
            if checksum(path, data) != wanted[path]:
                raise UserError(
                    f"{root / path}: what this machine makes does not have the checksum in {CHECKSUMS}; are numpy "
                    "and Pillow of the versions in constraints.txt?"
                )
            made[path] = [wanted[path], *_write(root, root / path, data)]
    finally:
        _remember(root, made, record)


def _write(root: Path, path: Path, data: bytes) -> list[int]:
    """Write a file so that it appears whole or not at all; returns its size and time of change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = root / f"{PART}{os.getpid()}"
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return _stat(path) or []


def _matches(file: Path, path: str, digits: str) -> bool:
    try:
        return checksum(path, file.read_bytes()) == digits
    except Unreadable:
        return False


def _stat(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_size, found.st_mtime_ns]


def _recorded(root: Path, record: str = MADE) -> dict[str, Record]:
    try:
        found = json.loads((root / record).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(root: Path, made: dict[str, Record], record: str = MADE) -> None:
    _write(root, root / record, json.dumps(made).encode())


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of the folder; the system releases it when the process ends, however that is."""
    with open(root / LOCK, "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("[tiny] waiting for the process that makes the miniature benchmarks", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: files still appear whole
                pass
        yield
