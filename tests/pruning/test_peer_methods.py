"""Peer methods against naive loops on random tensors, and what all methods promise about budgets."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.pruning import OptionError, get_method
from llava.pruning.budget import plan_stages
from llava.pruning.methods import adaptinfer, sparsevlm, sparsevlm_v2
from llava.pruning.methods.agilepruner import effective_rank
from llava.pruning.methods.pdrop import PDrop
from llava.pruning.methods.sparsevlm import keep_list
from llava.pruning.methods.todre import max_sum_order
from llava.pruning.methods.tome import bipartite_merge, merges_per_layer
from llava.pruning.methods.transprune import plan_cuts, transition
from llava.pruning.recycling import prune_step
from llava.pruning.reduction import Crop, reduce_crops
from llava.pruning.scores import text_raters
from llava.pruning.vision import merge_tokens
from tests.pruning import naive
from tests.pruning.models import Batch, generate, masked_oracle, random_llama

CONSTANT = ("random", "uniform", "fastervlm", "divprune")


@pytest.fixture(scope="module")
def model():
    return random_llama()


def crop(patches: int, seed: int, with_cls: bool = True) -> Crop:
    generator = torch.Generator().manual_seed(seed)
    facts = {name: torch.rand(patches, generator=generator) ** 6 for name in ("cls_attention", "cls", "object", "deep")}
    facts["keys"] = torch.randn(patches, 6, generator=generator)
    cls = torch.randn(12, generator=generator) if with_cls else None
    tokens = torch.randn(patches, 12, generator=generator)
    facts["local"] = torch.rand(patches, generator=generator) ** 6  # drawn last: the rest stays as it was
    return Crop(tokens, facts, cls_C=cls)


def reduce(method, crops, target):
    return reduce_crops(method, crops, [target] * len(crops))


@pytest.mark.parametrize("target", [1, 2, 9, 20, 35])
def test_visionzip_equals_a_naive_loop(target):
    crops = [crop(36, seed) for seed in range(3)]
    contextual = round(target * 10 / 64)
    for one, got in zip(crops, reduce(get_method("visionzip")(), crops, target), strict=True):
        kept, merged = naive.visionzip(
            one.tokens_PC, one.facts["cls_attention"], one.facts["keys"], target - contextual - 1, contextual
        )
        assert got.origin_K.tolist() == [*kept, -1, *[-1] * contextual]
        expected = torch.stack([*one.tokens_PC[kept].double(), one.cls_C.double(), *merged])
        torch.testing.assert_close(got.tokens_KC.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("total", "contextual"), [(192, 30), (128, 20), (64, 10), (32, 5)])
def test_visionzip_splits_as_published(total, contextual):
    (got,) = reduce(get_method("visionzip")(), [crop(576, 0)], total)
    assert (got.origin_K >= 0).sum() == total - contextual - 1  # and the CLS token


def test_visionzip_without_a_cls_token_keeps_a_patch_instead():
    (got,) = reduce(get_method("visionzip")(), [crop(36, 0, with_cls=False)], 20)
    assert (got.origin_K >= 0).sum() == 17 and len(got.origin_K) == 20


@pytest.mark.parametrize("spacing", ["stride", "rest"])
@pytest.mark.parametrize("target", [1, 2, 5, 12, 35])
def test_prumerge_plus_equals_a_naive_loop(target, spacing):
    crops = [crop(36, seed) for seed in range(3)]
    method = get_method("prumerge_plus")(neighbors=7, spacing=spacing)
    for one, got in zip(crops, reduce(method, crops, target), strict=True):
        facts = one.facts["cls"], one.facts["keys"]
        kept, merged, extra = naive.prumerge_plus(one.tokens_PC, *facts, target, 7, spacing)
        parts = [*merged, extra] if target > 1 else merged
        assert got.origin_K.tolist() == [*kept, *[-1] * (len(parts) - len(kept))]
        torch.testing.assert_close(got.tokens_KC.double(), torch.stack(parts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("outliers", [1, 3, 29, 31, 60, 95])
def test_prumerge_plus_chooses_as_published_where_the_budget_is_what_that_gives(outliers):
    """The whole of LLaVA-1.5's picture: outliers, and of 0..574 what their share makes the stride."""
    one = crop(576, 0)
    attention = torch.linspace(1.0, 2.0, 576)[torch.randperm(576, generator=torch.Generator().manual_seed(outliers))]
    attention[torch.randperm(576, generator=torch.Generator().manual_seed(1))[:outliers]] += 5
    one.facts["cls"].copy_(attention)
    found = [i for i in range(576) if attention[i] > 3]
    chosen = set(found) | set(range(0, 575, max(int(int(1 / (outliers / 576)) / 3), 1)))
    (got,) = reduce(get_method("prumerge_plus")(neighbors=2), [one], len(chosen) + 1)
    assert len(found) == outliers and got.origin_K.tolist() == [*sorted(chosen), -1]


@pytest.mark.parametrize(("target", "alpha"), [(1, 0.1), (9, 0.6), (20, 1.0), (3, 1.0), (35, 0.1)])
def test_hiprune_equals_a_naive_loop(target, alpha):
    crops = [crop(36, seed) for seed in range(3)]
    for one, got in zip(crops, reduce(get_method("hiprune")(alpha=alpha), crops, target), strict=True):
        expected = naive.hiprune(one.facts["object"], one.facts["deep"], 6, target, alpha)
        assert got.origin_K.tolist() == got.source_K.tolist() == expected
        assert torch.equal(got.tokens_KC, one.tokens_PC[expected])


