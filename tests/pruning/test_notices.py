"""What methods cannot do as they were asked: one way to say it, once per program, over the whole registry."""

from __future__ import annotations

import ast

import pytest
import torch

from llava.pruning import get_method, list_methods, missed_budgets
from llava.pruning.engine.notices import forget, say
from tests.conftest import ROOT
from tests.pruning.models import Batch, random_llama

IN_TOWER = {"flowcut", "gtp_vit"}


@pytest.fixture(scope="module")
def model():
    return random_llama()


def prefills(model, method, rows=(0, 1)) -> None:
    """One run, a prefill per row."""
    batch = Batch(model)
    with method.attach(model) as run, torch.no_grad():
        for row in rows:
            prompt = batch.alone(row)
            run.set_visual(prompt["layout"], prompt["cls"], facts=prompt["facts"])
            model(inputs_embeds=prompt["embeds"])


def options_of(name: str) -> dict:
    return {"inside": False} if name == "tome" else {}


@pytest.mark.parametrize("name", sorted(set(list_methods()) - IN_TOWER - {"dense"}))
def test_every_method_says_once_what_it_cannot_reach(model, name, caplog):
    """A mean of one token: whoever cannot meet it says so, in one line for three runs of two samples."""
    method = get_method(name)(target_tokens=1, **options_of(name))
    for _ in range(3):
        prefills(model, method)
    messages = [record.message for record in caplog.records]
    assert len(messages) == len(set(messages)) and all(message.startswith(f"{name}: ") for message in messages)
    missed = [message for message in messages if "cannot meet" in message]
    with missed_budgets(report=False), method.attach(model) as run, torch.no_grad():
        prompt = Batch(model).alone(0)
        run.set_visual(prompt["layout"], prompt["cls"], facts=prompt["facts"])
        model(inputs_embeds=prompt["embeds"])
        met = abs(run.traces[0].budget_error) <= 0.04
    assert len(missed) == (not met)


@pytest.mark.parametrize("name", sorted(set(list_methods()) - {"dense", *IN_TOWER}))
def test_markers_where_nothing_is_dropped_in_front_of_the_decoder(model, name, caplog):
    method = get_method(name)(target_tokens=20, pospad=True, **options_of(name))
    for _ in range(2):
        prefills(model, method)
    idle = [record.message for record in caplog.records if "pospad" in record.message]
    in_front = method.reduces_vision or name in (
        "autoprune_plus", "catp", "divprune", "fastervlm", "random", "todre", "uniform",
    )  # fmt: skip
    expected = f"{name}: pospad had no effect: no method dropped tokens in front of the decoder"
    assert idle == ([] if in_front else [expected])


@pytest.mark.parametrize("name", ["autoprune", "sparsevlm"])
def test_noise_where_nothing_is_clustered(model, name, caplog):
    prefills(model, get_method(name)(target_tokens=14, noise_seed=0, recycle_fraction=0.0))
    assert [record.message for record in caplog.records if "noise" in record.message] == [
        f"{name}: noise_seed had no effect: no tokens were merged into two or more clusters"
    ]
    caplog.clear()
    forget()
    few = {"coarse_cut": False, "slope": 0.0} if name == "autoprune" else {"layers": "1/3"}
    prefills(model, get_method(name)(target_tokens=14, noise_seed=0, **few))
    assert not any("noise_seed" in record.message for record in caplog.records)


def test_an_effect_in_any_run_of_a_program_counts(model, caplog):
    with missed_budgets():
        for fraction in (0.0, 0.3):
            prefills(
                model, get_method("sparsevlm")(target_tokens=14, layers="1/3", noise_seed=0, recycle_fraction=fraction)
            )
    assert not any("noise_seed" in record.message for record in caplog.records)


def test_facts_that_are_missing_are_said_once(model, caplog):
    """On a bare decoder nobody knows a raster or a projector."""
    for name, part in (("hiprune", "neighbors"), ("vscan", "windows"), ("vflowopt", "cells"), ("mmtok", "projector")):
        caplog.clear()
        for _ in range(2):
            prefills(model, get_method(name)(target_tokens=9))
        found = [record.message for record in caplog.records if "cannot meet" not in record.message]
        assert len(found) == 1 and part in found[0] and found[0].startswith(f"{name}: "), found


def test_the_same_line_about_another_method_is_another_line(caplog):
    for name in ("first", "second", "first"):
        say(name, "does without")
    assert [record.message for record in caplog.records] == ["first: does without", "second: does without"]


def test_there_is_one_way_to_say_it():
    """No other module of the pruning and of the families logs or prints."""
    for folder in ("pruning", "families"):
        for path in (ROOT / "llava" / folder).rglob("*.py"):
            if path.name == "notices.py":
                continue
            tree = ast.parse(path.read_text())
            calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            names = {getattr(call, "id", getattr(call, "attr", "")) for call in calls}
            assert not names & {"getLogger", "print", "warn", "warning"}, path
