"""The driving miniature that is stored: its layout, and that it drives by what its cameras show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.answering.adapter import LlavaAdapter
from llava.eval.answering.answerer import Answerer
from llava.eval.common.arguments import GenerationOptions
from llava.eval.common.questions import Question
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from playground.tiny.build.driving import streets
from playground.tiny.measure import driving as measuring
from playground.tiny.train import text
from playground.tiny.world import driving as d
from tests.conftest import ROOT

FOLDER = text.CHECKPOINT_DRIVE
DOCUMENT = ROOT / "docs" / "driving.md"


@pytest.fixture(scope="module")
def answers():
    """Answers the planning question of a street, shown with what some cameras see, with the oracle's tokens or all."""
    tokenizer, model, processor, _ = load_pretrained_model(str(FOLDER), None, FOLDER.name, device="cpu")
    adapter = LlavaAdapter(tokenizer, model, processor)

    def say(street: d.Street, cameras: tuple[str, ...] = d.CAMERAS, kind: str = "oracle") -> str:
        images = measuring.pictures(street, cameras, 0)
        answerer = Answerer(adapter, Path("."), GenerationOptions(max_new_tokens=24), images=images)
        question = Question(0, "", 0, d.meta_question(street).text, tuple(images))
        with measuring.method_of(kind, street).attach(model) as run, torch.inference_mode():
            (answer,) = answerer.answer([answerer.prepare(question)], run)
        return answer.text

    return say


def test_layout() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["num_hidden_layers"] == 12 and config["mm_patch_merge_type"] == "flat"
    longest = text.prompt(d.points_question(streets()[0]).text).replace("<image>\n", "<image>\n" * 6)
    ids = tokenizer_image_token(longest, text.tokenizer())
    tokens = len(ids) + 575 * ids.count(IMAGE_TOKEN_INDEX)
    assert tokens + 50 < config["tokenizer_model_max_length"] == config["max_position_embeddings"] == 4096
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (FOLDER, text.CHECKPOINT))
    assert {name: value.shape for name, value in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert {value.dtype for value in ours.values()} == {torch.float16}
    assert all(torch.isfinite(value).all() for value in ours.values())
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 6.4e6
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / name).read_bytes() == (text.CHECKPOINT / name).read_bytes()


def test_it_drives_by_all_its_views(answers) -> None:
    """Twelve held-out streets by the patches of things at a tenth of the tokens, two with all 3,456."""
    right = [answers(street) == ", ".join(d.rule(street.facts)) for street in streets()[:12]]
    assert sum(right) >= 11, right
    for street in streets()[12:14]:
        assert answers(street, kind="all") == ", ".join(d.rule(street.facts))


def test_what_it_is_not_shown_it_does_not_know(answers) -> None:
    """With things in front alone it does what would be right if there were no others: four streets where that is
    wrong."""
    found = []
    for street in streets():
        seen = {name: getattr(street.facts, name) for name in ("light", "lead", "command", "speed")}
        if d.rule(d.Facts(**seen)) != d.rule(street.facts):
            found.append((street, d.Facts(**seen)))
    assert len(found) > 40
    said = [(answers(street, ("FRONT",)), ", ".join(d.rule(facts))) for street, facts in found[:4]]
    assert sum(answer == expected for answer, expected in said) >= 3, said


def test_figures_are_those_that_were_measured() -> None:
    """`drive.json`, written by `measure.driving`, meets the goals and is what the document says."""
    figures = json.loads((FOLDER / "drive.json").read_text())
    assert set(figures) == set(measuring.GOALS)
    document = DOCUMENT.read_text()
    for name, (low, high) in measuring.GOALS.items():
        assert figures[name]["questions"] == len(streets()) and low <= figures[name]["accuracy"] <= high, name
        row = re.search(rf"^\| {measuring.SAID[name]} \| ([\d.]+) \| ([\d.]+) \|", document, re.M)
        assert row, measuring.SAID[name]
        assert [float(row[1]), float(row[2])] == [round(figures[name][key], 1) for key in ("accuracy", "best")]
