"""Methods that work in front of the decoder, from pixels: against transformers' own tower and plain loops."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.pruning import BEFORE_DECODER, PruningMethod, Rows, Selection, UnsupportedError, get_method
from llava.utils import UserError
from tests.model.tiny import GRID, IMAGE_SIDE, PATCHES, tiny_images, tiny_model
from tests.pruning import naive

I = IMAGE_TOKEN_INDEX  # noqa: E741
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TARGET = 7
NAMES = ["visionzip", "prumerge_plus", "hiprune", "tome", "vispruner", "scope", "cdpruner", "holov"]
NAMES += ["mmtok", "flowcut", "zooprune", "gtp_vit"]
NAMES += ["agilepruner"]
OPTIONS = {"prumerge_plus": {"neighbors": 3}, "hiprune": {"alpha": 0.9}}


def method(name: str, target: int = TARGET, **options):
    return get_method(name)(target_tokens=target, **OPTIONS.get(name, {}), **options)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_model(seed=7, attn_implementation=request.param)


@pytest.fixture(scope="module")
def sdpa_model():
    return tiny_model(seed=7)


@pytest.fixture(scope="module")
def anyres_model():
    pinpoints = [[IMAGE_SIDE * w, IMAGE_SIDE * h] for w, h in ((1, 2), (2, 1), (2, 2))]
    return tiny_model(
        seed=7, mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=pinpoints, image_aspect_ratio="anyres"
    )


def tower_outputs(pixels):
    """Hidden states and attention maps of transformers' whole tower."""
    tower = tiny_model(seed=7, attn_implementation="eager").model.vision_tower
    with torch.no_grad():
        return tower, tower(pixels, output_hidden_states=True, output_attentions=True)


def keys_of(tower, layer: int, hidden):
    """Keys of an encoder layer for the states that enter it, `[N, T, H, D]`."""
    block = tower.encoder.layers[layer]
    return block.self_attn.k_proj(block.layer_norm1(hidden)).unflatten(-1, (block.self_attn.num_heads, -1))


def visual_embeddings(model, pixels, name, target=TARGET, **options):
    with method(name, target, **options).attach(model), torch.no_grad():
        inputs = model.prepare_multimodal_inputs(torch.tensor([[1, I, 5]] * len(pixels)), images=pixels)
    assert inputs.layout.counts == (target,) * len(pixels)
    return inputs.inputs_embeds[:, 1 : 1 + target], inputs.reduced


def project(model, tokens):
    with torch.no_grad():
        return model.model.multi_modal_projector(torch.stack(tokens).float())


def test_visionzip_from_pixels(model):
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "visionzip")
    tower, out = tower_outputs(pixels)
    for i in range(2):
        features = out.hidden_states[-2][i]
        with torch.no_grad():
            keys = keys_of(tower, 2, out.hidden_states[2])[i].mean(1)
        kept, merged = naive.visionzip(features[1:], out.attentions[-2][i, :, 0, 1:].mean(0), keys[1:], 5, 1)
        assert rows[i].origins.tolist() == [*kept, -1, -1]
        expected = project(model, [*features[1:][kept], features[0], *merged])
        torch.testing.assert_close(got[i], expected, atol=1e-4, rtol=1e-4)


