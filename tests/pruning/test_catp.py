"""CATP against loops over its paper's formulas, one number at a time, on transformers' own states and attention."""

from __future__ import annotations

import pytest
import torch

from llava.pruning import get_method
from llava.pruning.methods.catp import Plan, planned
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


def test_published_setting():
    """Four demonstrations and a query of 576 tokens each, 77.8% dropped, layer 6 of 32."""
    plan = Plan.of([576] * 5, 0.778)
    assert plan.images == (351,) * 5 and plan.left == int(4 * 576 * 0.222) + int(576 * 0.222)
    assert get_method("catp")().stages(32).keys() == {-1, 5, 6, 7}
    assert get_method("catp")().stages(40).keys() == {-1, 9, 10, 11}
    for target in (2880, 2000, 1400, 1000):
        counts = planned((576,) * 5, 32, 6, target).entering(32, 6)
        assert counts == sorted(counts, reverse=True)
        assert abs(sum(counts) / 32 - target) <= 1
