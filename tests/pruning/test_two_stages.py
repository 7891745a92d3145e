"""CATP and VFlowOpt, which choose in front of the decoder and go on in it, against loops over their formulas, one at a
time, on transformers' own states and attention.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava.pruning import get_method
from llava.pruning.methods.catp import Plan, planned
from llava.pruning.reduction import Crop, reduce_crops
from tests.pruning import naive
from tests.pruning.models import Batch, generate, random_llama

THREE = (2, 12, 3, 10, 4, 14, 6)  # text, image, text, ...: two demonstrations and a query
TOGETHER = (1, 9, 0, 8, 5)  # two images side by side share the text behind them
LAYER = 2


@pytest.fixture(scope="module")
def model():
    return random_llama("eager")


def images_and_texts(sample) -> tuple[list[list[int]], list[list[int]]]:
    """Slots of each image, and of the text behind it."""
    images, texts, start = [], [], 0
    for place, length in enumerate(sample):
        (images if place % 2 else texts).append(list(range(start, start + length)))
        start += length
    return images, texts[1:]


def moved(a, b) -> float:
    return (naive.cosine(a, b) + 1) / 2


def first_stage(embeds, image, text, count, weight) -> list[int]:
    mean = embeds[text].double().mean(0)
    chosen: list[int] = []
    while len(chosen) < count:
        worth = {}
        for candidate in image:
            if candidate not in chosen:
                among = [*chosen, candidate]
                cover = sum(max(moved(embeds[y], embeds[x]) for y in among) for x in image)
                worth[candidate] = cover + weight * sum(moved(embeds[y], mean) for y in among)
        chosen.append(max(worth, key=lambda slot: (worth[slot], -slot)))
    return sorted(chosen)


def through(model, index, hidden):
    """States behind one layer, by transformers, for tokens numbered from 0."""
    size = len(hidden)
    mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
    tables = model.model.rotary_emb(hidden[None], torch.arange(size)[None])
    with torch.no_grad():
        out = model.model.layers[index](hidden[None], attention_mask=mask, position_embeddings=tables)
    return (out[0] if isinstance(out, tuple) else out).reshape(size, -1)


def expected(model, sample, embeds, plan: Plan, alignment, relevance):
    """Slots of the visual tokens behind each of the stages."""
    images, texts = images_and_texts(sample)
    texts = [own or texts[number + 1] for number, own in enumerate(texts)]
    kept = [
        first_stage(embeds, image, text, count, alignment)
        for image, text, count in zip(images, texts, plan.images, strict=True)
    ]
    visual = {slot for image in images for slot in image}
    slots = [slot for slot in range(len(embeds)) if slot not in visual or any(slot in own for own in kept)]
    with torch.no_grad():
        out = model.model(
            inputs_embeds=embeds[slots][None], output_attentions=True, output_hidden_states=True, use_cache=False
        )
    state = dict(zip(slots, out.hidden_states[LAYER + 1][0], strict=True))
    grown = {}
    for place, slot in enumerate(slots):
        before, now = (float(out.attentions[layer][0, :, -1, place].double().mean()) for layer in (LAYER - 1, LAYER))
        grown[slot] = max(now - before, 0.0)
    query = torch.stack([state[slot] for slot in slots if slot >= kept[-1][0]]).double().mean(0)
    scores = {slot: grown[slot] + relevance * naive.cosine(state[slot], query) for own in kept for slot in own}
    first = sorted(slot for own in kept for slot in own)
    competing = [slot for own in kept[:-1] for slot in own] or kept[-1]
    count = plan.behind - (len(kept[-1]) if len(kept) > 1 else 0)
    winners = sorted(competing, key=lambda slot: (-scores[slot], slot))[:count]
    second = sorted([*winners, *(kept[-1] if len(kept) > 1 else [])])
    if len(kept) == 1:
        return first, second, second
    slots = [slot for slot in slots if slot not in visual or slot in second]
    states = through(model, LAYER + 1, torch.stack([state[slot] for slot in slots]))
    behind = dict(zip(slots, states, strict=True))
    context = torch.stack([behind[slot] for slot in slots if second[0] <= slot < kept[-1][0]]).double().mean(0)
    ranked = sorted(kept[-1], key=lambda slot: (-naive.cosine(behind[slot], context), slot))
    third = sorted(winners + ranked[: plan.left - len(winners)])
    return first, second, third


@pytest.mark.parametrize("sample", [THREE, TOGETHER, (4, 20, 7)])
@pytest.mark.parametrize(("drop", "weights"), [(0.4, (0.7, 0.6)), (0.7, (3.0, 0.02)), (0.9, (0.05, 0.6))])
def test_catp_equals_a_naive_loop(model, sample, drop, weights):
    batch = Batch(model, samples=(sample,))
    method = get_method("catp")(drop=drop, layer=LAYER, alignment=weights[0], relevance=weights[1])
    _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
    plan = Plan.of(sample[1::2], drop)
    visual = [slot for image in images_and_texts(sample)[0] for slot in image]
    stages = expected(model, sample, batch.embeds[0], plan, *weights)
    for layer, slots in zip((LAYER - 1, LAYER, LAYER + 1), stages, strict=True):
        assert [visual[i] for i in trace.kept[layer].tolist()] == slots
    assert trace.tokens_in == plan.entering(6, LAYER) and trace.target_tokens is None


def test_rows_with_different_numbers_of_images_equal_the_rows_alone(model):
    batch = Batch(model, samples=(THREE, (5, 9, 3), TOGETHER, (11,), (4, 30, 2, 7, 5)))
    method = get_method("catp")(target_tokens=9, layer=1)
    together = generate(model, method, batch.together([0, 1, 2, 3, 4]), new_tokens=1)[2]
    for row, trace in enumerate(together):
        (alone,) = generate(model, method, batch.alone(row), new_tokens=1)[2]
        assert [kept.tolist() for kept in alone.kept] == [kept.tolist() for kept in trace.kept]


def test_behind_another_method_images_are_known_by_their_tokens(model):
    """Random choice leaves each image as many as it happens to."""
    batch = Batch(model, samples=(THREE,))
    options = {"random.target_tokens": 15, "drop": 0.5, "layer": 2}
    _, _, (trace,) = generate(model, get_method("random+catp").from_options(options), batch.alone(0), new_tokens=1)
    (alone,) = generate(model, get_method("random")(target_tokens=15), batch.alone(0), new_tokens=1)[2]
    left = [sum(first <= i < end for i in alone.kept[0].tolist()) for first, end in ((0, 12), (12, 22), (22, 36))]
    assert trace.tokens_in == Plan.of(left, 0.5).entering(6, 2)


def test_published_setting_of_catp():
    """Four demonstrations and a query of 576 tokens each, 77.8% dropped, layer 6 of 32."""
    plan = Plan.of([576] * 5, 0.778)
    assert plan.images == (351,) * 5 and plan.left == int(4 * 576 * 0.222) + int(576 * 0.222)
    assert get_method("catp")().stages(32).keys() == {-1, 5, 6, 7}
    assert get_method("catp")().stages(40).keys() == {-1, 9, 10, 11}
    for target in (2880, 2000, 1400, 1000):
        counts = planned((576,) * 5, 32, 6, target).entering(32, 6)
        assert counts == sorted(counts, reverse=True)
        assert abs(sum(counts) / 32 - target) <= 1


# --- VFlowOpt ---


def crop(seed: int) -> Crop:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(36, generator=generator) ** 6
    importance[:12] *= seed != 1  # the upper third of one is padding
    return Crop(torch.randn(36, 12, generator=generator), {"importance": importance})


@pytest.mark.parametrize("side", [1.0, 2.0, 2.5, 4.4, 17.4])
@pytest.mark.parametrize("target", [1, 2, 9, 20, 35])
def test_first_stage_of_vflowopt_equals_a_naive_loop(target, side):
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
def test_published_settings_of_vflowopt(ratio, shares, threshold):
    """28 layers, ten crops of 27 x 27 patches; the published shares give these means to half a percent."""
    method = get_method("vflowopt")(target_ratio=ratio)
    assert abs(method.vision_facts(26)["importance"].value.threshold - threshold) < 0.01
    first = method.aim_in_front(7290)
    plan = method._plan(first, 7290, 28)
    assert abs(first / 7290 - shares[0]) < 0.003
    assert abs(plan[8] / first - shares[1]) < 0.003 and abs(plan[17] / plan[8] - shares[2]) < 0.003
    assert abs(9 * first + 9 * plan[8] + 10 * plan[17] - 28 * 7290 * ratio) < 28
