"""Reading text, JSON and JSON-lines files that nobody has checked, with errors that name file, line and what to do.

Whatever the bytes are, reading ends in a value or in a `UserError`: no text, other encodings, malformed or deeply
nested JSON, numbers of hundreds of digits. What a value must look like is said with the shapes of `llava.schema`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava.utils import UserError, kind_of

MAX_DEPTH = 100
"""Lists and objects inside each other: what is read must be comparable and writable, which both recurse."""
MAX_DIGITS = 300
"""Of a whole number: what is read can become a float."""


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """`path` as a `Path` if it is a readable file, otherwise a `UserError` that names `what` it should be."""
    path = _existing(path, what)
    if not path.is_file():
        raise UserError(f"{what} is not a file: {path}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{what} is not readable: {path}")
    return path


def require_folder(path: str | os.PathLike[str], what: str) -> Path:
    """`path` as a `Path` if it is a folder, otherwise a `UserError` that names `what` it should be."""
    path = _existing(path, what)
    if not path.is_dir():
        raise UserError(f"{what} is not a folder: {path}")
    return path


def _existing(path: str | os.PathLike[str], what: str) -> Path:
    try:
        exists = os.path.lexists(path) and os.stat(path) is not None
    except OSError as error:  # a name that is too long, a loop of links, a folder that may not be entered
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(f"{what} cannot be read: {path} ({error.strerror})") from None
        exists = False
    except ValueError:  # a NUL character, or half a surrogate pair
        raise UserError(f"{what} cannot be the name of a file: {str(path)!r}") from None
    if not exists:
        raise UserError(f"{what} not found: {path}")
    return Path(path)


def decode(data: bytes, where: str) -> str:
    """UTF-8 text, with or without a byte order mark; `UserError` begins with `where`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a UTF-8 file; errors name the file."""
    path = require_file(path, what)
    return decode(path.read_bytes(), str(path))


# --- JSON --------------------------------------------------------------------------------------------------------


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice[:40]!r} occurs twice in one object")
    return result


_DECODER = json.JSONDecoder(parse_int=_whole_number)
_STRICT_DECODER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_without_repeats)


def _parse(text: str, where: str, what: str, is_line: bool, unique_keys: bool = False) -> Any:
    """Parses JSON; `where` is the file, or file:line if `text` is one line of it."""
    try:
        value = (_STRICT_DECODER if unique_keys else _DECODER).decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            raise RecursionError
        return value
    except json.JSONDecodeError as error:
        where = where if is_line else f"{where}:{error.lineno}"
        hint = ""
        if error.msg == "Extra data" and not is_line:
            hint = "; is it JSON lines, where one JSON value is expected?"
        elif is_line and text in ("[", "{"):
            hint = "; is it one JSON value, where an object per line is expected?"
        raise UserError(f"{where}: malformed JSON in {what} (column {error.colno}: {error.msg}){hint}") from None
    except RecursionError:
        raise UserError(f"{where}: malformed JSON in {what} (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{where}: malformed JSON in {what} ({error})") from None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in inner for item in part if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def read_json(path: str | os.PathLike[str], what: str, unique_keys: bool = False) -> Any:
    """The parsed content of a JSON file; errors name the file, line and column.

    unique_keys: an object that has a key twice is refused, for files whose keys are ids; else the last one counts.
    """
    return _parse(read_text(path, what), str(path), what, is_line=False, unique_keys=unique_keys)


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The same for a file that must hold one JSON object."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} must be a JSON object, found {kind_of(value)}")
    return value


def iter_jsonl(
    path: str | os.PathLike[str], what: str, limit_bytes: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (1-based line number, object) of a JSON-lines file; blank lines are skipped, CRLF is accepted.

    Every other line must be a JSON object; a `UserError` names file and line otherwise. Lines that start at
    byte `limit_bytes` or later are not read.
    """
    for _, number, record in iter_jsonl_at(path, what, limit_bytes):
        yield number, record


def iter_jsonl_at(
    path: str | os.PathLike[str], what: str, limit_bytes: int | None = None
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The same with the byte at which the line starts in front: (start, number, object)."""
    path = require_file(path, what)
    consumed = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if limit_bytes is not None and consumed >= limit_bytes:
                return
            start, consumed = consumed, consumed + len(raw)
            record = parse_line(raw, f"{path}:{number}", what)
            if record is not None:
                yield start, number, record


def parse_line(raw: bytes, where: str, what: str) -> dict[str, Any] | None:
    """The object of one line; None if the line is blank. `UserError` begins with `where`."""
    line = decode(raw, where).strip()
    if not line:
        return None
    record = _parse(line, where, what, is_line=True)
    if not isinstance(record, dict):
        raise UserError(f"{where}: {what} needs one JSON object per line, found {kind_of(record)}")
    return record


def require_keys(record: dict[str, Any], keys: Iterable[str], where: str) -> None:
    """Raises a `UserError` that names the first of `keys` missing from `record`."""
    for key in keys:
        if key not in record:
            raise UserError(f"{where}: key {key!r} is missing")