def test_prumerge_plus_from_pixels(model):
    """Queries and keys of the last layer, which LLaVA does not run, as one wide head."""
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "prumerge_plus")
    tower, out = tower_outputs(pixels)
    last = tower.encoder.layers[-1]
    for i in range(2):
        entering = out.hidden_states[-2][i]
        with torch.no_grad():
            keys = last.self_attn.k_proj(last.layer_norm1(entering))
            query = last.self_attn.q_proj(last.layer_norm1(entering))[0]
        cls = torch.softmax(keys @ query / keys.shape[1] ** 0.5, 0)[1:]
        kept, merged, extra = naive.prumerge_plus(entering[1:], cls, keys[1:], TARGET, 3)
        assert rows[i].origins.tolist() == [*kept, -1]
        torch.testing.assert_close(got[i], project(model, [*merged, extra]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threshold", [1.05, 1.3, 50.0])
def test_importance_of_vflowopt_from_pixels(model, threshold):
    """By the rows of tokens that receive much themselves; by all where none does."""
    seen, pixels = [], tiny_images(2)

    class Seen(get_method("vflowopt")):
        def reduce(self, view):
            seen.append(view.facts["importance"])
            return super().reduce(view)

    with Seen(target_tokens=TARGET, threshold=threshold).attach(model), torch.no_grad():
        model.prepare_multimodal_inputs(torch.tensor([[1, I, 5]] * 2), images=pixels)
    _, out = tower_outputs(pixels)
    for i in range(2):
        rows = out.attentions[-2][i].mean(0)
        received = rows.mean(0)
        reliable = received > threshold * received.mean()
        assert reliable.any() == (threshold < 50)
        expected = rows[reliable].mean(0) if reliable.any() else received
        torch.testing.assert_close(seen[0][i], expected[1:], atol=1e-6, rtol=1e-4)


def test_hiprune_from_pixels(model):
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "hiprune", object_layer=1)
    _, out = tower_outputs(pixels)
    for i in range(2):
        middle, deep = (out.attentions[layer][i].mean(0).mean(0)[1:] for layer in (0, -2))
        kept = naive.hiprune(middle, deep, GRID, TARGET, 0.9)
        assert rows[i].origins.tolist() == kept
        torch.testing.assert_close(
            got[i], project(model, list(out.hidden_states[-2][i, 1:][kept])), atol=1e-4, rtol=1e-4
        )


def test_cdpruner_from_pixels(model):
    """Projected features, and the embeddings of the text behind the image alone."""
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "cdpruner")
    _, out = tower_outputs(pixels)
    word = model.get_input_embeddings().weight[5].detach()
    for i in range(2):
        projected = project(model, list(out.hidden_states[-2][i, 1:]))
        relevance = [naive.cosine(token, word) for token in projected]
        kept = naive.cdpruner(projected, relevance, TARGET, min(relevance), max(relevance))
        assert rows[i].origins.tolist() == kept
        torch.testing.assert_close(got[i], projected[kept], atol=1e-4, rtol=1e-4)


def test_holov_from_pixels(model):
    """Attention of the selected layer, likeness of the projected features."""
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "holov", chunks=4, alpha=5.0)
    _, out = tower_outputs(pixels)
    for i in range(2):
        projected = project(model, list(out.hidden_states[-2][i, 1:]))
        kept = naive.holov(projected, out.attentions[-2][i, :, 0, 1:].mean(0), TARGET, 4, 5.0)
        assert rows[i].origins.tolist() == kept
        torch.testing.assert_close(got[i], projected[kept], atol=1e-4, rtol=1e-4)


def test_mmtok_from_pixels(model):
    """Text against projected features, patches against each other in front of the projector; padding comes last."""
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "mmtok")
    _, out = tower_outputs(pixels)
    word = model.get_input_embeddings().weight[5:6].detach()
    for i in range(2):
        features = out.hidden_states[-2][i, 1:]
        projected = project(model, list(features))
        kept = naive.mmtok(features, projected, word, TARGET, 0.5, (0.02, 0.2))
        assert rows[i].origins.tolist() == kept
        torch.testing.assert_close(got[i], projected[kept], atol=1e-4, rtol=1e-4)
    # All but five patches are padding: those stay, with the first of the padding.
    real = {3, 6, 7, 10, 15}
    mask = torch.tensor([i not in real for i in range(PATCHES)])
    with method("mmtok").attach(model), torch.no_grad():
        inputs = model.prepare_multimodal_inputs(torch.tensor([[1, I, 5]]), images=pixels[:1], image_masks=[mask])
    assert inputs.reduced[0].origins.tolist() == sorted(real | {0, 1})


