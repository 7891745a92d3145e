"""Crowded scenes: many small objects, questions about a few of them, answers that are true, files as of the others."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter

import numpy as np
import pytest

from playground.tiny.build import benchmarks as mb
from playground.tiny.build import ensure, files
from playground.tiny.build.items import Build, Item
from playground.tiny.train.common import train_rng
from playground.tiny.train.vision import HEADS, patch_labels
from playground.tiny.world import chinese, formats
from playground.tiny.world import questions as q
from playground.tiny.world.crowded import DIGITS, LABELS, LIMIT, Crowd, Small, label_bitmap, sample_crowd
from playground.tiny.world.scenes import COLORS, GRID, PATCH, RGB, SHAPES, WORDS, full_name, pad_square, render

CHECKSUMS = {"render": 1401721423, "sampled": 353392075}


@pytest.fixture(scope="module")
def build() -> Build:
    return mb.build_crowded(("textvqa", "gqa", "mme"))


@pytest.fixture(scope="module")
def scenes() -> list[Crowd]:
    rng = np.random.default_rng(21)
    return [sample_crowd(rng, held_out=False) for _ in range(25)]


def test_rendering_does_not_depend_on_the_machine() -> None:
    things = (Small(0, 3, 7, 0, 1, 4, -4, 8, 5), Small(4, 2, -1, 2, 2, 0, 4, 9, -3, 6), Small(1, 0, -1, 5, 5, 8, 0))
    assert zlib.crc32(render(Crowd(things, 6, 6, 12345)).tobytes()) == CHECKSUMS["render"]
    drawn = sample_crowd(np.random.default_rng(5), held_out=True)
    assert zlib.crc32(repr(drawn).encode()) == CHECKSUMS["sampled"]


def test_scenes_are_crowded(scenes: list[Crowd]) -> None:
    for scene in scenes:
        assert 16 <= len(scene.things) <= 32
        assert len({(t.row, t.col) for t in scene.things}) == len(scene.things)
        kinds = Counter(full_name(t) for t in scene.things)
        assert max(kinds.values()) >= 2, "some are alike"
        assert max(Counter(t.shape for t in scene.things).values()) >= 4
        words = [t.word for t in scene.things if t.word >= 0]
        digits = [t.digit for t in scene.things if t.digit >= 0]
        assert (
            len(words) >= 4 and len(digits) >= 3 and len(set(words)) == len(words) and len(set(digits)) == len(digits)
        )
    assert np.mean([len(s.things) for s in scenes]) > 22


def test_patches_are_those_where_the_object_is_seen(scenes: list[Crowd]) -> None:
    """A patch of a shape has pixels of its color under some light, one of a label the black and white of its text."""
    for scene in scenes[:6]:
        picture, parts = pad_square(render(scene)).astype(int), scene.parts()
        assert parts.shape == (len(scene.things), 2, GRID * GRID)
        for i, thing in enumerate(scene.things):
            shade = RGB[thing.color] + thing.shade
            assert 2 <= parts[i, 0].sum() <= 12
            for patch in np.flatnonzero(parts[i, 0]):
                y, x = PATCH * (patch // GRID), PATCH * (patch % GRID)
                pixels = picture[y : y + PATCH, x : x + PATCH].reshape(-1, 3)
                light = pixels * 256 / np.clip(shade, 1, None)
                assert ((light.min(1) > 190) & (light.max(1) < 262)).sum() >= 0.2 * PATCH * PATCH - 1
            assert bool(parts[i, 1].any()) == (thing.label >= 0)
        labels = patch_labels(scene)
        assert set(labels) == set(HEADS)
        for i, thing in enumerate(scene.things):
            own = labels["word"].reshape(-1)[parts[i, 1]]
            assert (own == thing.label + 1).all()
            row, col = scene.coarse(thing)
            assert 0 <= row <= 6 and 0 <= col <= 6


def test_every_label_is_drawn_otherwise() -> None:
    drawn = {label_bitmap(k).tobytes() for k in range(len(LABELS))}
    assert len(drawn) == len(WORDS) + len(DIGITS)


def test_names_name_one_object(scenes: list[Crowd]) -> None:
    def matches(thing: Small, name: str) -> bool:
        if " with the " in name:
            kind, label = name.split()[-2:]
            return label == (WORDS[thing.word] if kind == "word" else DIGITS[thing.digit]) and (
                thing.word >= 0 if kind == "word" else thing.digit >= 0
            )
        return full_name(thing) == name

    for scene in scenes:
        for i in range(len(scene.things)):
            for hide in ("", "color", "shape", "word"):
                for name in scene.names(i, hide):
                    assert [k for k, t in enumerate(scene.things) if matches(t, name)] == [i]
                    assert hide not in ("color", "shape") or "with the" in name
                    assert hide != "word" or "with the" not in name


def find(scene: Crowd, name: str) -> Small:
    """The object of a name, looked up in the scene."""
    if " with the " in name:
        label = name.split()[-1]
        (found,) = (t for t in scene.things if t.label >= 0 and LABELS[t.label] == label)
    else:
        (found,) = (t for t in scene.things if full_name(t) == name)
    return found


def truth(scene: Crowd, text: str) -> str | None:
    """The answer to a question, found by reading it."""
    name = r"(?:the )?(.+?)"
    yes = lambda good: "Yes" if good else "No"  # noqa: E731
    if m := re.fullmatch(r"Is there an? (\w+ \w+) in the image\?", text):
        return yes(any(full_name(t) == m[1] for t in scene.things))
    if m := re.fullmatch(rf"What color is {name}\?", text):
        return COLORS[find(scene, m[1]).color]
    if m := re.fullmatch(rf"What shape is {name}\?", text):
        return SHAPES[find(scene, m[1]).shape]
    if m := re.fullmatch(rf"What (?:word|digit) is on {name}\?", text):
        return LABELS[find(scene, m[1]).label]
    if m := re.fullmatch(rf'Is the word on {name} "(\w+)"\?', text):
        return yes(LABELS[find(scene, m[1]).label] == m[2])
    if m := re.fullmatch(r"How many (\w+) (\w+) are there\?", text):
        return str(sum(COLORS[t.color] == m[1] and m[2].startswith(SHAPES[t.shape]) for t in scene.things))
    if m := re.fullmatch(rf"Is {name} (to the left of|to the right of|above|below) the (.+)\?", text):
        a, b = find(scene, m[1]), find(scene, m[3])
        side = {"to the left of": a.col < b.col, "to the right of": a.col > b.col}
        return yes({**side, "above": a.row < b.row, "below": a.row > b.row}[m[2]])
    return None


def test_answers_are_true(scenes: list[Crowd]) -> None:
    rng, checked = np.random.default_rng(22), Counter()
    for scene in scenes:
        for make in (*(m for m, _ in q.KINDS.values()), q.digit_on):
            for _ in range(3):
                asked = make(scene, rng)
                if asked is None or asked.options or " or " in asked.question:
                    continue
                right = truth(scene, asked.question)
                if right is not None:
                    assert asked.answer == right, asked.question
                    checked[asked.kind] += 1
    wanted = {"exists", "color", "shape", "relation", "count", "word", "verify_word", "digit"}
    assert all(checked[kind] >= 20 for kind in wanted), checked


def test_no_question_needs_more_than_a_twelfth_of_the_picture(scenes: list[Crowd]) -> None:
    rng = np.random.default_rng(23)
    makers = [m for m, _ in q.KINDS.values()] + [*formats.CHOICES.values(), *chinese.CHOICES.values()]
    makers += [q.digit_on, formats.vizwiz, formats.unanswerable, *(m for m, _ in formats.OPEN.values())]
    most = 0
    for scene in scenes:
        for make in makers:
            asked = make(scene, rng)
            if asked is not None:
                most = max(most, len({p for i in asked.asked for p in np.flatnonzero(scene.parts()[i].any(0))}))
    assert 20 < most <= LIMIT == 46 <= 0.08 * GRID * GRID
    everything = q.Question("all", "?", "", tuple(range(len(scenes[0].things))))
    with pytest.raises(AssertionError, match="too many patches"):
        Item("any", None, {}, scenes[0], everything)


def test_a_crowd_is_counted_and_read_among_others(build: Build) -> None:
    counting = [i for i in build.items if i.question.kind == "verify_count"]
    assert len(counting) >= 100 and {i.question.answer for i in counting} == {"Yes", "No"}
    assert all(len(i.scene.things) - len(i.question.asked) >= 12 for i in counting)
    reading = [i for i in build.items if i.benchmark == "textvqa"]
    assert len(reading) >= 450
    for item in reading:
        assert item.question.answer in item.question.ocr and len(item.question.ocr) >= 5
        assert truth(item.scene, item.question.question) == item.question.answer


def test_evaluation_scenes_are_held_out(build: Build) -> None:
    assert all(isinstance(s, Crowd) and s.held_out() for s in build.images.values())
    rng = train_rng("deep")
    assert not any(sample_crowd(rng, held_out=False).held_out() for _ in range(50))


def test_files_are_those_of_the_other_scenes(build: Build) -> None:
    plain = mb.build_all(("textvqa", "gqa", "mme"))
    text = lambda b: {path for path in b.files if "MME_Benchmark" not in path}  # noqa: E731
    assert text(build) == text(plain)
    for path in text(plain):
        if path.endswith(".jsonl"):
            ours, theirs = (json.loads(b.files[path].splitlines()[0]) for b in (build, plain))
            assert list(ours) == list(theirs)
    assert not {line for b in (build,) for line in b.images} - set(plain.images) - set(build.images)
    for path, content in build.files.items():
        if "MME_Benchmark" in path:
            assert [line.split("\t")[1] for line in content.splitlines()] == ["Yes", "No"]


def test_the_committed_checksums_are_those_of_the_generator(build: Build) -> None:
    wanted = files.read_checksums(files.CHECKSUMS_CROWDED)
    made = files.contents({mb.DATA_CROWDED.name: build})
    assert made.keys() <= wanted.keys()
    some = [path for k, path in enumerate(made) if k % 12 == 0 or path.endswith((".json", ".jsonl"))]
    assert {path: files.checksum(path, made[path]()) for path in some} == {path: wanted[path] for path in some}


def test_crowds_are_made_only_where_asked_for(tmp_path, monkeypatch) -> None:
    scene = sample_crowd(np.random.default_rng(1), held_out=True)
    makers = files.contents({"eval_crowded": Build({}, {"pope/1.png": scene})})
    monkeypatch.setattr(ensure, "crowded_makers", lambda: makers)
    checksums = tmp_path / "checksums.txt"
    files.write_checksums(((path, files.checksum(path, make())) for path, make in makers.items()), checksums)
    assert ensure.ensure_crowded(tmp_path / "data", checksums=checksums) == 1
    assert ensure.ensure_crowded(tmp_path / "data", checksums=checksums) == 0
    assert not (tmp_path / "data" / ensure.MADE).exists(), "the other set keeps its own record"
    assert not any(path.startswith("eval_crowded") for path in files.read_checksums())
