"""VFlowOpt against a naive loop, and its published settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava.pruning import get_method
from llava.pruning.reduction import Crop, reduce_crops
from tests.pruning import naive
from tests.pruning.models import Batch, generate, random_llama


def crop(seed: int) -> Crop:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(36, generator=generator) ** 6
    importance[:12] *= seed != 1  # the upper third of one is padding
    return Crop(torch.randn(36, 12, generator=generator), {"importance": importance})


@pytest.mark.parametrize("side", [1.0, 2.0, 2.5, 4.4, 17.4])
@pytest.mark.parametrize("target", [1, 2, 9, 20, 35])
def test_first_stage_equals_a_naive_loop(target, side):
    crops = [crop(seed) for seed in range(3)]
    for one, got in zip(crops, reduce_crops(get_method("vflowopt")(side=side), crops, [target] * 3), strict=True):
        places, features = naive.vflowopt(one.tokens_PC, one.facts["importance"], 6, target, side)
        assert got.origin_K.tolist() == got.source_K.tolist() == places
        torch.testing.assert_close(got.tokens_KC.double(), features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close((got.weights() @ one.tokens_PC).double(), features, atol=1e-5, rtol=1e-5)


def test_crops_without_some_patches_and_without_a_grid():
    whole = crop(0)
    half = Crop(whole.tokens_PC[:18], {"importance": whole.facts["importance"][:18]}, torch.arange(18), 36)
    line = replace(half, patches_P=None, patches=None)
    for one in (half, line):
        (got,) = reduce_crops(get_method("vflowopt")(side=3.0), [one], [7])
        assert len(got.origin_K) == len(set(got.origin_K.tolist())) == 7


def test_cuts_in_the_decoder_go_by_the_same_importance():
    model = random_llama(layers=28)
    batch = Batch(model, samples=((4, 48, 7),))
    _, _, (trace,) = generate(model, get_method("vflowopt")(target_tokens=24), batch.alone(0), new_tokens=1)
    first, second, third = trace.tokens_in[0], trace.tokens_in[9], trace.tokens_in[18]
    assert trace.tokens_in == [first] * 9 + [second] * 9 + [third] * 10 and first > second > third
    assert abs(trace.mean_tokens("processed") - 24) < 0.5
    importance = batch.facts[0]["importance"]
    kept = trace.kept[0].tolist()
    for layer, count in ((8, second), (17, third)):
        kept = sorted(naive.ranked(importance, kept)[:count])
        assert trace.kept[layer].tolist() == kept


@pytest.mark.parametrize(
    ("ratio", "shares", "threshold"),
    [
        (0.10, (0.1166, 1.0, 0.6011), 39.26),
        (0.25, (0.2651, 0.9833, 0.8773), 34.76),
        (0.50, (0.7233, 0.7487, 0.487), 28.68),
    ],
)
def test_published_settings(ratio, shares, threshold):
    """28 layers, ten crops of 27 x 27 patches; the published shares give these means to half a percent."""
    method = get_method("vflowopt")(target_ratio=ratio)
    assert abs(method.vision_facts(26)["importance"].value.threshold - threshold) < 0.01
    first = method.aim_in_front(7290)
    plan = method._plan(first, 7290, 28)
    assert abs(first / 7290 - shares[0]) < 0.003
    assert abs(plan[8] / first - shares[1]) < 0.003 and abs(plan[17] / plan[8] - shares[2]) < 0.003
    assert abs(9 * first + 9 * plan[8] + 10 * plan[17] - 28 * 7290 * ratio) < 28
