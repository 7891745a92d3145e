"""Builders of the miniature TextVQA, POPE, GQA and MME: the benchmarks of the arena, short answers only."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from ..world import questions as q
from ..world.scenes import WORDS, Scene
from .items import PLAIN, Build, Family, Item, distinct, dumps_lines

YES_NO = "Please answer yes or no."
GQA_KINDS: dict[str, tuple[Callable, str, str, str]] = {  # generator, structural, semantic, detailed
    "color": (q.color_of, "query", "attr", "categoryAttr"),
    "shape": (q.shape_of, "query", "cat", "categoryThat"),
    "choose_color": (q.choose_color, "choose", "attr", "chooseAttr"),
    "verify_color": (q.verify_color, "verify", "attr", "verifyAttr"),
    "verify_shape": (q.verify_shape, "verify", "cat", "verifyCat"),
    "relation": (q.relation, "verify", "rel", "verifyRel"),
    "where": (q.where, "choose", "global", "positionChoose"),
    "exists": (q.exists, "verify", "obj", "exist"),
}
GQA_ORDER = (
    "color",
    "shape",
    "relation",
    "color",
    "exists",
    "shape",
    "choose_color",
    "verify_color",
    "relation",
    "where",
    "color",
    "verify_shape",
)


def build_textvqa(pictures: int = 130, family: Family = PLAIN) -> Build:
    """Which word is on which object; ten answers per question, of which at least eight agree."""
    build, lines, data = Build(), [], []
    for index in range(pictures):
        rng = family.stream("textvqa", index)
        scene = family.draw(rng, word_share=0.9)
        name = f"{int(rng.integers(1 << 62)):016x}"
        seen: set[str] = set()
        for _ in range(4):
            asked = distinct(lambda: q.word_on(scene, rng, ocr=True), seen)  # noqa: B023
            if asked is None:
                continue
            answers = [asked.answer.lower()] * 10
            for place in rng.permutation(10)[: int(rng.integers(3))]:
                wrong = WORDS[int(rng.integers(len(WORDS)))].lower()
                answers[place] = ("the " + asked.answer.lower(), wrong, "unanswerable")[int(rng.integers(3))]
            line = {"question_id": name, "image": f"{name}.png", "text": asked.text, "category": "default"}
            lines.append(line)
            data.append(
                {
                    "question": asked.question.lower(),
                    "image_id": name,
                    "answers": answers,
                    "question_id": 34602 + len(data),
                }
            )
            build.items.append(Item("textvqa", line["image"], line, scene, asked))
        build.images[f"textvqa/train_images/{name}.png"] = scene
    build.files["textvqa/llava_textvqa_val_v051_ocr.jsonl"] = dumps_lines(lines)
    build.files["textvqa/TextVQA_0.5.1_val.json"] = json.dumps(
        {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    )
    return build


def recombinations(scene: Scene) -> int:
    """How many absent objects have a color and a shape that are both in the scene."""
    colors, shapes = {t.color for t in scene.things}, {t.shape for t in scene.things}
    return len(colors) * len(shapes) - len({(t.color, t.shape) for t in scene.things})


def build_pope(pictures: int = 34, family: Family = PLAIN) -> Build:
    """Existence: three present and three absent objects per picture and category."""
    build, lines, scenes = Build(), [], []
    for index in range(pictures):
        rng = family.stream("pope", index)
        scene = family.draw(rng)
        while recombinations(scene) < 3:
            scene = family.draw(rng)
        scenes.append((f"COCO_val2014_{int(rng.integers(10**6)):012d}.png", scene, rng))
    for number, category in enumerate(("adversarial", "random", "popular")):
        labels = []
        for name, scene, rng in scenes:
            build.images[f"pope/val2014/{name}"] = scene
            seen: set[str] = set()
            for place in range(6):
                want = place % 2 == 0
                asked = distinct(lambda: q.exists(scene, rng, category, want), seen)  # noqa: B023
                labels.append(
                    {
                        "question_id": len(labels) + 1,
                        "image": name,
                        "text": asked.question,
                        "label": asked.answer.lower(),
                    }
                )
                line = {
                    "question_id": 10_000_000 * number + len(labels),
                    "image": name,
                    "text": asked.text,
                    "category": category,
                }
                lines.append(line)
                build.items.append(Item("pope", name, line, scene, asked))
        build.files[f"pope/coco/coco_pope_{category}.json"] = dumps_lines(labels)
    build.files["pope/llava_pope_test.jsonl"] = dumps_lines(lines)
    return build


def gqa_entry(identity: str, image: str, asked: q.Question, scene: Scene) -> dict:
    """An entry of `testdev_balanced_questions.json`."""
    _, structural, semantic, detailed = GQA_KINDS[asked.kind]
    answer = asked.answer.lower()
    names = [q.full_name(scene.things[i]) for i in asked.asked]
    steps = [
        {"operation": "select", "dependencies": [], "argument": f"{name} ({i})"}
        for name, i in zip(names, asked.asked, strict=True)
    ]
    last = {
        "operation": f"{structural}{'' if structural == 'query' else ' ' + semantic}",
        "dependencies": list(range(len(steps))),
        "argument": asked.kind,
    }
    return {
        "semantic": [*steps, last],
        "entailed": [],
        "equivalent": [identity],
        "question": asked.question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": asked.kind if structural == "query" else None, "local": f"{len(names)}-{asked.kind}"},
        "answer": answer,
        "semanticStr": "->".join(f"{s['operation']}: {s['argument']}" for s in [*steps, last]),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
        "fullAnswer": f"{asked.answer}." if structural == "verify" else f"It is {answer}.",
    }


def build_gqa(pictures: int = 90, family: Family = PLAIN) -> Build:
    """Six questions per picture: attributes, categories, relations, places, existence; open and binary."""
    build, lines, entries = Build(), [], {}
    for index in range(pictures):
        rng = family.stream("gqa", index)
        scene, name, seen = family.draw(rng), f"n{100000 + 7 * index}", set()
        for place in range(6):
            kinds = [GQA_ORDER[(6 * index + place) % len(GQA_ORDER)], "relation"]
            for kind in kinds:
                asked = distinct(lambda: GQA_KINDS[kind][0](scene, rng), seen)  # noqa: B023
                if asked is not None:
                    break
            identity = f"20{index:04d}{place:03d}"
            entries[identity] = gqa_entry(identity, name, asked, scene)
            line = {"question_id": identity, "image": f"{name}.png", "text": asked.text, "category": "default"}
            lines.append(line)
            build.items.append(Item("gqa", line["image"], line, scene, asked))
        build.images[f"gqa/data/images/{name}.png"] = scene
    build.files["gqa/llava_gqa_testdev_balanced.jsonl"] = dumps_lines(lines)
    build.files["gqa/data/testdev_balanced_questions.json"] = json.dumps(entries)
    return build


def opposite(scene: Scene, asked: q.Question, rng: np.random.Generator) -> str:
    """The same relation with the sides exchanged."""
    pairs = {
        "to the left of": "to the right of",
        "to the right of": "to the left of",
        "above": "below",
        "below": "above",
    }
    return asked.question.replace(f" {asked.category} ", f" {pairs[asked.category]} ")


def mme_pair(category: str, scene: Scene, rng: np.random.Generator) -> tuple[q.Question, q.Question] | None:
    """A question with answer Yes and one with answer No about the same picture."""
    if category == "existence":
        pair = q.exists(scene, rng, want=True), q.exists(scene, rng, "adversarial", want=False)
        return pair if all(pair) else None
    if category == "position":
        yes = q.relation(scene, rng, want=True)
        return (yes, q.replace(yes, question=opposite(scene, yes, rng), answer="No")) if yes else None
    if category == "count":
        target = q.count_target(scene, rng)
        pair = q.verify_count(scene, rng, True, target), q.verify_count(scene, rng, False, target)
        return pair if all(pair) else None
    make = {"color": q.verify_color, "OCR": q.verify_word}[category]
    yes = make(scene, rng, want=True)
    no = None
    while yes and (no is None or no.asked != yes.asked):  # the No question asks about the same object
        no = make(scene, rng, want=False)
    return (yes, no) if yes else None


def build_mme(pictures: int = 52, family: Family = PLAIN) -> Build:
    """Five perception subtasks; two questions per picture, one Yes and one No."""
    build, lines = Build(), []
    for category in ("existence", "count", "position", "color", "OCR"):
        for index in range(pictures):
            rng = family.stream("mme" + category, index)
            pair = None
            while pair is None:
                scene = family.draw(rng)
                pair = mme_pair(category, scene, rng)
            name = f"{index + 1:04d}"
            text = ""
            for asked in pair:
                line = {
                    "question_id": f"{category}/{name}.png",
                    "image": f"{category}/{name}.png",
                    "text": asked.text,
                    "category": category,
                }
                lines.append(line)
                text += f"{asked.question} {YES_NO}\t{asked.answer}\n"
                build.items.append(Item("mme", line["image"], line, scene, asked))
            folder = f"MME/MME_Benchmark_release_version/{category}"
            build.files[f"{folder}/{name}.txt"] = text
            build.images[f"{folder}/{name}.png"] = scene
    build.files["MME/llava_mme.jsonl"] = dumps_lines(lines)
    return build