def test_zooprune_from_pixels(model):
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "zooprune", directions=4, step=0.1, seed=5)
    _, out = tower_outputs(pixels)
    projector = copy.deepcopy(model.model.multi_modal_projector).double().requires_grad_(False)
    directions = torch.randn(4, 24, generator=torch.Generator().manual_seed(5))
    for i in range(2):
        features = out.hidden_states[-2][i, 1:]
        kept = naive.zooprune(features, projector, directions, 0.1, TARGET)
        assert rows[i].origins.tolist() == kept
        torch.testing.assert_close(got[i], project(model, list(features[kept])), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", [TARGET, 1, PATCHES - 1])
def test_flowcut_from_pixels(model, target):
    """The whole tower once more, picture by picture: what is dropped is really gone, explicit softmax, loops."""
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "flowcut", target)
    tower, out = tower_outputs(pixels)
    for i in range(2):
        states, places, score = out.hidden_states[0][i], list(range(PATCHES)), None
        for index, layer in enumerate(tower.encoder.layers[:3]):
            attention = layer.self_attn
            with torch.no_grad():
                normed = layer.layer_norm1(states)
                q, k, v = (
                    part(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                    for part in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                weights = torch.softmax(q @ k.transpose(1, 2) * attention.scale, -1)
                states = states + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
                states = states + layer.mlp(layer.layer_norm2(states))
            if len(places) > target:
                left = 3 - 2 - index
                semantic = torch.softmax((v @ v.transpose(1, 2))[:, 0], -1).mean(0)
                score, drop = naive.flowcut(weights[:, 0].mean(0)[1:], semantic[1:], v.mean(0)[1:], score, target, left)
                kept = sorted(naive.ranked(score)[: len(places) - drop])
                states = states[[0, *(1 + place for place in kept)]]
                places, score = [places[place] for place in kept], [score[place] for place in kept]
        assert rows[i].origins.tolist() == places and len(places) == target
        torch.testing.assert_close(got[i], project(model, list(states[1:])), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", [TARGET, 1, PATCHES - 1])
def test_gtp_vit_from_pixels(model, target):
    """The whole tower once more, picture by picture: explicit softmax, edges and sums in loops."""
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "gtp_vit", target, neighbors=3, alpha=0.4)
    tower, out = tower_outputs(pixels)
    for i in range(2):
        states, places = out.hidden_states[0][i], list(range(PATCHES))
        graph = naive.gtp_graph(states[1:], 3)
        for index, layer in enumerate(tower.encoder.layers[:3]):
            attention = layer.self_attn
            with torch.no_grad():
                normed = layer.layer_norm1(states)
                q, k, v = (
                    part(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                    for part in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                weights = torch.softmax(q @ k.transpose(1, 2) * attention.scale, -1)
                states = states + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
                order = naive.ranked(naive.gtp_scores(weights))
                keep = len(places) - math.ceil((len(places) - target) / (3 - index))
                kept, gone = sorted(order[:keep]), order[keep:]
                passed = [
                    sum((graph[places[a]][places[b]] * states[1 + b] for b in gone), torch.zeros(24)) for a in kept
                ]
                states = torch.stack([states[0], *(states[1 + a] + 0.4 * p for a, p in zip(kept, passed, strict=True))])
                places = [places[a] for a in kept]
                states = states + layer.mlp(layer.layer_norm2(states))
        assert rows[i].origins.tolist() == places and len(places) == target
        torch.testing.assert_close(got[i], project(model, list(states[1:])), atol=1e-4, rtol=1e-4)


def test_pictures_of_a_batch_are_cut_apart():
    """In a tower deep enough for several cuts; the published code would cut both alike."""
    model = tiny_model(seed=7, vision={"num_hidden_layers": 9})
    pixels = tiny_images(3, seed=4)
    together, rows = visual_embeddings(model, pixels, "flowcut", 4)
    for i, one in enumerate(pixels):
        alone, (row,) = visual_embeddings(model, one[None], "flowcut", 4)
        assert rows[i].origins.tolist() == row.origins.tolist()
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)


def test_vscan_from_pixels(model):
    """Attention of two layers; what goes is averaged behind the projector."""
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "vscan", 10, tokens="10/4", window=2, local_layer=1)
    _, out = tower_outputs(pixels)
    for i in range(2):
        projected = project(model, list(out.hidden_states[-2][i, 1:]))
        local, cls = (out.attentions[layer][i, :, 0, 1:].mean(0) for layer in (0, -2))
        kept, merged = naive.vscan(projected, local, cls, GRID, 10, 2, 0.5, True)
        assert rows[i].origins.tolist() == kept
        torch.testing.assert_close(got[i].double(), merged, atol=1e-4, rtol=1e-4)


def test_relevance_of_clip_is_refused_where_nobody_knows_it(model):
    with pytest.raises(UnsupportedError, match="relevance=text"):
        visual_embeddings(model, tiny_images(1), "cdpruner", relevance="clip")
    with method("cdpruner").attach(model), pytest.raises(UnsupportedError, match="without one"):
        model.encode_visual_tokens(tiny_images(1))


@pytest.mark.parametrize("target", [TARGET, 1])
def test_tome_from_pixels(model, target):
    """The whole tower once more, crop by crop: explicit softmax with log sizes, loops for the merges."""
    pixels = tiny_images(2)
    got, rows = visual_embeddings(model, pixels, "tome", target)
    tower, out = tower_outputs(pixels)
    schedule = [[count] for count in naive.tome_schedule(PATCHES, target, 3)]
    while schedule[-1][-1] > target:  # the last of the three layers goes on where halving in each is not enough
        schedule[-1].append(max(schedule[-1][-1] - schedule[-1][-1] // 2, target))
    for i in range(2):
        states = out.hidden_states[0][i]
        sizes, places = [1.0] * (PATCHES + 1), list(range(PATCHES + 1))
        for index, layer in enumerate(tower.encoder.layers[:3]):
            attention = layer.self_attn
            with torch.no_grad():
                normed = layer.layer_norm1(states)
                q, k, v = (
                    part(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                    for part in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                weights = torch.softmax(q @ k.transpose(1, 2) * attention.scale + torch.tensor(sizes).log(), -1)
                states = states + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
                merged, keys = list(states), list(k.mean(0))
                for left in schedule[index]:
                    merged, keys, sizes, places = naive.tome_step(
                        merged, keys, sizes, places, len(merged) - 1 - left, True
                    )
                states = torch.stack(merged).float()
                states = states + layer.mlp(layer.layer_norm2(states))
        order = sorted(range(1, len(places)), key=lambda j: places[j])
        assert rows[i].origins.tolist() == [places[j] - 1 if sizes[j] == 1 else -1 for j in order]
        torch.testing.assert_close(got[i], project(model, [states[j] for j in order]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_equal_single_samples(model, name, positions):
    rows = [[1, 5, I, 6, I, 7], [1, 4, 3], [1, 9, 12, I, 13, 14, 15, 16, 17]]
    images, sizes = tiny_images(3, seed=3), [(28, 28), (90, 30), (28, 60)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with method(name, positions=positions).attach(model) as run:
        together = model.generate(
            ids, images=images, image_sizes=sizes, attention_mask=mask, max_new_tokens=4, **GREEDY
        )
        batch = list(run.traces)
        run.traces.clear()
        first = 0
        for row, expected in zip(rows, together, strict=True):
            n = row.count(I)
            alone = model.generate(
                torch.tensor([row]),
                images=images[first : first + n] if n else None,
                image_sizes=sizes[first : first + n] if n else None,
                max_new_tokens=4,
                **GREEDY,
            )
            first += n
            assert torch.equal(alone[0], expected)
    # Two images share the budget of their prompt.
    assert [t.visual_tokens for t in batch] == [2 * PATCHES, 0, PATCHES]
    assert [t.tokens_in for t in batch] == [[TARGET] * 3, [0] * 3, [TARGET] * 3]
    for one, other in zip(batch, run.traces, strict=True):
        assert [k.tolist() for k in one.kept] == [k.tolist() for k in other.kept]
        kept = [i for i in one.kept[0].tolist() if i >= 0]
        assert len(set(kept)) == len(kept) and all(i < one.visual_tokens for i in kept)
        assert one.flops() < one.dense_flops() or one.visual_tokens == 0


@pytest.mark.parametrize("name", NAMES)
def test_beams(sdpa_model, name):
    ids, images = torch.tensor([[1, 5, I, 7], [1, I, 9, 8]]), tiny_images(2)
    with method(name).attach(sdpa_model) as run:
        beams = sdpa_model.generate(ids, images=images, num_beams=3, max_new_tokens=4, **GREEDY)
        alone = sdpa_model.generate(ids[1:], images=images[1:], num_beams=3, max_new_tokens=4, **GREEDY)
    assert torch.equal(beams[1:], alone) and [t.tokens_in[0] for t in run.traces] == [TARGET] * 3


@dataclass(frozen=True, kw_only=True)
class These(PruningMethod):
    """Keeps given visual tokens among the input embeddings: the engine's way to what a tower-side choice does."""

    kept: tuple[int, ...] = ()

    name: ClassVar[str] = "these"

    def stages(self, num_layers):
        return {BEFORE_DECODER: Rows.NONE}

    def select(self, view, memory):
        return Selection(torch.tensor([self.kept]), (len(self.kept),))


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_a_choice_in_front_of_the_projector_equals_one_behind_it(anyres_model, merge_type, positions):
    """Also with crops, unpadding, newlines and two images: positions, order, places of newlines."""
    images = [tiny_images(3), tiny_images(5, seed=1)]
    call = {"images": images, "image_sizes": [(60, 20), (50, 50)]}
    ids = torch.tensor([[1, 5, I, 6, 8, I, 7, 9]])
    anyres_model.set_patch_merge_type(merge_type)
    try:
        with method("hiprune", 11, positions=positions).attach(anyres_model) as run, torch.no_grad():
            logits = anyres_model(ids, **call).logits[:, -1]
        kept = run.traces[0].kept[0]
        with These(kept=tuple(kept.tolist()), positions=positions).attach(anyres_model) as other, torch.no_grad():
            expected = anyres_model(ids, **call).logits[:, -1]
    finally:
        anyres_model.set_patch_merge_type(None)
    assert len(kept) == 11 and kept.tolist() == sorted(kept.tolist())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    ours, theirs = run.traces[0], other.traces[0]
    for fact in ("visual_tokens", "text_tokens", "structure_tokens", "tokens_in", "tokens_out"):
        assert getattr(ours, fact) == getattr(theirs, fact)
    assert (ours.structure_tokens > 0) == (merge_type == "spatial_unpad")


@pytest.mark.parametrize("merge_type", ["spatial", "spatial_unpad"])
@pytest.mark.parametrize("target", [1, 4, 23, 70, 500])
@pytest.mark.parametrize("name", NAMES)
def test_crops_share_the_budget(anyres_model, name, target, merge_type):
    anyres_model.set_patch_merge_type(merge_type)
    try:
        with method(name, target).attach(anyres_model) as run, torch.no_grad():
            anyres_model(torch.tensor([[1, 5, I, 7]]), images=[tiny_images(5)], image_sizes=[(50, 40)])
    finally:
        anyres_model.set_patch_merge_type(None)
    (trace,) = run.traces
    assert trace.budget_error == pytest.approx(0)
    kept = trace.kept[0]
    patches = kept[kept >= 0]
    assert len(set(patches.tolist())) == len(patches) and trace.tokens_in == [len(kept)] * 3


def test_only_what_is_declared_is_computed(sdpa_model):
    """Rows of queries and calls of key projections per tower layer, beyond those of the layers that run."""
    layers = sdpa_model.model.vision_tower.encoder.layers
    calls: list[tuple[str, int, int]] = []

    def watch(part, layer):
        return lambda _, inputs, __: calls.append((part, layer, inputs[0].shape[1]))

    handles = [
        getattr(layer.self_attn, part).register_forward_hook(watch(part, index))
        for index, layer in enumerate(layers)
        for part in ("q_proj", "k_proj")
    ]
    whole = PATCHES + 1
    plain = [(part, layer, whole) for layer in range(3) for part in ("q_proj", "k_proj")]
    expected = {
        "dense": [],
        "divprune": [],
        "pdrop": [],
        "fastervlm": [("q_proj", 2, 1), ("k_proj", 2, whole)],
        "visionzip": [("q_proj", 2, 1), ("k_proj", 2, whole)],
        "prumerge_plus": [("q_proj", 3, 1), ("k_proj", 3, whole)],
        "hiprune": [("q_proj", 1, whole), ("k_proj", 1, whole), ("q_proj", 2, whole), ("k_proj", 2, whole)],
    }
    try:
        for name, extra in expected.items():
            calls.clear()
            options = {} if name == "dense" else {"target_tokens": TARGET}
            with get_method(name)(**options).attach(sdpa_model), torch.no_grad():
                sdpa_model.prepare_multimodal_inputs(torch.tensor([[1, I, 5]]), images=tiny_images(1))
            assert sorted(calls) == sorted(plain + extra), name
        calls.clear()
        visual_embeddings(sdpa_model, tiny_images(1), "tome")
        left = [whole, *(count + 1 for count in naive.tome_schedule(PATCHES, TARGET, 3))]
        assert calls == [(part, layer, left[layer]) for layer in range(3) for part in ("q_proj", "k_proj")]
    finally:
        for handle in handles:
            handle.remove()


def test_the_projector_sees_only_what_is_left(sdpa_model):
    seen = []
    handle = sdpa_model.model.multi_modal_projector.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[:2].numel())
    )
    try:
        visual_embeddings(sdpa_model, tiny_images(2), "visionzip")
    finally:
        handle.remove()
    assert seen == [2 * TARGET]


def test_padding_patches_get_no_attention(sdpa_model):
    outside = torch.zeros(GRID, GRID, dtype=torch.bool)
    outside[[0, -1]] = True
    with method("visionzip", keep_cls=False, contextual_ratio=0.0).attach(sdpa_model), torch.no_grad():
        kept = [
            sdpa_model.prepare_multimodal_inputs(torch.tensor([[1, I, 5]]), images=tiny_images(1), image_masks=masks)
            .reduced[0]
            .origins
            for masks in (None, [outside])
        ]
    hidden = outside.flatten()
    assert hidden[kept[0]].any() and not hidden[kept[1]].any()


def test_facts_reach_methods_inside_the_decoder(sdpa_model):
    from llava.pruning.vision import TowerValue, VisionFact

    @dataclass(frozen=True, kw_only=True)
    class ByKeys(PruningMethod):
        name: ClassVar[str] = "by_keys"

        def vision_facts(self, tower_layers):
            return {"keys": VisionFact(TowerValue.KEYS, 1)}

        def stages(self, num_layers):
            return {0: Rows.NONE, 1: Rows.NONE}

        def select(self, view, memory):
            seen.append(view.vision_fact("keys"))
            return Selection(torch.arange(0, max(view.counts), 2)[None], (len(range(0, max(view.counts), 2)),))

    seen = []
    with ByKeys().attach(sdpa_model), torch.no_grad():
        sdpa_model(torch.tensor([[1, I, 5, 6]]), images=tiny_images(1))
    tower, out = tower_outputs(tiny_images(1))
    keys = keys_of(tower, 1, out.hidden_states[1])[0, 1:].mean(1)
    torch.testing.assert_close(seen[0][0], keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[1][0], keys[::2], atol=1e-5, rtol=1e-5)


def test_what_cannot_work_is_refused(sdpa_model, monkeypatch):
    ids, images = torch.tensor([[1, I, 5]]), tiny_images(1)
    with method("tome", visual_token_num=9).attach(sdpa_model), pytest.raises(UserError, match="have no cls_attention"):
        sdpa_model.prepare_multimodal_inputs(ids, images=images)
    layer = sdpa_model.model.vision_tower.encoder.layers[0].self_attn
    monkeypatch.setattr(layer, "config", SimpleNamespace(_attn_implementation="flash_attention_2"))
    with method("tome").attach(sdpa_model), pytest.raises(UserError, match="inside=false"):
        sdpa_model.prepare_multimodal_inputs(ids, images=images)
    with method("hiprune", object_layer=9).attach(sdpa_model), pytest.raises(ValueError, match="asks for layer 8"):
        sdpa_model.prepare_multimodal_inputs(ids, images=images)
