"""A JSON-lines file that is appended to while a run lasts, survives its death, and ends in question order.

Lines belong to questions by a hash of id and text. Memory stays at a few
bytes per line: lines are recognized by a hash and read again from the file where their text is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llava.eval.common.jsonio import iter_jsonl, replacing, write_lines_atomic
from llava.eval.common.locking import FileLock
from llava.eval.common.outputs import Kind, require_plain
from llava.utils import UserError

_PIECE = 1 << 16


def key_hash(identity: Any, prompt: str) -> int:
    """64 bits that stand for a question: ids alone are shared by several questions of an image."""
    text = f"{identity}\0{prompt}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _as_hashes(values: Iterable[int]) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, array):
        return np.frombuffer(values, dtype=np.uint64) if len(values) else np.zeros(0, np.uint64)
    return np.fromiter(values, dtype=np.uint64)


def match(questions: Iterable[int], records: Iterable[int]) -> np.ndarray:
    """Which question each record belongs to: int64 `[records]`, -1 for none.

    Both are key hashes. Of several questions with one key the first gets the first record, and so on; records beyond
    that belong to none.
    """
    asked, found = _as_hashes(questions), _as_hashes(records)
    places = np.full(len(found), -1, dtype=np.int64)
    if not len(asked) or not len(found):
        return places
    order = np.argsort(asked, kind="stable")
    keys, starts, counts = np.unique(asked[order], return_index=True, return_counts=True)
    group = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
    which = _occurrences(found)
    fits = (keys[group] == found) & (which < counts[group])
    places[fits] = order[starts[group[fits]] + which[fits]]
    return places


def doubled(questions: Iterable[int], records: Iterable[int]) -> np.ndarray:
    """Which records repeat a question that has its record later on: bool `[records]`. The last one counts."""
    asked, found = _as_hashes(questions), _as_hashes(records)
    if not len(asked) or not len(found):
        return np.zeros(len(found), dtype=bool)
    keys, counts = np.unique(asked, return_counts=True)
    group = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
    later = _occurrences(found[::-1])[::-1]
    return (keys[group] == found) & (later >= counts[group])


def _occurrences(values: np.ndarray) -> np.ndarray:
    """How often each value stood before, by position."""
    order = np.argsort(values, kind="stable")
    _, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    occurrences = np.empty(len(values), dtype=np.int64)
    occurrences[order] = np.arange(len(values)) - np.repeat(starts, counts)
    return occurrences


class RecordFile:
    """Lines of one run. Use: construct (checks and locks), `existing`, `open`, `append` ..., `close`.

    Constructing proves that the file can be written, before any model is loaded, and keeps other processes off it until
    `close`; it changes nothing. `open` cuts off a torn last line or, with `keep=False`, starts an empty file; it
    refuses to do so to a file of another kind.
    """

    def __init__(self, path: str | Path, what: str, kind: Kind | None = None) -> None:
        self.path = Path(path)
        self.what = what
        self._kind = kind
        self._descriptor: int | None = None
        self._torn = False
        self._check_writable()
        try:
            self.lock = FileLock(self.path, what)
        except OSError as error:
            raise self._cannot_write(error) from None
        # Bytes of the file that are whole lines; what is behind them was torn by a kill or a full disk.
        self._size = whole_lines(self.path)
        self._lines = count_lines(self.path, self._size)

    @property
    def size(self) -> int:
        """Bytes in whole lines."""
        return self._size

    def _cannot_write(self, error: OSError, remedy: str = "") -> UserError:
        return UserError(f"cannot write {self.what} {self.path}: {error.strerror or error}{remedy}")

    def _check_writable(self) -> None:
        if self.path.is_dir():
            raise UserError(f"{self.what} is a folder: {self.path}")
        real = Path(os.path.realpath(self.path))
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            existed = real.exists()
            if existed:  # opening a pipe would wait for its reader
                require_plain(os.stat(real), f"{self.what} {self.path}")
            with open(real, "ab"):
                pass
            if not existed:
                real.unlink()
        except OSError as error:
            raise self._cannot_write(error) from None

    def existing(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """("file:line", object) of each whole line."""
        if self._size:
            for number, record in iter_jsonl(self.path, self.what, limit_bytes=self._size):
                yield f"{self.path}:{number}", record

    def open(self, keep: bool) -> None:
        """Starts writing."""
        if not keep:
            self._size = self._lines = 0
        if self._kind is not None and self.path.exists() and self.path.stat().st_size > self._size:
            self._kind.check(self.path)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._open_descriptor, self._size)
        except OSError as error:
            raise self._cannot_write(error) from None
        if not self.lock.hold_file():
            raise UserError(f"{self.what} {self.path} is being written by another run; wait for it")

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line through to the system, so that a killed run loses at most the line being written.

        Raises:
            UserError: the line could not be written whole (disk full), or another program has changed the file; the
                lines before it stay.
        """
        assert self._descriptor is not None, "open() comes first"
        status = os.fstat(self._open_descriptor)
        if status.st_size != self._size or (status.st_nlink == 0 and self._removed()):
            raise self._changed()
        data = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            self._torn = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._open_descriptor, self._size)
            remedy = "; the lines before are kept: make room and run the same command again"
            raise self._cannot_write(error, remedy) from None
        self._size += len(data)
        self._lines += 1

    @property
    def _open_descriptor(self) -> int:
        assert self._descriptor is not None  # called between `open` and `finish`
        return self._descriptor

    def _removed(self) -> bool:
        """Whether the name is gone or another file's; a file that was removed gets its lines back."""
        current = os.stat(self.path) if self.path.exists() else None
        if current is None:
            with contextlib.suppress(UserError), replacing(self.path) as file:
                os.lseek(self._open_descriptor, 0, os.SEEK_SET)
                while piece := os.read(self._open_descriptor, 1 << 20):
                    file.write(piece)
            return True
        return current.st_ino != os.fstat(self._open_descriptor).st_ino

    def _changed(self) -> UserError:
        found = "no file" if not self.path.exists() else f"{count_lines(self.path)} lines"
        return UserError(
            f"{self.what} {self.path} was changed by another program during the run: {self._lines} lines were written, "
            f"now there are {found}; nothing of it is overwritten. Look at the file, then run the same command again"
        )

    def finish(self, order: Iterable[int] | None = None, drop_repeats: bool = False) -> None:
        """Stops writing and brings the lines into the `order` (key hashes of the questions); the lock stays.

        Lines that belong to no question stay behind the others, and so do further lines of a question, unless
        `drop_repeats`: then the last one stays.

        Raises:
            UserError: another program has changed the file since `open`, or it cannot be written.
        """
        if order is not None and self._descriptor is None and self.path.exists():
            if self.path.stat().st_size > self._size:
                self.open(keep=True)  # nothing was missing but a torn line
        if self._descriptor is not None:
            try:
                self._check_unchanged()
                with contextlib.suppress(OSError):
                    os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)
                self._descriptor = None
        if order is not None and self._size:
            self._arrange(order, drop_repeats)

    def _check_unchanged(self) -> None:
        status = os.fstat(self._open_descriptor)
        if self._torn and status.st_size > self._size:
            with contextlib.suppress(OSError):
                os.ftruncate(self._open_descriptor, self._size)
            return
        removed = status.st_nlink == 0 and self._removed()
        if removed or status.st_size != self._size or not self.path.exists() or count_lines(self.path) != self._lines:
            raise self._changed()

    def close(self, order: Iterable[int] | None = None, drop_repeats: bool = False) -> None:
        """`finish`, then lets other processes at the file."""
        try:
            self.finish(order, drop_repeats)
        finally:
            self.lock.release()

    def _arrange(self, order: Iterable[int], drop_repeats: bool) -> None:
        found, starts = read_hashes(self.path)
        asked = _as_hashes(order)
        kept = ~doubled(asked, found) if drop_repeats else np.ones(len(found), dtype=bool)
        places = np.full(len(found), -1, dtype=np.int64)
        places[kept] = match(asked, found[kept])
        sequence = np.argsort(np.where(places < 0, np.iinfo(np.int64).max, places), kind="stable")
        sequence = sequence[kept[sequence]]
        if not np.array_equal(sequence, np.arange(len(found))):
            self._rewrite(starts[sequence])

    def _rewrite(self, starts: np.ndarray) -> None:
        def lines() -> Iterator[bytes]:
            with open(self.path, "rb") as source:
                for start in starts:
                    source.seek(int(start))
                    yield source.readline()

        try:
            write_lines_atomic(self.path, lines())
        except UserError as error:
            remedy = "all lines are kept, in the order they came: make room and run the same command again"
            raise UserError(f"{error}; {remedy}") from None


