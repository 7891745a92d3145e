"""What the builders of the miniature benchmarks share: items, what is to be written, and how scenes are drawn.

Scenes come from the evaluation half of the split (`Scene.held_out`), which training never draws.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..world import questions as q
from ..world.cameras import View
from ..world.crowded import sample_crowd
from ..world.scenes import Scene, sample_scene, sample_wide


@dataclass
class Item:
    """One line of a question file with what it is about; a question without a picture has no scene."""

    benchmark: str
    image: str | None
    line: dict
    scene: Scene | None
    question: q.Question

    def __post_init__(self) -> None:
        if self.scene is not None and not self.scene.fits(self.question.asked):
            raise AssertionError(f"{self.benchmark}, {self.image}: {self.question.question!r} needs too many patches")


@dataclass
class Build:
    """Everything that is to be written: text files, pictures and tables (rows of cells, scenes as base64) by path."""

    files: dict[str, str] = field(default_factory=dict)
    images: dict[str, Scene | View] = field(default_factory=dict)
    tables: dict[str, list[dict[str, str | Scene]]] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)

    def add(self, other: Build) -> None:
        self.files |= other.files
        self.images |= other.images
        self.tables |= other.tables
        self.items += other.items


@dataclass(frozen=True)
class Family:
    """A family of scenes: what draws one of the evaluation half, and how the names of its random streams begin."""

    draw: Callable[..., Scene]
    prefix: str = ""

    def stream(self, name: str, index: int) -> np.random.Generator:
        """The random stream of one evaluation picture."""
        return stream(self.prefix + name, index)


def stream(name: str, index: int) -> np.random.Generator:
    """The random stream of one evaluation picture (training streams start with another number)."""
    return np.random.default_rng([1701, zlib.crc32(name.encode()), index])


def eval_scene(rng: np.random.Generator, word_share: float = 0.6) -> Scene:
    """Five or six objects, from the evaluation half."""
    return sample_scene(rng, 5, 6, held_out=True, word_share=word_share)


def crowd_scene(rng: np.random.Generator, word_share: float = 0.6) -> Scene:
    """A crowded scene, from the evaluation half."""
    return sample_crowd(rng, held_out=True, word_share=word_share)


def wide_scene(rng: np.random.Generator, word_share: float = 0.6) -> Scene:
    """Five to eight objects on a large picture, from the evaluation half."""
    return sample_wide(rng, 5, 8, held_out=True, word_share=word_share)


PLAIN = Family(eval_scene)
CROWDED = Family(crowd_scene, "crowded-")
WIDE = Family(wide_scene, "wide-")


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
