"""The files of the miniature benchmarks: their bytes, and checksums that do not depend on an image encoder.

A text file counts byte for byte. A picture counts by its pixels, also inside a table: how PNG compresses them differs
between versions of Pillow and zlib.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError

from ..world.cameras import View
from ..world.scenes import Scene, render
from .items import Build

CHECKSUMS = Path(__file__).resolve().parent / "checksums.txt"
CHECKSUMS_CROWDED = CHECKSUMS.with_name("checksums_crowded.txt")
DIGITS = 16
"""Hexadecimal digits of a SHA-256 that are kept: 64 bits, enough against accidents."""
HEADER = f"# {DIGITS} digits of SHA-256 of text or pixels, path; written by python -m playground.tiny.build --record\n"


class Unreadable(ValueError):
    """A file that is no picture or no table."""


def encode(scene: Scene | View) -> bytes:
    """The picture as PNG."""
    file = io.BytesIO()
    pixels = render(scene) if isinstance(scene, Scene) else scene.pixels()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def table(rows: list[dict[str, str | Scene]]) -> str:
    """Rows as tab-separated text under a header, pictures in base64."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(base64.b64encode(encode(c)).decode() if isinstance(c, Scene) else c for c in row.values())
    return file.getvalue()


def contents(builds: dict[str, Build]) -> dict[str, Callable[[], bytes]]:
    """What makes the bytes of every file, by path; `builds`: by the folder they go to."""
    makers: dict[str, Callable[[], bytes]] = {}
    for folder, build in builds.items():
        makers |= {f"{folder}/{path}": text.encode for path, text in build.files.items()}
        makers |= {f"{folder}/{path}": (lambda rows=rows: table(rows).encode()) for path, rows in build.tables.items()}
        makers |= {f"{folder}/{path}": (lambda scene=scene: encode(scene)) for path, scene in build.images.items()}
    return makers


def checksum(path: str, data: bytes) -> str:
    """Checksum of a file's content: pixels of a picture, cells of a table, bytes of any other text.

    Raises `Unreadable` if `data` is not what the name of the file promises.
    """
    suffix = PurePosixPath(path).suffix
    if suffix in (".json", ".jsonl", ".txt"):
        return _digest(data)
    if suffix == ".tsv":
        return _digest(json.dumps([_counted(row) for row in _rows(data)]).encode())
    return _pixels(data)  # SEED-Bench's pictures have no suffix


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def _pixels(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return _digest(f"{picture.width}x{picture.height} ".encode() + picture.convert("RGB").tobytes())
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise Unreadable("not a readable picture") from error


def _rows(data: bytes) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    try:
        return list(csv.DictReader(io.StringIO(data.decode(), newline=""), delimiter="\t", strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Unreadable("not a readable table") from error


def _counted(row: dict[str, str]) -> list:
    """Names and cells of a row; a picture by its pixels. Where the column holds a number, it names another row."""
    picture = row.get("image") or ""
    if picture.isdigit():
        return list(row.items())
    try:
        return list({**row, "image": _pixels(base64.b64decode(picture, validate=True))}.items())
    except ValueError as error:
        raise Unreadable("a row without a readable picture") from error


def read_checksums(path: Path = CHECKSUMS) -> dict[str, str]:
    """The committed checksums by path below the data folder."""
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines() if not line.startswith("#"))
    return {name: digits for digits, name in lines}


def write_checksums(found: Iterable[tuple[str, str]], path: Path = CHECKSUMS) -> None:
    """Write the checksums of (path, checksum), sorted by path."""
    path.write_text(HEADER + "".join(f"{digits} {name}\n" for name, digits in sorted(found)))