def read_hashes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Key hash and first byte of every whole line that is not blank, uint64 `[lines]` each."""
    hashes, starts = array("Q"), array("Q")
    consumed = 0
    with open(path, "rb") as file:
        for raw in file:
            if raw.strip() and raw.endswith(b"\n"):
                hashes.append(_line_hash(raw))
                starts.append(consumed)
            consumed += len(raw)
    return np.array(hashes, dtype=np.uint64), np.array(starts, dtype=np.uint64)


def _line_hash(raw: bytes) -> int:
    """Key hash of a line; lines of another kind get one that no question has."""
    try:
        record = json.loads(raw)
        return key_hash(record["question_id"], record["prompt"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return key_hash(None, "")


def whole_lines(path: Path) -> int:
    """Size in bytes of the file up to the end of its last whole line; 0 if there is no file.

    A line that ends in NUL bytes is not whole: a power cut can leave them where the last lines should be.
    """
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        end = _last_break(file, file.seek(0, os.SEEK_END))
        while end > 0:
            start = _last_break(file, end - 1)
            file.seek(start)
            if not _ends_in_nul(file, end - start):
                break
            end = start
        return end


def _last_break(file: BinaryIO, end: int) -> int:
    """The byte behind the last line break in front of `end`; 0 if there is none."""
    while end > 0:
        start = max(end - _PIECE, 0)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def _ends_in_nul(file: BinaryIO, length: int) -> bool:
    """Whether the next `length` bytes, a line, hold NUL bytes and behind the first of them nothing else.

    Text in UTF-16 does not look like that.
    """
    found = False
    while length > 0 and (piece := file.read(min(length, _PIECE))):
        length -= len(piece)
        position = 0 if found else piece.find(b"\0")
        if position >= 0:
            found = True
            if piece[position:].strip(b"\0\r\n"):
                return False
    return found


def count_lines(path: Path, limit: int | None = None) -> int:
    """Line breaks in the first `limit` bytes of a file; 0 if there is no file."""
    if not path.exists():
        return 0
    count, left = 0, os.path.getsize(path) if limit is None else limit
    with open(path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count


def question_hashes(questions: Sequence[Any]) -> array:
    """Key hashes in question order."""
    return array("Q", (key_hash(*question.key) for question in questions))
