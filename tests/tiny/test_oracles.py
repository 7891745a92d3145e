"""Oracles: what they keep, and that putting in the right answer scores as saying it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from playground.tiny.build.benchmarks import build_gqa
from playground.tiny.build.items import CROWDED, PLAIN, Item
from playground.tiny.measure import arena, oracles
from playground.tiny.train import export
from playground.tiny.train.joint import TinyLlava
from playground.tiny.world.scenes import GRID
from tests.eval.helpers import fails_with_one_line


@pytest.fixture(scope="module")
def model() -> TinyLlava:
    return export.load()


@pytest.fixture(scope="module", params=[PLAIN, CROWDED], ids=["plain", "crowded"])
def items(request) -> list[Item]:
    return build_gqa(3, family=request.param).items


@pytest.mark.parametrize("budget", [64, 32, 16])
def test_asked_objects_come_first_and_background_last(items: list[Item], budget: int) -> None:
    for item in items:
        members = item.question.asked or range(len(item.scene.things))
        kept = oracles.keep(item.scene, members, budget)
        assert len(set(kept.tolist())) == budget and (np.diff(kept) > 0).all()
        own = item.scene.parts()[list(members)].any((0, 1))
        shown = item.scene.parts().any((0, 1))
        assert own[kept].sum() == min(budget, own.sum()), "nothing else while there is more of them"
        assert (shown[kept] & ~own[kept]).sum() == 0, "what fills up shows no object"


def test_all_objects_get_equally_many(items: list[Item]) -> None:
    scene = items[0].scene
    kept = oracles.keep(scene, range(len(scene.things)), 16)
    each = [int(scene.parts()[i].any(0)[kept].sum()) for i in range(len(scene.things))]
    assert sum(n > 0 for n in each) >= min(16, len(each)) - 1


def test_right_is_what_greedy_decoding_says(model: TinyLlava, items: list[Item]) -> None:
    few = items[:6]
    tokens, attention = arena.encode(model, [few[0].scene])
    rng = np.random.default_rng(3)
    rows = [(oracles.select("random", i, 48, attention[0], rng), [i]) for i in few]
    shown = tokens.expand(len(few), -1, -1)
    good = oracles.right(model, shown, rows, 4)
    said = arena.generate(model, shown, [k for k, _ in rows], [[i.line["text"]] for i in few])
    assert good == [a[0] == i.question.answer for a, i in zip(said, few, strict=True)]


def test_where_text_looks_adds_up(model: TinyLlava, items: list[Item]) -> None:
    shares = oracles.looking(model, [items[:6]])
    assert len(shares) == 12
    assert all(0 <= value <= 1 for row in shares for value in row)


def test_selectors_keep_what_they_say(items: list[Item]) -> None:
    attention = torch.rand(GRID * GRID)
    kept = oracles.select("cls", items[0], 16, attention, np.random.default_rng(0))
    assert set(kept.tolist()) == set(attention.argsort(descending=True)[:16].tolist())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--budgets", "64,none"], "--budgets"),
        (["--budgets", "0"], "--budgets"),
        (["--questions", "0"], "--questions"),
        (["--draw", "record.json"], "--figure"),
        (["--model-path", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], named: str, capsys) -> None:
    fails_with_one_line(oracles.main, arguments, capsys, named)


def test_the_picture_is_drawn_from_a_record(tmp_path, capsys) -> None:
    record, picture = tmp_path / "record.json", tmp_path / "layers.png"
    record.write_text('{"layers": [[0.1, 0.2], [0.6, 0.3]]}')
    oracles.main(["--draw", str(record), "--figure", str(picture)])
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height > 100 and len(drawn.convert("RGB").getcolors(1 << 20)) > 10
    record.write_text("{}")
    fails_with_one_line(oracles.main, ["--draw", record, "--figure", tmp_path / "b.png"], capsys, record, "--layers")
