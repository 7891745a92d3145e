"""The miniature benchmarks: regenerated bit for bit, in the formats of the real ones, away from the training stream."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from playground.tiny.build import benchmarks as mb
from playground.tiny.build.items import Build
from playground.tiny.train.common import train_rng
from playground.tiny.world.questions import KINDS, sample_questions
from playground.tiny.world.scenes import (
    COLORS,
    GRID,
    JITTER,
    ON_OBJECT,
    PATCH,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    center_patch,
    coverage,
    pad_square,
    render,
    sample_scene,
    shape_mask,
)

REAL = Path(__file__).parents[3] / "shared" / "benchmarks" / "playground" / "data" / "eval"
QUESTION_FILES = (
    "textvqa/llava_textvqa_val_v051_ocr.jsonl",
    "pope/llava_pope_test.jsonl",
    "gqa/llava_gqa_testdev_balanced.jsonl",
    "MME/llava_mme.jsonl",
)


@pytest.fixture(scope="module")
def build() -> Build:
    return mb.build_all()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rendering_does_not_depend_on_the_machine() -> None:
    """Checksums of pixels, recorded once: integer arithmetic only."""
    scene = Scene((Thing(0, 3, 7, 0, 1, 4, -8, 16, 5), Thing(4, 2, -1, 2, 2, -4, 0, 15, -3)), 3, 4, 12345)
    assert zlib.crc32(render(scene).tobytes()) == CHECKSUMS["render"]
    assert zlib.crc32(pad_square(render(scene)).tobytes()) == CHECKSUMS["padded"]
    drawn = sample_scene(np.random.default_rng(5), 5, 6, held_out=True)
    assert zlib.crc32(repr(drawn).encode()) == CHECKSUMS["sampled"]


CHECKSUMS = {"render": 1682420716, "padded": 3232807417, "sampled": 3734502579}


def test_enough_questions_and_less_than_15_megabytes(build: Build) -> None:
    for name in mb.BUILDERS:
        least = 500 if name in mb.ARENA else 30 if name == "llava-bench" else 100
        assert sum(item.benchmark == name for item in build.items) >= least, name
    assert sum(p.stat().st_size for p in mb.DATA.rglob("*") if p.is_file()) < 15e6


@pytest.mark.parametrize("path", QUESTION_FILES)
def test_question_lines_have_the_fields_of_the_real_files(path: str) -> None:
    ours = lines(mb.DATA / path)
    assert {tuple(line) for line in ours} == {("question_id", "image", "text", "category")}
    if path.startswith("gqa"):
        return  # no real file to compare with
    if not REAL.is_dir():
        pytest.skip("the real benchmark files are not beside the repository")
    real = lines(REAL / path)
    assert list(real[0]) == list(ours[0])
    assert {type(line["question_id"]) for line in real} == {type(line["question_id"]) for line in ours}
    assert real[0]["text"].split("\n")[-1] == ours[0]["text"].split("\n")[-1]
    assert len(real[0]["text"].split("\n")) == len(ours[0]["text"].split("\n"))


def test_annotations_have_the_fields_of_the_real_files() -> None:
    vqa = json.loads((mb.DATA / "textvqa/TextVQA_0.5.1_val.json").read_text())
    gqa = json.loads((mb.DATA / "gqa/data/testdev_balanced_questions.json").read_text())
    entry = next(iter(gqa.values()))
    assert {
        "question",
        "answer",
        "imageId",
        "isBalanced",
        "types",
        "semantic",
        "groups",
        "entailed",
        "equivalent",
    } <= set(entry)
    assert set(entry["types"]) == {"structural", "semantic", "detailed"}
    if not REAL.is_dir():
        pytest.skip("the real benchmark files are not beside the repository")
    real = json.loads((REAL / "textvqa/TextVQA_0.5.1_val.json").read_text())
    assert {k for k in real if k != "data"} == {k for k in vqa if k != "data"}
    assert set(real["data"][0]) == set(vqa["data"][0])
    assert all(len(e["answers"]) == 10 for e in vqa["data"])
    for category in ("adversarial", "random", "popular"):
        path = f"pope/coco/coco_pope_{category}.json"
        assert list(lines(REAL / path)[0]) == list(lines(mb.DATA / path)[0])


def test_mme_has_one_yes_and_one_no_per_picture() -> None:
    for path in sorted((mb.DATA / "MME/MME_Benchmark_release_version").rglob("*.txt")):
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        assert [answer for _, answer in rows] == ["Yes", "No"]
        assert all(question.endswith("Please answer yes or no.") for question, _ in rows)
        assert rows[0][0] != rows[1][0]
        assert path.with_suffix(".png").is_file()


def test_pope_labels_are_true_and_balanced(build: Build) -> None:
    for item in (i for i in build.items if i.benchmark == "pope"):
        words = item.question.question.removesuffix(" in the image?").split()[-2:]
        there = (COLORS.index(words[0]), SHAPES.index(words[1])) in {(t.color, t.shape) for t in item.scene.things}
        assert there == (item.question.answer == "Yes")
        if not there and item.question.category == "adversarial":
            assert words[0] in {COLORS[t.color] for t in item.scene.things}
            assert words[1] in {SHAPES[t.shape] for t in item.scene.things}
    answers = [i.question.answer for i in build.items if i.benchmark == "pope"]
    assert answers.count("Yes") == answers.count("No")


def test_no_evaluation_scene_can_be_drawn_in_training(build: Build) -> None:
    """The split is a property of the arrangement: all evaluation scenes are on one side, all training scenes
    on the other."""
    assert all(scene.held_out() for scene in build.images.values())
    seen = {(s.rows, s.cols, s.things) for s in build.images.values()}
    assert len(seen) == len(set(build.images.values())), "every scene has an arrangement of its own"
    for name in mb.ARENA:
        pictures = [scene for path, scene in build.images.items() if path.split("/")[0].lower() == name]
        assert len(set(pictures)) == len(pictures) > 0, "every picture has a scene of its own"
    for stage in ("vision", "language", "align", "joint"):
        rng = train_rng(stage)
        for _ in range(300):
            scene = sample_scene(rng, 3, 6, held_out=False)
            assert not scene.held_out()
            assert (scene.rows, scene.cols, scene.things) not in seen


def test_every_kind_of_question_is_answered_from_the_scene() -> None:
    rng = np.random.default_rng(3)
    answers: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for _ in range(150):
        scene = sample_scene(rng, 4, 6, held_out=False)
        for question in sample_questions(scene, rng, 10):
            answers[question.kind].add(question.answer)
            assert all(0 <= i < len(scene.things) for i in question.asked)
            if question.kind == "color":
                (thing,) = (t for t in scene.things if SHAPES[t.shape] in question.question)
                assert COLORS[thing.color] == question.answer
    assert all(len(found) >= 2 for found in answers.values()), "no kind has one answer only"


def test_objects_stay_in_their_cells_and_cover_their_centers() -> None:
    for shape in range(len(SHAPES)):
        for size in SIZES:
            for dy in (JITTER[0], JITTER[-1]):
                mask = shape_mask(shape, size, dy, JITTER[0])
                inner = shape_mask(shape, size, 0, 0)
                assert mask.sum() == inner.sum(), "the cell cuts nothing off"
    rng = np.random.default_rng(4)
    for _ in range(20):
        scene = sample_scene(rng, 5, 6, held_out=False)
        cover = coverage(scene)
        assert cover.shape == (len(scene.things), GRID, GRID) and cover.max() <= 1
        for i, thing in enumerate(scene.things):
            assert cover[i][center_patch(scene, thing)] >= ON_OBJECT
        assert (cover >= ON_OBJECT).any(0).mean() <= 1 / 3
        square = pad_square(render(scene))
        assert square.shape == (GRID * PATCH, GRID * PATCH, 3)
