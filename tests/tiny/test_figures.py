"""The recorded figures beside the arena belong to the committed data, and the scoring behind them is right."""

from __future__ import annotations

import json

import pytest

from playground.tiny.build.benchmarks import build_all
from playground.tiny.measure import figures
from playground.tiny.train import text


@pytest.mark.parametrize("name", ["scienceqa", "mmbench_cn", "mm-vet", "vizwiz"])
def test_blind_figures_agree_with_the_record(name: str) -> None:
    items = build_all((name,)).items
    record = json.loads((text.CHECKPOINT / "figures.json").read_text())["eval"][name]
    blind = figures.score(name, figures.as_answers(items, [figures.blind_answer(i.question) for i in items]))
    assert {key: round(value, 2) for key, value in blind.items()} == record["blind"]
    assert record["prompts"] == len(items)
    assert all(record["dense"][key] > value + 20 for key, value in blind.items()), "the model looks at the picture"


@pytest.mark.parametrize("name", figures.NEW)
def test_right_answers_get_full_marks(name: str) -> None:
    items = build_all((name,)).items
    said = figures.as_answers(items, [item.question.answer for item in items])
    assert set(figures.score(name, said).values()) == {100.0}
    assert max(figures.score(name, [{**answer, "text": "?"} for answer in said]).values()) == 0.0
