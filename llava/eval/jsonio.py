"""Reading and writing the JSON and JSON-lines files of the evaluation, with errors a user can act on.

Reading is `llava.jsonfiles`, which the model's side shares; here are records with keys, and writing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.jsonfiles import iter_jsonl as iter_jsonl
from llava.jsonfiles import iter_jsonl_at as iter_jsonl_at
from llava.jsonfiles import parse_line as parse_line
from llava.jsonfiles import read_json as read_json
from llava.jsonfiles import read_text as read_text
from llava.jsonfiles import require_file as require_file
from llava.jsonfiles import require_folder as require_folder
from llava.schema import check
from llava.utils import UserError


def require_keys(record: dict[str, Any], keys: Iterable[str], where: str) -> None:
    """Raises a `UserError` that names the first of `keys` missing from `record`."""
    for key in keys:
        if key not in record:
            raise UserError(f"{where}: key {key!r} is missing")


def read_records(path: str | os.PathLike[str], what: str, shape: Any) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file, each of a `shape` of `llava.schema`; errors name file and line."""
    return [check(record, shape, f"{path}:{number}") for number, record in iter_jsonl(path, what)]


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole file or nothing: readers never see half of it. Creates the folder."""
    # Half a surrogate pair, which UTF-8 has no bytes for, becomes its escape: in JSON the same character again.
    write_lines_atomic(path, [text.encode("utf-8", "backslashreplace")])


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
