"""Budgets as shares of each prompt's visual tokens: the same as the tokens they come to, row by row."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from llava.pruning import AutoPrune, OptionError, get_method, list_methods
from llava.pruning.budget import share_of
from tests.pruning.models import Batch, generate, random_llama

TOKENS = {0: 48, 1: 50, 2: 40, 3: 25}  # visual tokens of the samples of `Batch`; sample 4 has none


@pytest.fixture(scope="module")
def model():
    return random_llama()


def test_a_share_is_that_of_the_decimal_number():
    for hundredths in range(1, 101):
        for count in (1, 7, 64, 100, 576, 2880, 12345):
            assert share_of(count, hundredths / 100) == max(hundredths * count // 100, 1)
    assert int(0.29 * 100) == 28 and share_of(100, 0.29) == 29  # what binary floats would lose
    assert (share_of(576, 1e-9), share_of(576, 1), share_of(0, 0.5)) == (1, 576, 1)


@pytest.mark.parametrize("budget", ["nominal", "processed"])
@pytest.mark.parametrize("name", sorted(set(list_methods()) - {"dense", "flowcut", "gtp_vit"}))  # these need a tower
def test_every_row_gets_its_own_tokens(model, name, budget):
    """Rows of different counts in one batch, each compared with its sample alone at the target in tokens."""
    batch, rows, options = Batch(model), [0, 3, 4, 1], {"inside": False} if name == "tome" else {}
    method = get_method(name)(target_ratio=0.3, budget=budget, **options)
    tokens, logits, traces = generate(model, method, batch.together(rows))
    for place, row in enumerate(rows):
        target = 3 * TOKENS.get(row, 0) // 10 or 1
        alone = get_method(name)(target_tokens=target, budget=budget, **options)
        if name in ("random", "information_horizon") and place:
            continue  # draws by the number of the sample
        own_tokens, own_logits, (trace,) = generate(model, alone, batch.alone(row))
        if row in TOKENS:
            assert (traces[place].visual_tokens, traces[place].target_tokens) == (TOKENS[row], target)
            assert traces[place].budget_error == trace.budget_error
        assert traces[place].tokens_out == trace.tokens_out
        assert [k.tolist() for k in traces[place].kept] == [k.tolist() for k in trace.kept]
        assert tokens[place].tolist() == own_tokens[0].tolist()
        torch.testing.assert_close(logits[place], own_logits[0], atol=2e-4, rtol=1e-4)
    assert len({trace.target_tokens for trace in traces if trace.visual_tokens}) == 3


@pytest.mark.parametrize("name", ["visionzip+autoprune", "divprune+autoprune", "divprune+fastv"])
def test_a_share_in_a_composition_counts_what_the_prompt_had(model, name):
    """Also for the second method, which sees only what the first one left."""
    first, batch, rows = name.split("+")[0], Batch(model), [0, 1]
    shares = get_method(name).from_options({f"{first}.target_ratio": "0.5", "target_ratio": "0.25"})
    _, logits, traces = generate(model, shares, batch.together(rows))
    for place, row in enumerate(rows):
        options = {f"{first}.target_tokens": TOKENS[row] // 2, "target_tokens": TOKENS[row] // 4}
        _, own, (trace,) = generate(model, get_method(name).from_options(options), batch.alone(row))
        assert traces[place].tokens_out == trace.tokens_out
        assert traces[place].target_tokens == trace.target_tokens == TOKENS[row] // 4
        torch.testing.assert_close(logits[place], own[0], atol=2e-4, rtol=1e-4)


def test_a_cap_does_not_change_what_a_share_is_of(model):
    capped = AutoPrune(target_ratio=0.25, visual_token_num=30)
    _, _, (trace,) = generate(model, capped, Batch(model).alone(0), new_tokens=1)
    _, _, (tokens,) = generate(model, AutoPrune(target_tokens=12, visual_token_num=30), Batch(model).alone(0))
    assert (trace.tokens_in[0], trace.target_tokens) == (30, 12) and trace.tokens_out == tokens.tokens_out


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.5"])
def test_what_is_no_share(ratio):
    with pytest.raises(OptionError, match=f"target_ratio must be above 0 and at most 1, got {ratio!r}"):
        AutoPrune(target_ratio=ratio)


def test_both_ways_to_give_the_budget():
    for build in (AutoPrune, get_method("divprune"), get_method("fastv")):
        with pytest.raises(OptionError, match="target_tokens and target_ratio are two ways"):
            build(target_tokens=64, target_ratio=0.11)
    with pytest.raises(OptionError, match="two ways"):
        get_method("fastv").from_options({"target_tokens": "64", "target_ratio": "0.11"})
    with pytest.raises(OptionError, match="two ways"):
        options = {"divprune.target_ratio": "0.5", "divprune.target_tokens": 9, "target_tokens": 4}
        get_method("divprune+autoprune").from_options(options)
    with pytest.raises(OptionError, match="two ways"):
        dataclasses.replace(AutoPrune(target_tokens=64), target_ratio=0.11)
    assert AutoPrune(target_tokens=None, target_ratio=0.5).target_of(9) == 4


def test_records_and_copies():
    tokens, share = AutoPrune(target_tokens=64), AutoPrune(target_ratio=0.11)
    assert "target_ratio" not in tokens.settings()  # runs that were begun before there were shares continue
    assert (share.settings()["target_tokens"], share.settings()["target_ratio"]) == (None, 0.11)
    for other in (copy.copy(share), pickle.loads(pickle.dumps(share)), dataclasses.replace(share), AutoPrune(
        **{name: value for name, value in share.settings().items() if name != "curve"}
    )):  # fmt: skip
        assert other == share and other.target_of(576) == 63
    both = get_method("divprune+autoprune").from_options({"divprune.target_ratio": 0.5, "target_ratio": 0.1})
    assert both.settings()["target_ratio"] == 0.1
    assert [part["target_ratio"] for part in both.settings()["members"]] == [0.5, 0.1]


def test_a_missed_share_is_said_once(model, caplog):
    generate(model, get_method("fastv")(target_ratio=0.1), Batch(model).together([0, 1]), new_tokens=1)
    (record,) = caplog.records
    assert record.message == (
        "fastv: for 2 of 2 samples these options cannot meet 0.1 of the visual tokens per layer; their processed mean "
        "is 0.347"
    )


def test_traces_say_the_share(model):
    batch = Batch(model)
    _, _, (share,) = generate(model, AutoPrune(target_ratio=0.25), batch.alone(0), new_tokens=1)
    _, _, (tokens,) = generate(model, AutoPrune(target_tokens=12), batch.alone(0), new_tokens=1)
    assert share.to_dict(kept=True) == {**tokens.to_dict(kept=True), "target_ratio": 0.25}
