"""The recorded figures of the arena meet their thresholds and belong to the committed weights and data."""

from __future__ import annotations

import json

import pytest
import torch

from playground.tiny.build.benchmarks import ARENA, build_all
from playground.tiny.build.items import Item
from playground.tiny.measure import arena
from playground.tiny.train import export


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(arena.RECORD.read_text())


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return build_all(ARENA).items


@pytest.fixture(scope="module")
def model() -> export.TinyLlava:
    return export.load()


def subset(items: list[Item], pictures: int) -> list[Item]:
    """All questions about the first pictures of every benchmark."""
    chosen = []
    for name in ARENA:
        own = [i for i in items if i.benchmark == name]
        images = list(dict.fromkeys(i.image for i in own))
        step = len(images) // pictures
        wanted = set(images[::step][:pictures])
        chosen += [i for i in own if i.image in wanted]
    return chosen


def share_right(items: list[Item], answers: list[str]) -> float:
    return 100 * sum(i.question.answer == a for i, a in zip(items, answers, strict=True)) / len(items)


@pytest.mark.parametrize("name", tuple(arena.THRESHOLDS))
def test_recorded_figures_meet_the_threshold(record: dict, name: str) -> None:
    assert arena.verdict(record)[name], f"{name}: {arena.THRESHOLDS[name]}"


def test_thresholds_can_fail(record: dict) -> None:
    worse = json.loads(json.dumps(record))
    worse["mean_accuracy"] |= {"dense": 84.9, "blank": 83.9, "oracle": 82.0, "random": 80.0}
    worse["attention"] |= {"top64_on_objects": 0.69, "area_of_objects_max": 0.34}
    worse["benchmarks"]["gqa"]["blind"]["score"] = worse["benchmarks"]["gqa"]["dense"]["score"] - 29.9
    assert not any(arena.verdict(worse).values())


def test_blind_scores_agree_with_the_record(record: dict, items: list[Item]) -> None:
    scored = arena.score(items, arena.blind_answers(items))
    for name in ARENA:
        assert scored[name] == record["benchmarks"][name]["blind"]
        assert record["benchmarks"][name]["questions"] == sum(i.benchmark == name for i in items)


def test_blind_answers_beat_always_yes_and_guess_from_the_ocr_line(items: list[Item]) -> None:
    scored = arena.score(items, arena.blind_answers(items))
    constant = arena.score(items, ["Yes"] * len(items))
    assert all(scored[n]["score"] >= constant[n]["score"] for n in ARENA)
    assert scored["textvqa"]["score"] > 15


def test_a_small_recomputation_agrees_with_the_record(record: dict, items: list[Item], model: export.TinyLlava) -> None:
    few = subset(items, 5)
    recorded = record["mean_accuracy"]
    dense = share_right(few, arena.answer_all(model, few, "dense"))
    oracle = share_right(few, arena.answer_all(model, few, "oracle"))
    random = share_right(few, arena.answer_all(model, few, "random"))
    blank = share_right(few, arena.answer_all(model, few, "blank"))
    assert abs(blank - dense) < 3
    assert abs(dense - recorded["dense"]) < 8
    assert abs(oracle - recorded["oracle"]) < 8
    assert abs(random - recorded["random"]) < 15 and random < dense


def test_attention_ranks_objects_first_as_recorded(record: dict, items: list[Item], model: export.TinyLlava) -> None:
    pictures = list({(i.benchmark, i.image): i.scene for i in items}.values())[::32]
    found = arena.looking(model, pictures)
    assert abs(found["top64_on_objects"] - record["attention"]["top64_on_objects"]) < 0.08
    shuffled = export.load()
    with torch.no_grad():
        layer = (
            shuffled.tower.encoder.layers[2]
            if hasattr(shuffled.tower, "encoder")
            else (shuffled.tower.vision_model.encoder.layers[2])
        )
        layer.self_attn.q_proj.weight.neg_()
        layer.self_attn.q_proj.bias.neg_()
    assert arena.looking(shuffled, pictures)["top64_on_objects"] < 0.5, "the figure depends on the attention"


def test_oracle_keeps_the_objects_asked_about(items: list[Item]) -> None:
    for item in items[::40]:
        kept = arena.oracle(item)
        assert len(kept) == len(set(kept.tolist())) == arena.KEEP
        cover = arena.coverage(item.scene)
        for i in item.question.asked:
            thing = item.scene.things[i]
            row, col = arena.center_patch(item.scene, thing)
            assert row * arena.GRID + col in kept
            if len(item.question.asked) <= 2:
                on = (cover[i] >= arena.ON_OBJECT).reshape(-1)
                assert on[kept].sum() == on.sum()
