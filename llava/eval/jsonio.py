"""Reading and writing JSON and JSON-lines files with errors a user can act on.

Knows files and lines; nothing of benchmarks or models.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava.utils import UserError


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """`path` as a `Path` if it is a readable file, otherwise a `UserError` that names `what` it should be."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{what} not found: {path}")
    if not path.is_file():
        raise UserError(f"{what} is not a file: {path}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{what} is not readable: {path}")
    return path


def require_folder(path: str | os.PathLike[str], what: str) -> Path:
    """`path` as a `Path` if it is a folder, otherwise a `UserError` that names `what` it should be."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{what} not found: {path}")
    if not path.is_dir():
        raise UserError(f"{what} is not a folder: {path}")
    return path


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a UTF-8 file; errors name the file."""
    path = require_file(path, what)
    return _decode(path.read_bytes(), str(path))


def _parse(text: str, where: str, what: str, is_line: bool) -> Any:
    """Parses JSON; `where` is the file, or file:line if `text` is one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = where if is_line else f"{where}:{error.lineno}"
        raise UserError(f"{where}: malformed JSON in {what} (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise UserError(f"{where}: malformed JSON in {what} (nested too deeply)") from None
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{where}: malformed JSON in {what} ({error})") from None


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The parsed content of a JSON file; errors name the file, line and column."""
    return _parse(read_text(path, what), str(path), what, is_line=False)


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
    line = _decode(raw, where).strip()
    if not line:
        return None
    record = _parse(line, where, what, is_line=True)
    if not isinstance(record, dict):
        raise UserError(f"{where}: {what} needs one JSON object per line, found {type(record).__name__}")
    return record


def require_keys(record: dict[str, Any], keys: Iterable[str], where: str) -> None:
    """Raises a `UserError` that names the first of `keys` missing from `record`."""
    for key in keys:
        if key not in record:
            raise UserError(f"{where}: key {key!r} is missing")


def read_records(path: str | os.PathLike[str], what: str, keys: Iterable[str]) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file, each with `keys`; errors name file and line."""
    keys = tuple(keys)
    records = []
    for number, record in iter_jsonl(path, what):
        require_keys(record, keys, f"{path}:{number}")
        records.append(record)
    return records


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole file or nothing: readers never see half of it. Creates the folder."""
    write_lines_atomic(path, [text.encode("utf-8")])


def write_lines_atomic(path: str | os.PathLike[str], lines: Iterable[bytes]) -> None:
    """The same for content that comes piece by piece."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(lines)
            # Without it a power cut can leave the new name with nothing behind it.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
