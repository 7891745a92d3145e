"""Reading and writing the JSON and JSON-lines files of the evaluation, with errors a user can act on.

Reading is `llava.jsonfiles`, which the model's side shares; here are records with keys, and writing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava.eval.common.outputs import STREAMS, require_plain
from llava.jsonfiles import iter_jsonl as iter_jsonl
from llava.jsonfiles import iter_jsonl_at as iter_jsonl_at
from llava.jsonfiles import parse_line as parse_line
from llava.jsonfiles import read_json as read_json
from llava.jsonfiles import read_text as read_text
from llava.jsonfiles import require_file as require_file
from llava.jsonfiles import require_folder as require_folder
from llava.jsonfiles import require_keys as require_keys
from llava.schema import check
from llava.utils import UserError


def read_records(path: str | os.PathLike[str], what: str, shape: Any) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file, each of a `shape` of `llava.schema`; errors name file and line."""
    return [check(record, shape, f"{path}:{number}") for number, record in iter_jsonl(path, what)]


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole file or nothing: readers never see half of it. Creates the folder."""
    # Half a surrogate pair, which UTF-8 has no bytes for, becomes its escape: in JSON the same character again.
    write_lines_atomic(path, [text.encode("utf-8", "backslashreplace")])


def write_lines_atomic(path: str | os.PathLike[str], lines: Iterable[bytes]) -> None:
    """The same for content that comes piece by piece. `/dev/stdout`, `/dev/stderr`, `/dev/null` take it as it comes."""
    if os.fspath(path) in STREAMS:
        stream = {"/dev/stdout": sys.stdout, "/dev/stderr": sys.stderr}.get(os.fspath(path))
        for line in lines:
            if stream is not None:
                stream.write(line.decode("utf-8"))
        return
    with replacing(path) as file:
        file.writelines(lines)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of `path` if all goes well, and otherwise leaves it alone.

    A link stays a link, and what it leads to is replaced; the new file has the permissions and, where the system
    allows it, the owner of the old one. Creates the folder. The temporary file lies beside the target under a name that
    nobody can foresee, and is never opened through a link.

    Raises:
        UserError: the file cannot be written, or is a pipe, socket or device.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")
    written = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        old = os.stat(target) if target.exists() else None
        if old is not None:
            require_plain(old, f"cannot write {path}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(temporary, flags, 0o666)
        written = True
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if old is not None:
                _keep_owner(file.fileno(), old)
            # Without it a power cut can leave the new name with nothing behind it.
            os.fsync(file.fileno())
        os.replace(temporary, target)
        written = False
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if written:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _keep_owner(descriptor: int, old: os.stat_result) -> None:
    if not hasattr(os, "fchmod"):
        return
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(OSError):  # only the superuser gives files away
            os.fchown(descriptor, old.st_uid, old.st_gid)
    with contextlib.suppress(OSError):  # file systems without permissions
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
