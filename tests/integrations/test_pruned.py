"""Methods inside other programs: their arguments, what they may be attached to, what is counted and raised."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava.eval.common.budgets import parse_budgets
from llava.integrations.lmms_eval.sweep import methods_of, table
from llava.integrations.pruned import Tally, attached, check_prunable, full_length, take_method
from llava.pruning import OptionError, build_method
from llava.utils import UserError
from tests.families.models import FAMILIES


def test_arguments_that_describe_the_method_are_taken_out():
    arguments = {"pretrained": "x", "method": "autoprune", "target_tokens": 64, "method_args": "x0=12;k0=0.3"}
    method = take_method(arguments)
    assert arguments == {"pretrained": "x"}
    assert (method.name, method.target_tokens, method.x0, method.k0) == ("autoprune", 64, 12.0, 0.3)
    assert take_method({"target_ratio": 0.11}).settings()["target_ratio"] == 0.11
    with pytest.raises(UserError, match="'x0' is not key=value"):
        take_method({"method_args": "x0"})
    for wrong in ({"method": "nosuch"}, {"method_args": "nosuch=1"}, {"target_tokens": 0}):
        with pytest.raises(OptionError):
            take_method(wrong)


def test_models_in_which_nothing_would_be_pruned_are_refused():
    with pytest.raises(UserError, match="base x: Linear is of no family that can be pruned"):
        check_prunable(nn.Linear(2, 2), "base x")


@pytest.fixture
def model():
    return FAMILIES["llava"].model()


@pytest.fixture
def inputs():
    return FAMILIES["llava"].batch((4, ("image", 0), 7), (2, ("image", 1), 5))


def test_answers_are_those_of_the_method_and_are_counted(model, inputs):
    method = build_method("divprune", {"target_tokens": 3})
    with method.attach(model) as run:
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        traces = list(run.traces)
    tally = Tally()
    with attached(method, model, tally):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tally.asked == tally.samples == 2 * len(traces)
    means = tally.means()
    assert means["tokens_nominal"] == means["tokens_processed"] == 3
    assert means["visual_tokens"] == sum(trace.visual_tokens for trace in traces) / len(traces)
    assert "generate" not in vars(model) and Tally().means() == {}


def test_an_error_that_somebody_swallows_is_raised_in_the_end(model, inputs, monkeypatch):
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(1)
        raise RuntimeError("no memory")

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fail)
    with pytest.raises(RuntimeError, match="no memory"), attached(build_method("divprune"), model, Tally()):
        for _ in range(3):
            try:
                model.generate(**inputs)
            except RuntimeError:
                pass  # as lmms-eval's wrappers do
    assert len(calls) == 1, "nothing is asked after the first failure"
    assert "generate" not in vars(model)


def test_logits_with_labels_keep_the_places_of_the_text(model):
    inputs = FAMILIES["llava"].batch((4, ("image", 0), 7))
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        dense = model(**inputs, labels=labels).logits
        with attached(build_method("divprune", {"target_tokens": 3}), model, Tally()):
            padded = model(**inputs, labels=labels).logits
        with build_method("divprune", {"target_tokens": 3}).attach(model):
            short = model(**inputs, labels=labels).logits
    assert padded.shape == dense.shape and short.shape[1] < dense.shape[1]
    assert torch.equal(padded[:, -short.shape[1] :], short) and not padded[:, : -short.shape[1]].any()


def test_full_length_by_hand():
    logits = torch.arange(8.0).reshape(1, 4, 2)
    assert full_length(logits, []) is logits
    assert full_length(logits, [2]).tolist() == [[[0, 0], [0, 0], *logits[0].tolist()]]


def test_settings_of_a_sweep():
    found = list(methods_of("autoprune,dense,divprune", "64,0.5"))
    assert [method.name for method in found] == ["dense", "autoprune", "autoprune", "divprune", "divprune"]
    assert [method.target_tokens for method in found[1:]] == [64, None, 64, None]
    assert parse_budgets("0.5") == [found[2].target_ratio]
    with pytest.raises(UserError, match="--methods names no method"):
        list(methods_of(" ,", "64"))


def test_the_table_of_a_sweep():
    results = {"pope": {"alias": "pope", "f1,none": 0.5, "f1_stderr,none": 0.1}}
    rows = [
        {"method": "dense", "options": {"target_tokens": None}, "results": results},
        {
            "method": "autoprune",
            "options": {"target_tokens": 64},
            "tokens_nominal": 64.0,
            "tokens_processed": 107.74,
            "results": results,
        },
    ]
    lines = table(rows).splitlines()
    assert lines[0] == "| method | target | tokens, nominal | tokens, processed | pope f1 |"
    assert lines[2:] == ["| dense | - | - | - | 0.5 |", "| autoprune | 64 | 64.0 | 107.7 | 0.5 |"]
