"""Training batches of both kinds of scenes in one fixed shape: pictures, what their patches show, packed questions.

Half of the rows show the decoder all 576 patches. The others lack some, as after pruning: background only, or whole
objects too that no question of the row is about. Parts of objects are never taken away, so that nothing teaches one
patch to stand for a whole object.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from playground.tiny.train import guidance, packing, text
from playground.tiny.train.common import train_rng
from playground.tiny.train.extend import Generator, mixture, sample, without_picture
from playground.tiny.train.sight import draw_scene
from playground.tiny.train.vision import HEADS, patch_labels
from playground.tiny.world import chinese, formats, scenes
from playground.tiny.world import questions as q
from playground.tiny.world.questions import Question
from playground.tiny.world.scenes import GRID, Scene

TAIL = 304
"""Places for the questions of a row."""
CROWDED = 0.7
"""Share of crowded scenes."""
Batch = tuple[torch.Tensor, torch.Tensor, packing.Pack]


def room() -> tuple[int, int]:
    """Places before the questions (head and a whole picture) and for them."""
    return -(-(len(text.head_ids()) + GRID * GRID) // 8) * 8, TAIL


def crowd_mixture() -> list[tuple[Generator, float]]:
    """Generators and weights for crowded scenes: as `extend.mixture`, with more of the plain kinds."""
    old = {make: weight for name, (make, weight) in q.KINDS.items() if name != "choice"}
    old |= {q.digit_on: 1.5, q.where: 1.5, q.color_of: 1.5, q.shape_of: 1.5}
    lettered = dict(zip(formats.CHOICES.values(), (1.0, 1.0, 1.5, 1.2, 1.3, 0.6, 0.6), strict=True))
    translated = dict.fromkeys(chinese.CHOICES.values(), 1.0)
    whole = {make: 0.2 if name in ("sum", "describe") else 1.0 for name, (make, _) in formats.OPEN.items()}
    groups = (
        (60, old),
        (20, lettered),
        (7, translated),
        (7, {formats.vizwiz: 1.0, formats.unanswerable: 1.0}),
        (6, whole),
    )
    return [(make, share * w / sum(group.values())) for share, group in groups for make, w in group.items()]


def _about(scene: Scene, table: np.ndarray, questions: list[Question]) -> np.ndarray:
    """Patches of all objects that the questions name or ask about: bool [576]."""
    members = {i for question in questions for i in (*question.asked, *(i for _, i in question.names))}
    return packing.object_patches(scene, table, tuple(sorted(members)))


def choose(
    scene: Scene, table: np.ndarray, questions: list[Question], rng: np.random.Generator, few: bool
) -> np.ndarray:
    """Sorted patches of a row that lacks some; `few`: also objects that no question is about."""
    on = scene.parts().any((0, 1))
    if few:
        others = tuple(np.flatnonzero(rng.random(len(scene.things)) < rng.uniform(0.0, 0.7)).tolist())
        keep = _about(scene, table, questions) | packing.object_patches(scene, table, others)
    else:
        keep = on.copy()
    rest = np.flatnonzero(~on)
    most = 60 if few else len(rest) + 1
    keep[rng.permutation(rest)[: int(rng.integers(0, most))]] = True
    return np.flatnonzero(keep)


def draw_batch(rng: np.random.Generator, size: int, kinds: tuple[list, list], crowded: float = CROWDED) -> Batch:
    """Pictures uint8 [B, 192, 192, 3], labels of patches int16 [B, heads, 576] in the order of HEADS, packed questions.

    kinds: mixtures of questions for scenes of large objects and for crowds. One row in 40 has no picture.
    """
    pictures, labels, picked, tables, patches, questions, marks = [], [], [], [], [], [], []
    while len(picked) < size:
        scene = draw_scene(rng, crowded)
        table, marked = packing.attributes(scene), patch_labels(scene)
        kind = rng.random()  # of row: whole pictures, without some background, without some objects
        blank = rng.random() < 1 / 40
        budget = TAIL if kind < 0.75 else int(rng.integers(60, 160))
        own = without_picture(rng, 3) if blank else sample(scene, rng, budget, kinds[scene.crowded])
        if not own:
            continue
        if blank:
            chosen = np.arange(0)
        else:
            chosen = np.arange(GRID**2) if kind < 0.5 else choose(scene, table, own, rng, kind >= 0.75)
        pictures.append(scenes.pad_square(scenes.render(scene)))
        labels.append(np.stack([marked[name].reshape(-1) for name in HEADS]))
        picked.append(scene)
        tables.append(table)
        patches.append(chosen)
        questions.append(own)
        nothing = np.zeros(GRID**2, dtype=bool)
        marks.append([nothing if blank else packing.asked_patches(scene, table, question) for question in own])
    data = packing.pack(patches, questions, rng.random(size) < 0.5, marks, room=room())
    data = guidance.guide(data, patches, picked, tables, questions)
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(labels).astype(np.int16)), data


class Feed(IterableDataset):
    """Endless batches; every worker has a random stream of its own, and every `run` others."""

    def __init__(self, size: int, run: int, crowded: float = CROWDED) -> None:
        self.size, self.run, self.crowded = size, run, crowded

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        info = get_worker_info()
        rng = train_rng("deep", 1000 * self.run + (info.id if info else 0))
        kinds = mixture(), crowd_mixture()
        while True:
            yield draw_batch(rng, self.size, kinds, self.crowded)


def feed(size: int, run: int, workers: int, crowded: float = CROWDED) -> Iterator[Batch]:
    """Batches from `workers` processes (0: from this one)."""
    torch.multiprocessing.set_sharing_strategy("file_system")  # a batch has many tensors, a process few open files
    ahead = 3 if workers else None
    return iter(DataLoader(Feed(size, run, crowded), batch_size=None, num_workers=workers, prefetch_factor=ahead))
