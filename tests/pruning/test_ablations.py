"""Options of AutoPrune that take a part of it away or feed it other values."""

from __future__ import annotations

import pytest
import torch

from llava.pruning import AutoPrune, mutual_information, retention_schedule
from tests.pruning.models import Batch, generate, random_llama

BASE = {"target_tokens": 8, "x0": 3.0, "gamma": 0.02}  # information is high in these models: 0.02 leaves a slope


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def maps():
    """Unpruned attention of sample 0, by transformers: text rows over visual columns, per layer."""
    with torch.no_grad():
        output = random_llama("eager").model(
            inputs_embeds=Batch(random_llama()).embeds[0][None], output_attentions=True
        )
    return [attention[0, :, 52:, 4:52] for attention in output.attentions]


def trace_of(model, **options):
    return generate(model, AutoPrune(**{**BASE, **options}), Batch(model).alone(0), new_tokens=1)[2][0]


@pytest.mark.parametrize("slope", [0.0, 0.3, 2.0])
def test_an_injected_slope_gives_the_planned_schedule_and_looks_at_no_information(model, slope):
    trace = trace_of(model, slope=slope)
    assert trace.tokens_out == retention_schedule(6, 48, 8, slope, x0=3.0)
    assert trace.slope == slope and trace.mutual_information is None


def test_relative_inflection(model):
    steep = {"slope": 2.0, "target_tokens": 14}
    relative, absolute = trace_of(model, x0=14.9, x0_relative=True, **steep), trace_of(model, x0=14.9 * 6 / 32, **steep)
    assert relative.tokens_out == absolute.tokens_out != trace_of(model, x0=14.9, **steep).tokens_out


def test_no_recovery_merges_nothing(model):
    assert any((kept < 0).any() for kept in trace_of(model).kept)
    trace = trace_of(model, recycle_fraction=0.0)
    assert not any((kept < 0).any() for kept in trace.kept) and trace.details["merge_flops"] == 0


def test_no_cut_after_layer_0(model, maps):
    trace = trace_of(model, coarse_cut=False, target_tokens=16)
    assert trace.tokens_out[0] == 48 > trace.tokens_out[1]
    assert abs(trace.budget_error) <= 1
    # Nothing was dropped before layer 1, so its information is that of the unpruned model, and layer 0 is not measured.
    information = mutual_information(maps[1]).sum().item()
    assert trace.mutual_information == {"layer1": pytest.approx(information, rel=1e-3)}
    assert trace.slope == pytest.approx(max(0.4 - 0.02 * information, 0), abs=1e-4)


@pytest.mark.parametrize("options", [{"cls_weight": 0.0}, {"coarse_cut": False}])
def test_without_the_cls_term_no_cls_attention_is_needed(model, options):
    batch = Batch(model)
    with AutoPrune(**BASE, **options).attach(model) as run, torch.no_grad():
        assert not run.needs_cls_attention and run.vision_facts(24) == {}
        run.set_visual(batch.alone(0)["layout"])
        model(inputs_embeds=batch.embeds[0][None])
    assert len(run.traces) == 1


def test_terms_of_the_score_of_layer_0(model, maps):
    sign = mutual_information(maps[0]).sum().sign()
    by_text = (sign * maps[0].mean((0, 1))).topk(20).indices.sort().values
    assert torch.equal(trace_of(model, cls_weight=0.0).kept[0], by_text)
    by_cls = Batch(model).cls[0].topk(20).indices.sort().values
    assert torch.equal(trace_of(model, text_weight=0.0).kept[0], by_cls)
    assert not torch.equal(by_text, by_cls)


def test_layer_of_the_information(model, maps):
    first = trace_of(model, mi_layer=0)
    information = mutual_information(maps[0]).sum().item()
    assert first.mutual_information == {"layer0": pytest.approx(information / 7, rel=1e-3)}
    assert first.slope == pytest.approx(max(0.4 - 0.02 * information, 0), abs=1e-4)
    third = trace_of(model, mi_layer=3)
    assert set(third.mutual_information) == {"layer0", "layer3"}
    assert third.slope == pytest.approx(max(0.4 - 0.02 * third.mutual_information["layer3"], 0), abs=1e-6)
    assert third.tokens_out[:3] == [20, 20, 20] and third.tokens_out[3] < 20


def test_fixed_slope_instead_of_information(model):
    assert trace_of(model, gamma=0.0).slope == 0.4 > trace_of(model).slope > 0


@pytest.mark.parametrize("target", [12, 20, 30])
def test_processed_budget_counts_the_full_first_layer(model, target):
    nominal, processed = (
        trace_of(model, target_tokens=target),
        trace_of(model, target_tokens=target, budget="processed"),
    )
    assert nominal.mean_tokens("processed") > target + 1
    assert abs(processed.mean_tokens("processed") - target) <= 1.5 and processed.tokens_in[0] == 48
    assert (processed.budget, nominal.budget) == ("processed", "nominal")
