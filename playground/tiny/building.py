"""What the builders of the miniature benchmarks share: items, what is to be written, writing and comparing it.

Scenes come from the evaluation half of the split (`Scene.held_out`), which training never draws. Text files are
compared byte for byte, pictures pixel for pixel (the compressed bytes depend on the zlib at hand), also inside tables.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from playground.tiny import questions as q
from playground.tiny.scenes import Scene, render, sample_scene


@dataclass
class Item:
    """One line of a question file with what it is about; a question without a picture has no scene."""

    benchmark: str
    image: str | None
    line: dict
    scene: Scene | None
    question: q.Question


@dataclass
class Build:
    """Everything that is to be written: text files, pictures and tables (rows of cells, scenes as base64) by path."""

    files: dict[str, str] = field(default_factory=dict)
    images: dict[str, Scene] = field(default_factory=dict)
    tables: dict[str, list[dict[str, str | Scene]]] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)

    def add(self, other: Build) -> None:
        self.files |= other.files
        self.images |= other.images
        self.tables |= other.tables
        self.items += other.items


def stream(name: str, index: int) -> np.random.Generator:
    """The random stream of one evaluation picture (training streams start with another number)."""
    return np.random.default_rng([1701, zlib.crc32(name.encode()), index])


def eval_scene(rng: np.random.Generator, word_share: float = 0.6) -> Scene:
    """Five or six objects, from the evaluation half."""
    return sample_scene(rng, 5, 6, held_out=True, word_share=word_share)


def distinct(make: Callable[[], q.Question | None], seen: set[str], tries: int = 60) -> q.Question | None:
    """A question that was not asked about this picture yet."""
    for _ in range(tries):
        question = make()
        if question is not None and question.question not in seen:
            seen.add(question.question)
            return question
    return None


def dumps_lines(lines: list[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def encode(scene: Scene) -> bytes:
    """The picture as PNG with a palette, without loss."""
    pixels = render(scene)
    tones, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    picture = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), mode="P")
    picture.putpalette(tones.astype(np.uint8).tobytes())
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def shows(file: object, scene: Scene) -> bool:
    """Whether an image file (path or bytes) holds exactly the picture of a scene."""
    with Image.open(file) as picture:
        return np.array_equal(np.asarray(picture.convert("RGB")), render(scene))


def write(build: Build, root: Path) -> None:
    """Write all files below `root`."""
    for path, content in build.files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")
    for path, scene in build.images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encode(scene))
    for path, rows in build.tables.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with open(root / path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(rows[0])
            for row in rows:
                cells = (base64.b64encode(encode(c)).decode() if isinstance(c, Scene) else c for c in row.values())
                writer.writerow(cells)


def read_table(path: Path) -> list[list[str]]:
    """Header and rows."""
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def same_cell(written: str, wanted: str | Scene) -> bool:
    if isinstance(wanted, Scene):
        return shows(io.BytesIO(base64.b64decode(written)), wanted)
    return written == wanted


def differences(build: Build, root: Path) -> list[str]:
    """Paths that are missing or differ."""
    wrong = [
        path
        for path, content in build.files.items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != content
    ]
    wrong += [path for path, s in build.images.items() if not (root / path).is_file() or not shows(root / path, s)]
    for path, rows in build.tables.items():
        there = read_table(root / path) if (root / path).is_file() else [[]]
        same = there[0] == list(rows[0]) and len(there) == len(rows) + 1
        for cells, row in zip(there[1:], rows, strict=False):
            same = same and len(cells) == len(row) and all(map(same_cell, cells, row.values()))
        if not same:
            wrong.append(path)
    return wrong
