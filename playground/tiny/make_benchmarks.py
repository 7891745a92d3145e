"""Miniature TextVQA, POPE, GQA and MME in the file formats of the real ones.

    python -m playground.tiny.make_benchmarks            # writes playground/tiny/data/eval, the same every time
    python -m playground.tiny.make_benchmarks --check    # compares what is there with what would be written

Scenes come from the evaluation half of the split (`Scene.held_out`), which training never draws. JSON files are
compared byte for byte, pictures pixel for pixel (the compressed bytes depend on the zlib at hand).
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from llava.utils import UserError, cli_main
from playground.tiny import questions as q
from playground.tiny.scenes import WORDS, Scene, render, sample_scene

DATA = Path(__file__).resolve().parent / "data" / "eval"
BENCHMARKS = ("textvqa", "pope", "gqa", "mme")
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


@dataclass
class Item:
    """One line of a question file with what it is about."""

    benchmark: str
    image: str
    line: dict
    scene: Scene
    question: q.Question


@dataclass
class Build:
    """Everything that is to be written: JSON and text files by path, pictures by path, and the items."""

    files: dict[str, str] = field(default_factory=dict)
    images: dict[str, Scene] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)


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


def build_textvqa(pictures: int = 130) -> Build:
    """Which word is on which object; ten answers per question, of which at least eight agree."""
    build, lines, data = Build(), [], []
    for index in range(pictures):
        rng = stream("textvqa", index)
        scene = eval_scene(rng, word_share=0.9)
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
    return len(colors) * len(shapes) - len(scene.things)


def build_pope(pictures: int = 34) -> Build:
    """Existence: three present and three absent objects per picture and category."""
    build, lines, scenes = Build(), [], []
    for index in range(pictures):
        rng = stream("pope", index)
        scene = eval_scene(rng)
        while recombinations(scene) < 3:
            scene = eval_scene(rng)
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


def build_gqa(pictures: int = 90) -> Build:
    """Six questions per picture: attributes, categories, relations, places, existence; open and binary."""
    build, lines, entries = Build(), [], {}
    for index in range(pictures):
        rng = stream("gqa", index)
        scene, name, seen = eval_scene(rng), f"n{100000 + 7 * index}", set()
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


def build_mme(pictures: int = 52) -> Build:
    """Five perception subtasks; two questions per picture, one Yes and one No."""
    build, lines = Build(), []
    for category in ("existence", "count", "position", "color", "OCR"):
        for index in range(pictures):
            rng = stream("mme" + category, index)
            pair = None
            while pair is None:
                scene = eval_scene(rng)
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


def build_all(names: tuple[str, ...] = BENCHMARKS) -> Build:
    """All benchmarks in one."""
    total = Build()
    for name in names:
        part = {"textvqa": build_textvqa, "pope": build_pope, "gqa": build_gqa, "mme": build_mme}[name]()
        total.files |= part.files
        total.images |= part.images
        total.items += part.items
    return total


def write(build: Build, root: Path) -> None:
    """Write all files below `root`; pictures as PNG with a palette, without loss."""
    for path, content in build.files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    for path, scene in build.images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = render(scene)
        tones, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
        picture = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), mode="P")
        picture.putpalette(tones.astype(np.uint8).tobytes())
        picture.save(root / path, optimize=True)


def differences(build: Build, root: Path) -> list[str]:
    """Paths that are missing or differ: JSON and text byte for byte, pictures pixel for pixel."""
    wrong = [
        path
        for path, content in build.files.items()
        if not (root / path).is_file() or (root / path).read_text() != content
    ]
    for path, scene in build.images.items():
        if not (root / path).is_file():
            wrong.append(path)
            continue
        with Image.open(root / path) as picture:
            if not np.array_equal(np.asarray(picture.convert("RGB")), render(scene)):
                wrong.append(path)
    return wrong


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=DATA, help="folder to write or check (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="compare instead of writing; exit status 2 on a difference"
    )
    args = parser.parse_args()
    build = build_all()
    if not args.check:
        write(build, args.root)
    wrong = differences(build, args.root)
    if wrong:
        raise UserError(f"{args.root}: {len(wrong)} files differ from what the generator makes, first: {wrong[0]}")
    print(f"{len(build.items)} questions, {len(build.images)} pictures, {len(build.files)} other files in {args.root}")


if __name__ == "__main__":
    main()
