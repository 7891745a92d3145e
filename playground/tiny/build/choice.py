"""Builders of the miniature ScienceQA, MMBench (English and Chinese) and SEED-Bench: answers by letter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..world import chinese, formats
from ..world import questions as q
from ..world.scenes import Scene
from .items import PLAIN, Build, Family, Item, distinct, dumps_lines

LETTERS = "ABCD"
ROTATION = 1_000_000
KINDS = ("color", "word", "count", "relation", "shape", "exists", "where")
SQA_TOPICS = {  # subject, topic, category, skill
    "vocabulary": ("language science", "vocabulary", "Categories", "Identify words of a kind"),
    "opposites": ("language science", "vocabulary", "Opposites", "Choose the opposite"),
    "animals": ("natural science", "biology", "Animals", "Identify animals"),
    "numbers": ("natural science", "units-and-measurement", "Numbers", "Order numbers"),
    "picture": ("natural science", "physics", "Objects", "Compare objects of a picture"),
    "place": ("social science", "geography", "Maps", "Read positions on a map"),
}
MMBENCH_CATEGORIES = {  # category, l2-category
    "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "word": ("ocr", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "where": ("object_localization", "finegrained_perception (instance-level)"),
    "relation": ("spatial_relationship", "finegrained_perception (cross-instance)"),
    "exists": ("image_topic", "coarse_perception"),
}
SEED_TYPES = {
    "Scene Understanding": 1,
    "Instance Identity": 2,
    "Instance Location": 3,
    "Instance Attributes": 4,
    "Instances Counting": 5,
    "Spatial Relation": 6,
    "Instance Interaction": 7,
    "Visual Reasoning": 8,
    "Text Understanding": 9,
    "Action Recognition": 10,
    "Action Prediction": 11,
    "Procedure Understanding": 12,
}
SEED_KINDS = {
    "color": "Instance Attributes",
    "shape": "Instance Identity",
    "count": "Instances Counting",
    "relation": "Spatial Relation",
    "word": "Text Understanding",
}


def draw(
    choices: dict[str, Callable], kind: str, scene: Scene, rng: np.random.Generator, seen: set[str], options: int = 0
) -> q.Question:
    """A lettered question of a kind (or, where the scene has none, of another), with `options` options if given."""
    for name in (kind, *choices):

        def make() -> q.Question | None:
            question = choices[name](scene, rng)  # noqa: B023
            return question if question and options in (0, len(question.options)) else None

        asked = distinct(make, seen, tries=100)
        if asked is not None:
            return replace(asked, category=name)
    raise AssertionError("no lettered question fits this scene")


def build_scienceqa(pictures: int = 60, texts: int = 60, family: Family = PLAIN) -> Build:
    """Two questions per picture and some without one; a third of them has a context."""
    build, problems, lines = Build(), {}, []
    numbers = np.random.default_rng([1701, 4]).permutation(20_000)

    def add(asked: q.Question, scene: Scene | None, rng: np.random.Generator) -> None:
        identity = str(int(numbers[len(problems)]) + 1)
        if rng.random() < 1 / 3:
            asked = formats.hinted(asked, rng, "Context: ")
        topic = asked.category if scene is None else ("place" if asked.category in ("where", "relation") else "picture")
        subject, area, category, skill = SQA_TOPICS[topic]
        problems[identity] = {
            "question": asked.question,
            "choices": list(asked.options),
            "answer": LETTERS.index(asked.answer),
            "hint": asked.lead.removeprefix("Context: "),
            "image": "image.png" if scene else None,
            "task": "closed choice",
            "grade": f"grade{int(rng.integers(2, 9))}",
            "subject": subject,
            "topic": area,
            "category": category,
            "skill": skill,
            "lecture": "",
            "solution": f"The answer is {asked.target}.",
            "split": "test",
        }
        entry = {"id": identity}
        if scene:
            entry["image"] = f"{identity}/image.png"
            build.images[f"scienceqa/images/test/{identity}/image.png"] = scene
        entry["conversations"] = [
            {"from": "human", "value": ("<image>\n" if scene else "") + asked.body},
            {"from": "gpt", "value": f"The answer is {asked.answer}."},
        ]
        lines.append(entry)
        build.items.append(Item("scienceqa", entry.get("image"), entry, scene, asked))

    seen_texts: set[str] = set()
    for index in range(pictures):
        rng = family.stream("scienceqa", index)
        scene, seen = family.draw(rng), set()
        for place in range(2):
            add(draw(formats.CHOICES, KINDS[(2 * index + place) % len(KINDS)], scene, rng, seen), scene, rng)
        if index < texts:
            asked = formats.text_only(rng, held_out=True)
            while asked.body in seen_texts:
                asked = formats.text_only(rng, held_out=True)
            seen_texts.add(asked.body)
            add(asked, None, rng)
    build.files["scienceqa/problems.json"] = json.dumps(problems)
    build.files["scienceqa/pid_splits.json"] = json.dumps({"train": [], "val": [], "test": list(problems)})
    build.files["scienceqa/llava_test_CQM-A.json"] = json.dumps(lines)
    return build


def _mmbench(
    name: str,
    path: str,
    pictures: int,
    choices: dict[str, Callable],
    hinted: Callable[..., q.Question],
    family: Family,
) -> Build:
    """Two questions per picture; every question once more per further rotation of its options, as in the dev file.

    A rotated row names the row that holds the picture.
    """
    build, rows, rotated = Build(), [], []
    for index in range(pictures):
        rng = family.stream(name, index)
        scene, seen = family.draw(rng), set()
        for place in range(2):
            asked = draw(choices, KINDS[(2 * index + place) % len(KINDS)], scene, rng, seen)
            if rng.random() < 0.25:
                asked = hinted(asked, rng)
            category, level = MMBENCH_CATEGORIES[asked.category]
            identity = 241 + 3 * len(rows)
            options, right = list(asked.options), LETTERS.index(asked.answer)
            for turn in range(len(options)):
                shown = options[turn:] + options[:turn]
                letter = LETTERS[(right - turn) % len(options)]
                row = {
                    "index": str(identity + turn * ROTATION),
                    "question": asked.question,
                    "hint": asked.lead,
                    **{c: shown[k] if k < len(shown) else "" for k, c in enumerate(LETTERS)},
                    "answer": letter,
                    "category": category,
                    "image": scene if turn == 0 else str(identity),
                    "source": "scenes",
                    "l2-category": level,
                    "comment": "",
                    "split": "dev",
                }
                (rotated if turn else rows).append(row)
                turned = replace(asked, options=tuple(shown), answer=letter)
                line = {"question_id": int(row["index"]), "text": turned.body}
                build.items.append(Item(name, str(identity), line, scene, turned))
    build.tables[path] = rows + rotated
    return build


def build_mmbench(family: Family = PLAIN) -> Build:
    """80 questions on 40 pictures."""
    return _mmbench("mmbench", "mmbench/mmbench_dev_20230712.tsv", 40, formats.CHOICES, formats.hinted, family)


def build_mmbench_cn(family: Family = PLAIN) -> Build:
    """60 questions in Chinese on 30 pictures."""
    return _mmbench("mmbench_cn", "mmbench_cn/mmbench_dev_cn_20231003.tsv", 30, chinese.CHOICES, chinese.hinted, family)


def build_seed(pictures: int = 40, family: Family = PLAIN) -> Build:
    """Four questions with four options each per picture; the picture part only. As in the real one, image files have
    no suffix."""
    build, lines, entries = Build(), [], []
    choices = {kind: formats.CHOICES[kind] for kind in SEED_KINDS}
    for index in range(pictures):
        rng = family.stream("seed_bench", index)
        scene, seen = family.draw(rng), set()
        data_id = f"{1_000_000 + 37 * index}_{int(rng.integers(10**9)):09d}"
        for place in range(4):
            kind = tuple(SEED_KINDS)[(4 * index + place) % len(SEED_KINDS)]
            asked = draw(choices, kind, scene, rng, seen, options=4)
            group = SEED_KINDS[asked.category]
            identity = str(100_001 + len(entries))
            entries.append(
                {
                    "answer": asked.answer,
                    **{f"choice_{c.lower()}": text for c, text in zip(LETTERS, asked.options, strict=True)},
                    "data_id": data_id,
                    "data_type": "image",
                    "question": asked.question,
                    "question_id": identity,
                    "question_type_id": SEED_TYPES[group],
                }
            )
            line = {
                "question_id": identity,
                "image": f"SEED-Bench-image/{data_id}",
                "text": asked.text,
                "category": group,
            }
            lines.append(line)
            build.items.append(Item("seed_bench", line["image"], line, scene, asked))
        build.images[f"seed_bench/SEED-Bench-image/{data_id}"] = scene
    build.files["seed_bench/llava-seed-bench.jsonl"] = dumps_lines(lines)
    build.files["seed_bench/SEED-Bench.json"] = json.dumps({"question_type": SEED_TYPES, "questions": entries})
    return build
