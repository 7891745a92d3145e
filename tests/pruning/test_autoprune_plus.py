"""AutoPrune+ against naive loops: the first cut one token at a time, the curve one count at a time."""

from __future__ import annotations

import math

import pytest
import torch

from llava.pruning import VisualLayout, get_method
from llava.pruning.methods.autoprune_plus import entering_counts, question_relevance
from tests.pruning import naive
from tests.pruning.models import Batch, generate, random_llama


@pytest.fixture(scope="module")
def model():
    return random_llama(layers=12)


def naive_weights(tokens, text, cls, relevance, saliency) -> list[float]:
    """Of one sample, in float64."""
    tokens, text = tokens.double(), text.double()
    mean = sum(tokens) / len(tokens)
    best = []
    for token in tokens:
        own = token - mean
        products = [float(own @ word) / float(own.norm()) ** 0.5 / float(word.norm()) for word in text]
        best.append(max(products))
    low, high = min(best), max(best)
    most = max(float(value) for value in cls)
    return [
        ((value - low) / (high - low)) ** relevance * (float(attention) / most) ** saliency
        for value, attention in zip(best, cls, strict=True)
    ]


def naive_first_cut(tokens, weights, picks) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < picks:
        gains = {}
        for i in range(len(tokens)):
            if i not in chosen:
                distances = [1 - naive.cosine(tokens[i], tokens[j]) for j in chosen]
                gains[i] = weights[i] * min(distances, default=2.0)
        chosen.append(max(sorted(gains), key=lambda i: gains[i]))
    return chosen


@pytest.mark.parametrize(
    ("target", "relevance", "saliency"), [(3, 2.0, 0.5), (9, 0.0, 1.0), (5, 4.0, 0.0), (14, 1.0, 2.0)]
)
def test_first_cut_equals_a_naive_loop_in_every_row(model, target, relevance, saliency):
    """Rows of different make-up in one batch, one of them without pictures and one that keeps all it has."""
    batch = Batch(model)
    method = get_method("autoprune_plus")(target_tokens=target, relevance=relevance, saliency=saliency, slope=0.0)
    _, _, traces = generate(model, method, batch.together(range(len(batch.embeds))), new_tokens=1)
    for row, trace in enumerate(traces):
        if not batch.spans[row]:
            continue
        places = [place for start, end in batch.spans[row] for place in range(start, end)]
        tokens, text = batch.embeds[row][places], batch.embeds[row][places[-1] + 1 :]
        weights = naive_weights(tokens, text, batch.cls[row], relevance, saliency)
        expected = sorted(naive_first_cut(tokens, weights, target))
        assert trace.kept[0].tolist() == expected and trace.tokens_out == [target] * 12


def test_what_all_tokens_share_does_not_count(model):
    """One vector more in all visual tokens, however long, changes no relevance; lengths of words change none either."""
    generator = torch.Generator().manual_seed(5)
    embeds = torch.randn(1, 50, 64, generator=generator, dtype=torch.float32)
    other = embeds.clone()
    other[:, 4:40] += 20 * torch.randn(64, generator=generator)
    other[:, 40:] *= torch.rand(10, 1, generator=generator) + 0.5
    kept = []
    for given in (embeds, other):
        kept.append(question_relevance(given[:, 4:40], None, given[:, 40:], None))
    torch.testing.assert_close(kept[0], kept[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 3, 12, 32])