@pytest.mark.parametrize(("target", "option"), [(1, 0.5), (2, 0.5), (9, 0.25), (20, 0.0), (21, 0.7), (35, 1.0)])
@pytest.mark.parametrize(("name", "key"), [("vispruner", "important_ratio"), ("scope", "alpha")])
def test_vispruner_and_scope_equal_a_naive_loop(name, key, target, option):
    crops = [crop(36, seed) for seed in range(3)]
    for one, got in zip(crops, reduce(get_method(name)(**{key: option}), crops, target), strict=True):
        expected = getattr(naive, name)(one.tokens_PC, one.facts["cls_attention"], target, option)
        assert got.origin_K.tolist() == got.source_K.tolist() == expected
        assert torch.equal(got.tokens_KC, one.tokens_PC[expected])


@pytest.mark.parametrize(("target", "step"), [(1, 0.01), (2, 0.5), (9, 0.1), (19, 0.01)])
def test_zooprune_equals_a_naive_loop(target, step):
    crops = [crop(20, seed) for seed in range(3)]
    first, second = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0)).double()

    def project(tokens):
        return (torch.tanh(tokens.double() @ first / 2) @ second).to(tokens.dtype)

    method = get_method("zooprune")(directions=5, step=step, seed=3)
    directions = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    for one, got in zip(crops, reduce_crops(method, crops, [target] * 3, project), strict=True):
        expected = naive.zooprune(one.tokens_PC, project, directions, step, target)
        assert got.origin_K.tolist() == got.source_K.tolist() == expected
        assert torch.equal(got.tokens_KC, one.tokens_PC[expected])


def test_zooprune_where_all_patches_are_equally_sensitive_goes_by_distance(caplog):
    """Behind a linear projector, and where there is none to see."""
    one = crop(20, 0)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    chosen = [0]
    while len(chosen) < 6:
        rest = [i for i in range(20) if i not in chosen]
        chosen.append(
            max(rest, key=lambda i: min(1 - naive.cosine(one.tokens_PC[i], one.tokens_PC[j]) for j in chosen))
        )
    for project in (lambda tokens: tokens @ turn, None, None):
        assert not caplog.records or project is None
        (got,) = reduce_crops(get_method("zooprune")(), [one], [6], project)
        assert got.origin_K.tolist() == sorted(chosen)
    assert [record.message for record in caplog.records] == [
        "zooprune: the projector is out of sight here, so all patches are taken as equally sensitive"
    ]


