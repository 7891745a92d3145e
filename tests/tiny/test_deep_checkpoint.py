"""The deep checkpoint: small, of LLaVA's layout, right about crowded scenes, and looking where it was taught to."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from llava.model.builder import load_pretrained_model
from playground.tiny.build.benchmarks import build_gqa
from playground.tiny.build.items import CROWDED, Item
from playground.tiny.measure import oracles
from playground.tiny.train import deep, export, text
from playground.tiny.train.joint import TinyLlava

FOLDER = text.CHECKPOINT_DEEP


@pytest.fixture(scope="module")
def model() -> TinyLlava:
    return export.load(FOLDER)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return build_gqa(2, family=CROWDED).items


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((FOLDER / "crowded.json").read_text())


def test_at_most_20_megabytes() -> None:
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 20e6


def test_the_real_loader_has_the_same_weights(model: TinyLlava) -> None:
    _, loaded, _, _ = load_pretrained_model(str(FOLDER), None, "llava-v1.5", device="cpu", torch_dtype=torch.float32)
    assert len(model.decoder.model.layers) == deep.LAYERS == 32
    named = dict(loaded.named_parameters())
    for name, value in model.decoder.named_parameters():
        (own,) = (p for n, p in named.items() if n.endswith(name))
        assert torch.equal(own, value), name


def test_recorded_figures_meet_the_goals(record: dict) -> None:
    """Dense, what a blind one gets, what the picture's patches are needed for, and that not all objects fit."""
    mean = {name: values["mean"] for name, values in record["settings"].items()}
    assert mean["dense"] >= 93
    assert mean["dense"] - mean["blind"] >= 40
    assert mean["dense"] - mean["objects 32"] >= 15
    assert mean["asked 32"] >= mean["dense"] - 5


def test_text_looks_at_what_is_asked_about_in_the_middle_layers(record: dict) -> None:
    answer, name = np.array(record["layers"]).T
    assert int(name.argmax()) in (deep.WATCH[0], deep.WATCH[1]) and int(answer.argmax()) == deep.WATCH[1]
    assert answer[deep.WATCH[1]] > 0.5 and max(answer[:8].max(), answer[24:].max()) < 0.2


def test_a_small_recomputation_agrees_with_the_record(model: TinyLlava, items: list[Item]) -> None:
    """The oracle sees what is asked about and is right; without those patches it can only guess."""
    tokens, attention = oracles.encode(model, [i.scene for i in items])
    rng = np.random.default_rng(4)
    shares = []
    for name in ("asked", "random"):
        rows = [(oracles.select(name, item, 24, attention[k], rng), [item]) for k, item in enumerate(items)]
        shares.append(np.mean(oracles.right(model, tokens, rows, 12)))
    assert shares[0] >= 10 / 12 and shares[1] <= 9 / 12
