"""Builders of the miniature MM-Vet and LLaVA-Bench (in the wild): answers in sentences, graded by someone else.

MM-Vet's ground truth says what an answer must hold: alternatives with `<OR>`, parts with `<AND>`
(see `grade_mmvet.py`).
"""

from __future__ import annotations

import json

import numpy as np

from ..world import formats
from ..world import questions as q
from ..world.scenes import Scene
from .items import PLAIN, Build, Family, Item, distinct, dumps_lines

ORDER = ("color", "word", "relation", "word_color", "count", "sum", "animal", "shape", "color", "describe")
BENCH_KINDS = {"conv": ("word_color", "relation", "count"), "detail": ("describe",), "complex": ("sum", "animal")}


def wanted(kind: str, scene: Scene, asked: q.Question) -> str:
    """What an answer must hold, in MM-Vet's notation."""
    if kind == "describe":
        return "<AND>".join(q.full_name(scene.things[i]) for i in asked.asked)
    if kind in ("count", "sum"):
        return f"{asked.target}<OR>{len(asked.asked)}"
    return asked.target


def draw(kinds: tuple[str, ...], scene: Scene, rng: np.random.Generator, seen: set[str]) -> tuple[str, q.Question]:
    """A question of the first kind that this scene allows."""
    for kind in kinds:
        asked = distinct(lambda: formats.OPEN[kind][0](scene, rng), seen)  # noqa: B023
        if asked is not None:
            return kind, asked
    raise AssertionError("no open question fits this scene")


def build_mmvet(pictures: int = 60, family: Family = PLAIN) -> Build:
    """Two questions per picture, every question with a picture file of its own."""
    build, lines, truth = Build(), [], {}
    for index in range(pictures):
        rng = family.stream("mm-vet", index)
        scene, seen = family.draw(rng), set()
        for place in range(2):
            kind, asked = draw((ORDER[(2 * index + place) % len(ORDER)], "color", "word"), scene, rng, seen)
            number = len(lines)
            name = f"v1_{number}.png"
            line = {"question_id": number, "image": name, "text": asked.text, "category": "open"}
            lines.append(line)
            truth[f"v1_{number}"] = {
                "imagename": name,
                "question": asked.question,
                "answer": wanted(kind, scene, asked),
                "imagesource": "scenes",
                "capability": list(formats.OPEN[kind][1]),
            }
            build.items.append(Item("mm-vet", name, line, scene, asked))
            build.images[f"mm-vet/images/{name}"] = scene
    build.files["mm-vet/llava-mm-vet.jsonl"] = dumps_lines(lines)
    build.files["mm-vet/mm-vet.json"] = json.dumps(truth, indent=4)
    return build


def build_llava_bench(pictures: int = 12, family: Family = PLAIN) -> Build:
    """A short, a describing and a reasoning question per picture, with captions and reference answers."""
    build, lines, context, reference = Build(), [], [], []
    folder = "llava-bench-in-the-wild"
    for index in range(pictures):
        rng = family.stream("llava-bench", index)
        scene, seen = family.draw(rng), set()
        name = f"{index + 1:03d}.png"
        caption = formats.caption(scene, rng)
        context.append({"id": f"{index + 1:03d}", "image": name, "caption": caption})
        for category, kinds in BENCH_KINDS.items():
            start = index % len(kinds)
            order = (*kinds[start:], *kinds[:start], "color", "shape", "word")
            _, asked = draw(order, scene, rng, seen)
            line = {"question_id": len(lines), "image": name, "text": asked.text, "category": category}
            lines.append(line)
            reference.append(
                {
                    "question_id": line["question_id"],
                    "prompt": asked.text,
                    "answer_id": f"reference-{line['question_id']}",
                    "model_id": "reference",
                    "metadata": {},
                    "text": asked.answer,
                }
            )
            build.items.append(Item("llava-bench", name, line, scene, asked))
        build.images[f"{folder}/images/{name}"] = scene
    build.files[f"{folder}/questions.jsonl"] = dumps_lines(lines)
    build.files[f"{folder}/context.jsonl"] = dumps_lines(context)
    build.files[f"{folder}/answers_gpt4.jsonl"] = dumps_lines(reference)
    return build