@pytest.mark.parametrize("options", [(0.5, 0.02, 0.2), (0.0, 0.5, 0.2), (2.0, 0.1, 1.0)])
@pytest.mark.parametrize("target", [1, 2, 9])
def test_mmtok_equals_a_naive_loop(target, options):
    crops = [crop(20, seed) for seed in range(3)]
    texts = [torch.randn(length, 12, generator=torch.Generator().manual_seed(length)) for length in (3, 7)]
    for one, prompt in zip(crops, (0, 1, 0), strict=True):
        object.__setattr__(one, "prompt", prompt)
    names = ("vision_weight", "text_temperature", "vision_temperature")
    method = get_method("mmtok")(**dict(zip(names, options, strict=True)))
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    stretch = torch.arange(1.0, 13.0)
    reduced = reduce_crops(method, crops, [target] * 3, project=lambda tokens: tokens * stretch @ turn, texts=texts)
    for one, got in zip(crops, reduced, strict=True):
        projected = one.tokens_PC * stretch @ turn
        expected = naive.mmtok(one.tokens_PC, projected, texts[one.prompt], target, options[0], options[1:])
        assert got.origin_K.tolist() == got.source_K.tolist() == expected
        assert torch.equal(got.tokens_KC, one.tokens_PC[expected])


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize(("window", "share"), [(2, 0.5), (3, 0.9), (4, 1.0), (6, 0.5), (1, 0.0)])
@pytest.mark.parametrize("target", [1, 2, 9, 20, 35])
def test_vscan_equals_a_naive_loop(target, window, share, fill):
    crops = [crop(36, seed) for seed in range(3)]
    method = get_method("vscan")(window=window, local_share=share, fill=fill)
    for one, got in zip(crops, reduce(method, crops, target), strict=True):
        attention = one.facts["local"], one.facts["cls_attention"]
        kept, merged = naive.vscan(one.tokens_PC, *attention, 6, target, window, share, fill)
        assert got.origin_K.tolist() == got.source_K.tolist() == kept
        torch.testing.assert_close(got.tokens_KC.double(), merged, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close((got.weights() @ one.tokens_PC).double(), merged, atol=1e-5, rtol=1e-5)


def test_vscan_fills_windows_that_unpadding_has_emptied():
    """Of the upper half of a crop: two of four windows have patches, and the budget is met all the same."""
    one = replace(crop(18, 0), patches_P=torch.arange(18), patches=36)
    (got,) = reduce(get_method("vscan")(window=3, local_share=1.0), [one], 12)
    local, cls = one.facts["local"], one.facts["cls_attention"]
    chosen = [i for side in (0, 1) for i in naive.ranked(local, [i for i in range(18) if i % 6 // 3 == side])[:3]]
    assert got.origin_K.tolist() == sorted(chosen + [i for i in naive.ranked(cls) if i not in chosen][:6])


@pytest.mark.parametrize(("target", "left"), [(64, 32), (128, 64), (192, 96), (500, 424), (600, None)])
def test_vscan_splits_the_budget_as_published(target, left):
    method = get_method("vscan")(target_tokens=target)
    entering = min(method.aim_in_front(576), 576)
    assert entering == min(target * 3 // 2, 576)
    plan = method._plan(entering, 576, 32)
    assert plan == {16: entering if left is None else left}


def test_vscan_asks_the_next_layer(model):
    """Row of the last token, from the norm and projections of the layer that has not run yet."""
    batch = Batch(model)
    method = get_method("vscan")(layers="2", tokens="48/20", positions="original")
    _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
    _, maps = eager_states(batch, 0)
    assert trace.tokens_in == [48, 48, 20, 20, 20, 20]
    assert trace.kept[1].tolist() == sorted(naive.ranked(maps[2][0, :, -1, 4:52].double().mean(0))[:20])


@pytest.mark.parametrize(("chunks", "alpha"), [(16, 0.09), (5, 2.0), (1, 0.5), (60, 0.09)])
@pytest.mark.parametrize("target", [1, 2, 9, 20, 35])
def test_holov_equals_a_naive_loop(target, chunks, alpha):
    crops = [crop(36, seed) for seed in range(3)]
    for one, got in zip(crops, reduce(get_method("holov")(chunks=chunks, alpha=alpha), crops, target), strict=True):
        expected = naive.holov(one.tokens_PC, one.facts["cls_attention"], target, chunks, alpha)
        assert got.origin_K.tolist() == got.source_K.tolist() == expected
        assert torch.equal(got.tokens_KC, one.tokens_PC[expected])


def test_holov_without_any_attention_spreads_the_budget():
    one = crop(36, 0)
    one.facts["cls_attention"].zero_()
    (got,) = reduce(get_method("holov")(chunks=6), [one], 12)
    assert got.origin_K.tolist() == [start + i for start in range(0, 36, 6) for i in range(2)]


@pytest.mark.parametrize("target", [1, 2, 9, 12])
@pytest.mark.parametrize("kind", ["text", "clip"])
def test_cdpruner_equals_a_naive_loop(kind, target):
    """Crops 0 and 2 are of one prompt: their relevance is normalized together."""
    generator = torch.Generator().manual_seed(target)
    crops = [crop(36, seed) for seed in range(3)]
    for one, prompt in zip(crops, (0, 1, 0), strict=True):
        one.facts["relevance"] = torch.randn(36, generator=generator)
        object.__setattr__(one, "prompt", prompt)
    texts = [torch.randn(length, 12, generator=generator) for length in (3, 5)]
    got = reduce_crops(get_method("cdpruner")(relevance=kind), crops, [target] * 3, texts=texts)
    given = [
        [float(value) for value in one.facts["relevance"]]
        if kind == "clip"
        else [
            sum(naive.cosine(token, word) for word in texts[one.prompt]) / len(texts[one.prompt])
            for token in one.tokens_PC
        ]
        for one in crops
    ]
    for place, members in ((0, (0, 2)), (1, (1,)), (2, (0, 2))):
        bounds = [bound(given[member]) for member in members for bound in (min, max)]
        expected = naive.cdpruner(crops[place].tokens_PC, given[place], target, min(bounds), max(bounds))
        assert got[place].origin_K.tolist() == got[place].source_K.tolist() == expected


def test_cdpruner_beyond_the_rank_of_the_features_keeps_the_first_patches():
    one = crop(36, 0)
    object.__setattr__(one, "tokens_PC", one.tokens_PC[:4].repeat(9, 1))
    (got,) = reduce(get_method("cdpruner")(relevance="none"), [one], 9)
    assert got.origin_K.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("tokens", "count", "has_cls"), [(13, 4, True), (12, 6, False), (9, 1, True), (2, 1, False)])
def test_bipartite_merge_equals_a_naive_loop(tokens, count, has_cls):
    generator = torch.Generator().manual_seed(tokens)
    keys, values = torch.randn(2, tokens, 5, generator=generator), torch.randn(2, tokens, 4, generator=generator)
    sizes = torch.randint(1, 4, (2, tokens), generator=generator).float()
    merge = bipartite_merge(keys, count, has_cls)
    merged, new_sizes = merge_tokens(values, sizes, merge)
    for row in range(2):
        expected, _, left, places = naive.tome_step(
            list(values[row]), list(keys[row]), sizes[row].tolist(), list(range(tokens)), count, has_cls
        )
        assert merge.leader_NK[row].tolist() == places and new_sizes[row].tolist() == left
        torch.testing.assert_close(merged[row].double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", [1, 5, 17, 35])
def test_tome_behind_the_tower_equals_a_naive_loop(target):
    one = crop(36, 5)
    (got,) = reduce(get_method("tome")(inside=False), [one], target)
    tokens, keys, sizes, places = list(one.tokens_PC), list(one.facts["keys"]), [1.0] * 36, list(range(36))
    while len(tokens) > target:
        count = min(len(tokens) // 2, len(tokens) - target)
        tokens, keys, sizes, places = naive.tome_step(tokens, keys, sizes, places, count, False)
    order = sorted(range(target), key=lambda i: places[i])
    assert got.source_K.tolist() == [places[i] for i in order]
    assert got.origin_K.tolist() == [places[i] if sizes[i] == 1 else -1 for i in order]
    torch.testing.assert_close(got.tokens_KC.double(), torch.stack([tokens[i].double() for i in order]))


@pytest.mark.parametrize(("target", "layers"), [(64, 23), (128, 23), (1, 23), (17, 6), (3, 4), (576, 5)])
def test_tome_meets_its_budget_by_merging_alike_in_all_layers(target, layers):
    each, left, counts = merges_per_layer(576, target, layers), 576, []
    for _ in range(layers):
        left -= min(each, left // 2, left - min(left, target))
        counts.append(left)
    assert counts == naive.tome_schedule(576, target, layers)
    assert counts[-1] == max(target, 576 // 2**layers)


def test_tome_merges_as_many_in_every_layer_as_published():
    """576 patches to 192 in 23 layers."""
    assert merges_per_layer(576, 192, 23) == 17
    assert naive.tome_schedule(576, 192, 23) == [*range(576 - 17, 201, -17), 192]


def test_text_raters_equal_a_naive_loop_in_every_row():
    generator = torch.Generator().manual_seed(0)
    visual, text = torch.randn(3, 9, 4, generator=generator), torch.randn(3, 6, 4, generator=generator)
    counts, rows = (9, 4, 7), (6, 3, 1)
    mask = text_raters(visual, counts, text, rows)
    for row in range(3):
        expected = naive.raters(visual[row, : counts[row]], text[row, 6 - rows[row] :])
        assert mask[row].tolist() == [False] * (6 - rows[row]) + expected
    assert 0 < mask[0].sum() < 6 and mask[2].tolist() == [False] * 5 + [True]


def eager_states(batch, row):
    """Hidden states entering each layer and attention maps, by transformers."""
    with torch.no_grad():
        output = random_llama("eager").model(
            inputs_embeds=batch.embeds[row][None], output_attentions=True, output_hidden_states=True
        )
    return output.hidden_states, output.attentions


def test_sparsevlm_ranks_by_the_raters_and_recycles(model):
    batch = Batch(model)
    method = get_method("sparsevlm")(target_tokens=20, layers="1/3", positions="original")
    _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
    keep = keep_list(48, 6, (1, 3), 20, "nominal", 0.3)
    _, maps = eager_states(batch, 0)
    chosen = naive.raters(batch.embeds[0][4:52], batch.embeds[0][52:])
    rows = [52 + i for i, rater in enumerate(chosen) if rater]
    score = maps[1][0][:, rows, 4:52].double().mean(0).mean(0)
    survivors = sorted(naive.ranked(score)[: keep[0]])
    assert 0 < len(rows) < 7 and trace.kept[1].tolist()[: keep[0]] == survivors
    dropped = 48 - keep[0]
    merged = min((int(0.3 * dropped) + 1) // 10 + 1, int(0.3 * dropped) + 1)
    assert trace.kept[1].tolist()[keep[0] :] == [-1] * merged and trace.tokens_out[1] == keep[0] + merged


@pytest.mark.parametrize(("target", "keep"), [(192, (300, 200, 110)), (128, (303, 110, 36)), (64, (66, 30, 17))])
def test_sparsevlm_uses_the_published_lists(target, keep):
    assert keep_list(576, 32, (2, 6, 15), target, "nominal", 0.3) == keep


@pytest.mark.parametrize(("target", "pivots"), [(17, (4, 4)), (20, (4, 4)), (25, (1, 0)), (33, (3, 2)), (48, (4, 4))])
def test_dart_equals_a_naive_loop(model, target, pivots):
    batch = Batch(model)
    method = get_method("dart")(target_tokens=target, visual_pivots=pivots[0], text_pivots=pivots[1])
    _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
    with torch.no_grad():
        output = model.model(inputs_embeds=batch.embeds[0][None], output_hidden_states=True, use_cache=True)
        states, keys = model.model.norm(output.hidden_states[2][0]), output.past_key_values.layers[1].keys[0]
    keep = min(max((6 * target - 2 * 48) // 4, 1), 48)
    assert trace.kept[1].tolist() == naive.dart(keys, states, 4, 48, keep, *pivots)


def test_pdrop_asks_the_next_layer(model):
    """Row of the last token, from the norm and projections of the layer that has not run yet."""
    batch = Batch(model)
    method = get_method("pdrop")(layers="2/4", ratio=0.5, positions="original")
    _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
    _, maps = eager_states(batch, 0)
    assert trace.kept[1].tolist() == sorted(naive.ranked(maps[2][0, :, -1, 4:52].double().mean(0))[:24])
    assert trace.tokens_in == [48, 48, 24, 24, 12, 12] and set(trace.kept[3].tolist()) <= set(trace.kept[1].tolist())
    assert trace.target_tokens is None and trace.budget_error is None


@pytest.mark.parametrize("rows", [[0], [0, 3, 1]])
def test_keys_that_were_projected_for_scores_are_the_next_layers(rows):
    """One projection for the rows of the last token and for the layer itself; FLOPs count it once."""
    own = random_llama()
    projection, counted = own.model.layers[2].self_attn.k_proj, []
    plain = projection.forward
    projection.forward = lambda states: (counted.append(states.shape[1]), plain(states))[1]
    batch = Batch(own)
    method = get_method("pdrop")(layers="2", ratio=0.5)
    prompt = batch.together(rows) if len(rows) > 1 else batch.alone(0)
    _, _, traces = generate(own, method, prompt, new_tokens=1)
    assert counted == [prompt["embeds"].shape[1]] and projection.forward is not plain
    trace, width = traces[0], 64
    left = trace.text_tokens + trace.tokens_in[2]
    whole = trace.text_tokens + 48
    assert trace.scoring_flops == whole * width + (whole - left) * width * width


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("states", ["queries", "keys"])
def test_entropyprune_equals_a_naive_loop(states, kv_heads):
    """States from the projections and the rotary embedding of transformers' own layer."""
    own = random_llama(kv_heads=kv_heads)
    batch = Batch(own)
    method = get_method("entropyprune")(layer=2, ratio=0.5, states=states)
    _, _, (trace,) = generate(own, method, batch.alone(0), new_tokens=1)
    with torch.no_grad():
        hidden = own(inputs_embeds=batch.embeds[0][None], output_hidden_states=True).hidden_states[1]
        layer = own.model.layers[1]
        normed = layer.input_layernorm(hidden)
        q, k = (
            getattr(layer.self_attn, f"{name}_proj")(normed).unflatten(2, (-1, 16)).transpose(1, 2) for name in "qk"
        )
        cos, sin = own.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    entropy = [naive.head_entropy({"queries": q, "keys": k}[states][0, :, i]) for i in range(4, 52)]
    assert trace.kept[1].tolist() == sorted(naive.ranked(entropy)[:24])
    assert trace.tokens_in == [48, 48, 24, 24, 24, 24]


@pytest.mark.parametrize("smoothing", [1.0, 0.3])
def test_adaptinfer_equals_a_naive_loop(model, smoothing):
    batch = Batch(model)
    method = get_method("adaptinfer")(target_tokens=20, layers="1/3/4", smoothing=smoothing, positions="original")
    _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
    _, maps = eager_states(batch, 0)
    score = naive.text_guided_score(maps[1][0, :, 52:, 52:], maps[1][0, :, 52:, 4:52], smoothing)
    assert trace.kept[1].tolist() == sorted(naive.ranked(score)[: trace.tokens_out[1]]) and trace.tokens_out[1] < 48
    # A row is scored by its own text, however long that of its neighbors is.
    for row, other in zip((0, 3), generate(model, method, batch.together([0, 3]), new_tokens=1)[2], strict=True):
        (alone,) = generate(model, method, batch.alone(row), new_tokens=1)[2]
        assert [kept.tolist() for kept in other.kept] == [kept.tolist() for kept in alone.kept]


@pytest.mark.parametrize("heads", [1, 3, 14])
def test_sparsevlm_v2_equals_a_naive_loop(model, heads):
    batch = Batch(model)
    method = get_method("sparsevlm_v2")(target_tokens=24, layers="1/3/4", heads=heads)
    _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
    _, maps = eager_states(batch, 0)
    chosen = naive.raters(batch.embeds[0][4:52], batch.embeds[0][52:])
    raters = [row for row, is_rater in enumerate(chosen) if is_rater]
    text, visual = list(range(52, 59)), list(range(4, 52))
    score = naive.rotary_corrected(maps[1][0, :, 52:, 4:52], raters, text, visual, heads)
    assert trace.kept[1].tolist() == sorted(naive.ranked(score)[: trace.tokens_out[1]]) and trace.tokens_out[1] < 48
    for row, other in zip((0, 3), generate(model, method, batch.together([0, 3]), new_tokens=1)[2], strict=True):
        (alone,) = generate(model, method, batch.alone(row), new_tokens=1)[2]
        assert [kept.tolist() for kept in other.kept] == [kept.tolist() for kept in alone.kept]


@pytest.mark.parametrize("target", [1, 2, 9, 20, 35])
@pytest.mark.parametrize(
    ("step", "most", "average"), [(0.1, 0.9, None), (0.1, 0.9, 6.0), (0.05, 2.0, 11.0), (0.0, 0.3, 4.0)]
)
def test_agilepruner_equals_a_naive_loop(target, step, most, average):
    crops = [crop(36, seed) for seed in range(3)]
    method = get_method("agilepruner")(step=step, most=most, average_rank=average)
    for one, got in zip(crops, reduce(method, crops, target), strict=True):
        expected = naive.agilepruner(one.tokens_PC, one.facts["cls_attention"], target, step, most, average)
        assert got.origin_K.tolist() == got.source_K.tolist() == expected
        assert torch.equal(got.tokens_KC, one.tokens_PC[expected])
    plain = [naive.ranked(one.facts["cls_attention"])[:target] for one in crops]
    if step == 0:
        assert [got.origin_K.tolist() for got in reduce(method, crops, target)] == [sorted(own) for own in plain]


def test_effective_rank_of_known_spectra():
    flat = torch.eye(8)[:, :5][None]  # five equal singular values
    halves = torch.diag(torch.tensor([3.0, 1.0, 0.0]))[None]
    torch.testing.assert_close(effective_rank(flat), torch.tensor([5.0]).double())
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    torch.testing.assert_close(effective_rank(halves), torch.tensor([np.exp(entropy)]))


def test_max_sum_order_equals_a_naive_loop_in_every_row():
    generator = torch.Generator().manual_seed(0)
    tokens, counts = torch.randn(3, 20, 6, generator=generator), (20, 13, 5)
    order = max_sum_order(tokens, counts, 12)
    for row, count in enumerate(counts):
        picks = min(12, count)
        assert order[row, :picks].tolist() == naive.todre(tokens[row, :count], picks)


@pytest.mark.parametrize("budget", ["nominal", "processed"])
def test_todre_leaves_no_visual_token_behind_its_exit(model, budget):
    """And the budget is the mean over all layers, the empty ones included."""
    batch = Batch(model)
    method = get_method("todre")(target_tokens=10, exit_layer=4, budget=budget)
    rows = [0, 4, 3, 1]
    tokens, logits, traces = generate(model, method, batch.together(rows))
    for place, row in enumerate(rows):
        trace = traces[place]
        own, own_logits, (alone,) = generate(model, method, batch.alone(row))
        assert own[0].tolist() == tokens[place].tolist() and alone.tokens_out == trace.tokens_out
        torch.testing.assert_close(logits[place], own_logits[0], atol=2e-4, rtol=1e-4)
        if not trace.visual_tokens:
            continue
        kept = sorted(naive.todre(batch.embeds[row][[s for a, b in batch.spans[row] for s in range(a, b)]], 15))
        assert trace.tokens_in == [15] * 4 + [0] * 2 and trace.kept[0].tolist() == kept
        assert trace.budget_error == 0
        expected = masked_oracle(
            model, batch.embeds[row], batch.spans[row], [own.tolist() for own in trace.kept], 6, kept, compact=True
        )
        assert own[0].tolist() == expected[0]
        torch.testing.assert_close(own_logits[0], expected[1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("target", "first", "behind"), [(192, 284, 38), (64, 96, 10)])
def test_information_horizon_with_published_settings(target, first, behind):
    """DivPrune in front of it, 32 layers and 576 tokens: the numbers of the paper's scripts."""
    deep = random_llama(layers=32)
    batch = Batch(deep, samples=((2, 576, 3),))
    method = get_method("divprune+information_horizon").from_options(
        {"divprune.target_tokens": first, "target_tokens": target}
    )
    _, _, (trace,) = generate(deep, method, batch.alone(0), new_tokens=1)
    assert trace.tokens_in == [first] * 20 + [behind] * 12
    assert trace.mean_tokens("processed") == {192: 191.75, 64: 63.75}[target]


def test_information_horizon_draws_among_what_is_left_and_counts_what_was_spent(model):
    batch = Batch(model)
    for first, options in (("fastv", {"fastv.layer": 1}), ("pdrop", {"pdrop.layers": "1/2"})):
        name = f"{first}+information_horizon"
        given = {**options, f"{first}.target_tokens": 30, "target_tokens": 26, "layer": 4}
        chosen = []
        for seed in (0, 0, 1):
            method = get_method(name).from_options({**given, "seed": seed})
            traces = generate(model, method, batch.together([0, 4, 2]), new_tokens=1)[2]
            assert abs(traces[0].mean_tokens("processed") - 26) < 1 and traces[1].visual_tokens == 0
            assert all(set(t.kept[3].tolist()) <= set(t.kept[2].tolist()) for t in traces)
            chosen.append([trace.kept[3].tolist() for trace in traces])
        assert chosen[0] == chosen[1] != chosen[2]


def test_lists_of_published_budgets():
    for target, keep in {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)}.items():
        assert sparsevlm_v2._PUBLISHED.keep(576, 32, (2, 6, 15), target, "nominal") == keep
    for target, keep in {32: (40, 12, 0), 48: (80, 24, 2), 64: (133, 27, 3), 128: (290, 72, 18)}.items():
        assert adaptinfer._PUBLISHED.keep(576, 32, (1, 10, 20), target, "nominal") == keep


def test_transprune_equals_a_naive_loop(model):
    """Two cuts of a prompt, from the states that transformers' own layers show."""
    batch, seen = Batch(model), {}
    method = get_method("transprune")(layers="2/4", shares="0.75/0.25", positions="original")
    _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
    modules = {
        f"{name}{index}": getattr(model.model.layers[index], name) for index in (1,) for name in ("self_attn", "mlp")
    }
    hooks = [
        module.register_forward_hook(
            lambda _, args, kwargs, out, name=name: seen.update(
                {name: (args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)}
            ),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    _, maps = eager_states(batch, 0)
    with torch.no_grad():
        model(inputs_embeds=batch.embeds[0][None])
    for hook in hooks:
        hook.remove()
    moved = [
        sum(parts)
        for parts in zip(
            *(naive.transition(*(t.flatten(0, -2) for t in seen[f"{n}1"])) for n in ("self_attn", "mlp")), strict=True
        )
    ][4:52]
    attention = maps[2][0, :, 52:, 4:52].double().mean((0, 1))
    score = [a / sum(moved) + float(b) / float(attention.sum()) for a, b in zip(moved, attention, strict=True)]
    assert trace.kept[1].tolist() == sorted(naive.ranked(score)[:36])
    assert trace.tokens_in == [48, 48, 36, 36, 12, 12] and set(trace.kept[3].tolist()) <= set(trace.kept[1].tolist())


def test_transprune_with_published_settings():
    assert get_method("transprune")(shares="0.875/0.625/0.125")._plan(576, 576, 32) == {7: 504, 9: 360, 12: 72}
    before = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    after = before.flip(2) * 2
    real = torch.tensor([[False, False, *[True] * 7], [True] * 9])
    for row, values in enumerate(transition(before, after, real)):
        expected = torch.tensor(naive.transition(before[row][real[row]], after[row][real[row]]))
        torch.testing.assert_close(values[real[row]], expected, atol=1e-6, rtol=1e-5)


def test_pdrop_with_published_settings():
    assert PDrop(ratio=0.5)._plan(576, 576, 32) == {8: 288, 16: 144, 24: 72}
    assert plan_stages(576, 32, 270, None) == {8: 288, 16: 144, 24: 72}
    with pytest.raises(OptionError, match="8/16/24"):
        PDrop(layers="16/8")


@pytest.mark.parametrize(("layers", "tokens"), [(32, 576), (12, 576), (32, 2880)])
@pytest.mark.parametrize(
    "name", ["sparsevlm", "sparsevlm-processed", "pdrop", "transprune", "adaptinfer", "sparsevlm_v2"]
)
def test_plans_meet_any_budget_within_one_token(name, layers, tokens):
    """On paper, at real sizes: from the smallest mean that is possible to all tokens."""
    kind = "nominal" if name in ("sparsevlm", "adaptinfer", "sparsevlm_v2") else "processed"
    published = {"adaptinfer": adaptinfer, "sparsevlm_v2": sparsevlm_v2}.get(name, sparsevlm)._PUBLISHED
    stages = published.scaled(layers)

    def mean(target: int) -> float:
        if name in ("pdrop", "transprune"):
            keep = {"pdrop": plan_stages, "transprune": plan_cuts}[name](tokens, layers, target, None)
        elif name in ("adaptinfer", "sparsevlm_v2"):
            counts = published.keep(tokens, layers, stages, target, kind)
            keep = {stage + 1: count for stage, count in zip(stages, counts, strict=True)}
        else:
            counts = keep_list(tokens, layers, stages, target, kind, 0.3)
            keep = {stage + 1: count for stage, count in zip(stages, counts, strict=True)}
        current, leaving = tokens, []
        for layer in range(layers):
            if layer + 1 in keep:
                step = prune_step(
                    current, min(keep[layer + 1], current), 0.3 if name in ("sparsevlm", "sparsevlm-processed") else 0.0
                )
                current = step.total
            leaving.append(current)
        charged = leaving if kind == "nominal" else [tokens, *leaving[:-1]]
        return sum(charged) / layers

    least = mean(1)
    for target in (1, 2, *range(5, tokens, tokens // 12), tokens - 1, tokens):
        assert abs(mean(target) - max(target, least)) <= 1, (target, least)
    assert mean(tokens) == tokens


COUNTED = ["fastv", "sparsevlm", "pdrop", "autoprune", "random", "uniform", "fastervlm", "divprune", "visionzip"]
COUNTED += ["prumerge_plus", "hiprune", "tome", "vispruner", "scope", "dart", "cdpruner", "holov"]
COUNTED += ["mmtok", "vscan", "zooprune"]
COUNTED += ["entropyprune", "transprune", "adaptinfer", "sparsevlm_v2", "agilepruner", "todre"]
COUNTED += ["information_horizon", "catp", "vflowopt", "autoprune_plus"]


@pytest.mark.parametrize("budget", ["nominal", "processed"])
@pytest.mark.parametrize("name", COUNTED)
def test_budgets_are_met_or_the_nearest_is_reported(name, budget):
    """48 visual tokens, 12 layers; every target from 1 to 48 in one batch per method would be slow: some of them."""
    model = random_llama(layers=12)
    batch = Batch(model, samples=((4, 48, 7),))
    options = {"inside": False} if name == "tome" else {"x0_relative": True} if name == "autoprune" else {}
    reached = {}
    for target in (1, 2, 6, 9, 13, 20, 31, 40, 47, 48, 60):
        method = get_method(name)(target_tokens=target, budget=budget, **options)
        _, _, (trace,) = generate(model, method, batch.alone(0), new_tokens=1)
        counts = [trace.tokens_in[0], *trace.tokens_out]
        if name not in ("sparsevlm", "autoprune"):  # merged tokens may outnumber the dropped ones there
            assert all(a >= b for a, b in zip(counts, counts[1:], strict=False)), counts
        for before, after in zip(trace.kept, trace.kept[1:], strict=False):
            assert set(after.tolist()) - {-1} <= set(before.tolist())
        assert trace.budget_error == trace.mean_tokens(method.budget_kind) - min(target, 48)
        reached[target] = trace.mean_tokens(method.budget_kind)
    # What cannot be avoided: full layers in front of the first selection, one token behind it.
    full = {"fastv": 2, "dart": 2, "entropyprune": 2, "pdrop": 1, "sparsevlm": 2, "autoprune": 1}
    full = (full | {"transprune": 1, "adaptinfer": 1, "sparsevlm_v2": 2, "information_horizon": 8}).get(name, 0)
    full = 2 if name == "catp" else full  # half of the tokens in the first three layers and a bit
    if budget == "nominal" and name in ("sparsevlm", "autoprune", "adaptinfer", "sparsevlm_v2"):
        full -= 1
    floor = (48 * full + 12 - full) / 12
    for target, mean in reached.items():
        slack = 2.0 if name in ("autoprune", "sparsevlm") else 1.0
        if target > floor + 2:
            assert abs(mean - min(target, 48)) <= slack, (target, mean, floor)
        else:
            assert mean <= floor + 3 or abs(mean - target) <= slack, (target, mean, floor)


def test_an_unreachable_budget_is_said_once(model, caplog):
    generate(model, get_method("fastv")(target_tokens=3), Batch(model).together([0, 1]), new_tokens=1)
    (record,) = caplog.records
    assert record.message == (
        "fastv: for 2 of 2 samples these options cannot meet 3 visual tokens per layer; "
        "their processed mean is 16.7 to 17.3"
    )


def test_selection_is_told_apart_by_who_measures(model):
    """Every piece of what only pruning needs runs inside the context manager that was set, and a prefill is timed."""
    batch, open_blocks, blocks = Batch(model), [], []

    @contextlib.contextmanager
    def block():
        assert not open_blocks, "a piece inside another would count twice"
        open_blocks.append(1)
        yield
        blocks.append(open_blocks.pop())

    with get_method("fastv")().attach(model) as run, torch.no_grad():
        for wanted in (False, True):
            if wanted:
                run.selection_timer = block
            run.set_visual(batch.alone(0)["layout"])
            model(inputs_embeds=batch.embeds[0][None])
            assert bool(blocks) == wanted
    assert len(run.prefill_seconds) == 2 and min(run.prefill_seconds) > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparsevlm", {"layers": "3/2"}, "2/6/15"),
        ("sparsevlm", {"target_tokens": None}, "needs target_tokens"),
        ("fastv", {"target_tokens": None}, "fastv needs target_tokens or ratio"),
        *((name, {"target_tokens": None}, f"{name} needs target_tokens") for name in CONSTANT),
        ("autoprune", {"gamma": float("nan")}, "gamma must be a finite number, got nan"),
        ("autoprune", {"amplitude": float("inf")}, "amplitude must be a finite number, got inf"),
        ("sparsevlm", {"layers": "3/9"}, "6 layers"),
        ("pdrop", {"layers": "0/2"}, "from 1"),
        ("pdrop", {"layers": "2/6"}, "6 layers"),
        ("pdrop", {"ratio": 0.0}, "0 excluded"),
        ("visionzip", {"contextual_ratio": 1.0}, "contextual_ratio"),
        ("prumerge_plus", {"neighbors": -1}, "neighbors"),
        ("prumerge_plus", {"spacing": "grid"}, "'stride' or 'rest'"),
        ("hiprune", {"alpha": 2.0}, "alpha"),
        ("hiprune", {"object_layer": 0}, "object_layer"),
        ("vscan", {"window": 0}, "window"),
        ("vscan", {"local_share": 1.5}, "local_share"),
        ("vscan", {"local_layer": 0}, "local_layer"),
        ("vscan", {"layers": "0/2"}, "from 1"),
        ("vscan", {"layers": "2/6"}, "6 layers"),
        ("vscan", {"tokens": "20/30"}, "falling"),
        ("vscan", {"tokens": "many"}, "falling"),
        ("vscan", {"tokens": "30/20", "layers": "2/4"}, "each of the layers"),
        ("vispruner", {"important_ratio": 1.5}, "important_ratio"),
        ("scope", {"alpha": -1.0}, "alpha"),
        ("agilepruner", {"most": -1.0}, "most"),
        ("agilepruner", {"average_rank": 0.0}, "average_rank"),
        ("cdpruner", {"relevance": "image"}, "relevance"),
        ("holov", {"chunks": 0}, "chunks"),
        ("gtp_vit", {"selection": "best"}, "selection must be one of mixed"),
        ("gtp_vit", {"heads": "min"}, "heads"),
        ("gtp_vit", {"graph": "tree"}, "graph"),
        ("gtp_vit", {"neighbors": 0}, "neighbors"),
        ("gtp_vit", {"alpha": -1.0}, "alpha"),
        ("autoprune_plus", {"relevance": -1.0}, "relevance"),
        ("autoprune_plus", {"saliency": -0.5}, "saliency"),
        ("autoprune_plus", {"x0": -1.0}, "x0"),
        ("autoprune_plus", {"slope": -1.0}, "slope"),
        ("autoprune_plus", {"text_weight": 1.5}, "text_weight"),
        ("zooprune", {"directions": 0}, "directions"),
        ("zooprune", {"step": 0.0}, "step"),
        ("mmtok", {"vision_weight": -1.0}, "vision_weight"),
        ("mmtok", {"text_temperature": 0.0}, "text_temperature"),
        ("holov", {"alpha": -0.1}, "alpha"),
        ("dart", {"visual_pivots": 0}, "visual_pivots"),
        ("dart", {"text_pivots": -1}, "text_pivots"),
        ("dart", {"layer": 6}, "6 layers"),
        ("entropyprune", {"states": "hidden"}, "'queries' or 'keys'"),
        ("entropyprune", {"layer": 6}, "6 layers"),
        ("adaptinfer", {"layers": "3/2"}, "1/10/20"),
        ("adaptinfer", {"layers": "3/9"}, "6 layers"),
        ("adaptinfer", {"smoothing": 1.5}, "smoothing"),
        ("catp", {"drop": 1.0}, "drop"),
        ("catp", {"layer": 0}, "layer must be at least 1"),
        ("catp", {"layer": 6}, "6 layers"),
        ("catp", {"alignment": -1.0}, "alignment"),
        ("catp", {"target_tokens": None}, "catp needs target_tokens or drop"),
        ("vflowopt", {"threshold": -1.0}, "threshold"),
        ("vflowopt", {"side": 0.5}, "side"),
        ("todre", {"exit_layer": 0}, "exit_layer must be at least 1"),
        ("todre", {"exit_layer": 6}, "6 layers"),
        ("information_horizon", {"layer": 0}, "layer must be at least 1"),
        ("information_horizon", {"layer": 6}, "6 layers"),
        ("todre", {"target_tokens": None}, "needs target_tokens"),
        ("sparsevlm_v2", {"layers": "3/9"}, "6 layers"),
        ("sparsevlm_v2", {"heads": 0}, "heads"),
        ("transprune", {"layers": "0/2"}, "from 1"),
        ("transprune", {"layers": "2/6"}, "6 layers"),
        ("transprune", {"shares": "0.5/0.6/0.1"}, "falling shares"),
        ("transprune", {"shares": "0.5", "layers": "1/2"}, r"as many as there are layers \(2\)"),
        ("random", {"budget": "paper"}, "'nominal' or 'processed'"),
        ("autoprune", {"mi_layer": 6}, "6 layers"),
        ("autoprune", {"slope": -1.0}, "slope"),
        ("autoprune", {"cls_weight": 0.0, "text_weight": 0.0}, "both 0"),
    ],
)
def test_bad_options(model, name, options, message):
    with pytest.raises(OptionError, match=message):
        get_method(name)(**options).attach(model)


IN_FRONT = ["visionzip", "prumerge_plus", "hiprune", "tome", "vispruner", "scope", "cdpruner", "holov"]
IN_FRONT += ["mmtok", "zooprune", "flowcut", "vscan", "gtp_vit"]
IN_FRONT += ["agilepruner", "vflowopt"]


@pytest.mark.parametrize("name", IN_FRONT)
def test_the_cap_alone_is_budget_enough_in_front_of_the_decoder(name):
    assert get_method(name)(target_tokens=None, visual_token_num=8).aim_of(576) is None


def test_missing_facts_are_named(model):
    layout = Batch(model).alone(0)["layout"]
    with get_method("hiprune")().attach(model) as run, pytest.raises(ValueError, match=r"facts=\{'object'"):
        run.set_visual(layout)
    with get_method("tome")().attach(model) as run, pytest.raises(ValueError, match="inside the vision tower"):
        run.set_visual(layout)
        model(inputs_embeds=Batch(model).embeds[0][None])