@pytest.mark.parametrize(("x0", "slope"), [(14.5, 8.0), (14.5, 0.5), (0.0, 2.0), (40.0, 0.0), (20.0, 300.0)])
@pytest.mark.parametrize("visual", [1, 48, 576])
def test_counts_fall_and_meet_the_budget(layers, x0, slope, visual):
    for target in {1, 2, 7, 16, 33, visual // 2, visual - 1, visual, visual + 5} - {0, -1}:
        counts = entering_counts(visual, layers, target, x0, slope)
        assert len(counts) == layers and max(counts) <= visual and min(counts) >= 1
        assert all(a >= b for a, b in zip(counts, counts[1:], strict=False))
        missing = layers * min(target, visual) - sum(counts)
        # Where all layers keep alike, one token more is one in every layer.
        assert 0 <= missing < layers if layers > 1 else missing == 0, (target, counts)


def test_counts_follow_the_logistic_curve():
    """Before rounding leaves anything over: proportions by hand, at two depths."""
    for layers in (32, 16):
        counts = entering_counts(576, layers, 64, 14.5, 0.5)
        share = [1 / (1 + math.exp(0.5 * (layer * 32 / layers - 14.5))) for layer in range(layers)]
        height = counts[0]
        for layer, count in enumerate(counts):
            assert abs(count - max(height * share[layer] / share[0], 1)) <= 1.5


def test_the_default_curve_is_a_step_in_the_middle():
    assert entering_counts(576, 32, 16, 14.5, 8.0) == (*[33] * 15, *[1] * 17)
    assert entering_counts(576, 12, 8, 14.5, 8.0)[5] > 10 > 2 >= entering_counts(576, 12, 8, 14.5, 8.0)[6]
    # Beyond what the first half can hold, the bend moves back; at a full budget nothing is dropped.
    late = entering_counts(576, 32, 300, 14.5, 8.0)
    assert late[0] == 576 and sum(late) == 300 * 32
    assert entering_counts(576, 32, 576, 14.5, 8.0) == (576,) * 32


def test_a_full_budget_changes_nothing(model):
    batch = Batch(model)
    rows = range(len(batch.embeds))
    dense, _, _ = generate(model, get_method("dense")(), batch.together(rows), new_tokens=3)
    full, _, traces = generate(
        model, get_method("autoprune_plus")(target_tokens=60), batch.together(rows), new_tokens=3
    )
    assert torch.equal(full, dense)
    assert all(trace.tokens_out == [trace.visual_tokens] * 12 for trace in traces)


@pytest.mark.parametrize("text_weight", [0.0, 0.5, 1.0])
def test_ranking_between_layers_averages_ranks(model, text_weight):
    """The tokens that go after the layer in front of the bend are the last by averaged ranks, and no rows are asked
    for where the attention of the text does not count.
    """
    seen = []
    method = get_method("autoprune_plus")(target_tokens=20, slope=2.0, text_weight=text_weight)
    kind = type(method)

    class Watched(kind):
        def select(self, view, memory):
            selection = super().select(view, memory)
            if selection is not None and view.layer >= 0:
                attended = None if view.relevance_BV is None else view.relevance_BV[0].clone()
                seen.append((attended, memory.carried["first_cut"][0].clone(), selection.keep_BK[0].tolist()))
            return selection

    watched = Watched(target_tokens=20, slope=2.0, text_weight=text_weight)
    generate(model, watched, Batch(model).alone(0), new_tokens=1)
    assert len(seen) >= 2
    for attended, first, kept in seen:
        assert (attended is None) == (text_weight == 0)
        count = len(first)
        before = {token: place for place, token in enumerate(naive.ranked(first))}
        by_text = before if attended is None else {t: place for place, t in enumerate(naive.ranked(attended))}
        place = [text_weight * by_text[t] + (1 - text_weight) * before[t] for t in range(count)]
        assert kept == sorted(sorted(range(count), key=lambda t: (place[t], t))[: len(kept)])


def test_without_cls_attention(model):
    """Nobody has to give any where saliency is left out."""
    layout = VisualLayout.from_spans([[(4, 52)]])
    embeds = Batch(model).alone(0)
    assert get_method("autoprune_plus")(saliency=0.0).needs_cls is False and embeds
    with get_method("autoprune_plus")(target_tokens=9, saliency=0.0).attach(model) as run, torch.no_grad():
        run.set_visual(layout)
        model.model(inputs_embeds=torch.randn(1, 60, 64), use_cache=True)
        assert run.traces[0].tokens_in[0] <= 48
