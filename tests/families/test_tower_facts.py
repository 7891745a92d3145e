"""What the tower says reaches the visual token it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from llava.families.base import pooled
from llava.families.qwen_vl import window_order
from llava.families.tower import layer_value
from llava.pruning import AutoPrune, DecoderMethod, Rows, Selection, get_method
from llava.pruning.vision import ReliableAttention, TowerValue, VisionFact
from tests.families.models import FAMILIES, IMAGE
from tests.pruning import naive


@dataclass(frozen=True, kw_only=True)
class Listening(DecoderMethod):
    """Drops nothing and remembers the facts."""

    value: str = "CLS_ATTENTION"
    layer: int | None = None
    name: ClassVar[str] = "listening"

    def stages(self, num_layers):
        return {0: Rows.NONE}

    def vision_facts(self, tower_layers):
        return {"fact": VisionFact(TowerValue[self.value], self.layer)}

    def select(self, view, memory):
        memory.report["fact"] = list(view.vision_fact("fact"))


def facts(name, inputs, **options):
    model = FAMILIES[name].model()
    with Listening(**options).attach(model) as run, torch.no_grad():
        model(**inputs)
    return [trace.details["fact"][: trace.visual_tokens] for trace in run.traces]


def maps(name, pixel_values):
    """Attention maps of all tower layers, by transformers' eager attention."""
    model = FAMILIES[name].model("eager")
    with torch.no_grad():
        return model.model.vision_tower(pixel_values, output_attentions=True).attentions


def test_cls_attention_of_llava():
    inputs = FAMILIES["llava"].batch((3, ("image", 1), 2, ("image", 2), 4), (5, ("image", 3), 4))
    found = facts("llava", inputs)
    attention = maps("llava", inputs["pixel_values"])
    assert FAMILIES["llava"].model().config.vision_feature_layer == -2
    expected = attention[2][:, :, 0, 1:].mean(1)  # the layer whose output is used, third of four
    torch.testing.assert_close(found[0], expected[:2].flatten(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], expected[2], atol=1e-5, rtol=1e-4)


def test_a_tower_without_cls_says_what_each_patch_receives():
    inputs = FAMILIES["llava_onevision"].batch((3, ("video", 1), 4))
    (found,) = facts("llava_onevision", inputs)
    attention = maps("llava_onevision", inputs["pixel_values_videos"][0])[-1]
    received = attention.mean((1, 2))  # over heads and queries
    # 2 x 2 tokens of a frame become one.
    torch.testing.assert_close(found, pooled(received[..., None], 2).flatten(), atol=1e-5, rtol=1e-4)


def test_crops_of_llava_next_keep_their_places():
    """Base view first, then the tiles side by side, without what was padding; newlines have no value."""
    name = "llava_next"
    inputs = FAMILIES[name].batch((3, ("image", 1), 4))  # 20 x 45 pixels in a grid of 24 x 48: two tiles
    (found,) = facts(name, inputs)
    cls = maps(name, inputs["pixel_values"][0])[2][:, :, 0, 1:].mean(1).view(3, 6, 6)
    wide = torch.cat((cls[1], cls[2]), dim=1)  # [6, 12]; 20/45 leaves floor(20 * 12/45) = 5 rows, padding 0 above
    assert len(found) == 36 + 12 * ((len(found) - 36) // 12)
    rows = (len(found) - 36) // 12
    top = (6 - rows) // 2
    torch.testing.assert_close(found[:36], cls[0].flatten(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[36:], wide[top : top + rows].flatten(), atol=1e-5, rtol=1e-4)


def test_pooling_follows_the_pixel_shuffles():
    square = torch.rand(2, 36, 1)
    internvl, idefics = FAMILIES["internvl"].model().model, FAMILIES["idefics3"].model().model
    groups = internvl.pixel_shuffle(square.view(2, 6, 6, 1), 0.5).reshape(2, 9, 4)
    torch.testing.assert_close(pooled(square, 2)[..., 0], groups.mean(2))
    torch.testing.assert_close(pooled(square, 2)[..., 0], idefics.connector.pixel_shuffle(square, 2).mean(2))


@pytest.mark.parametrize("side", [2, 3, 4])
def test_windows_are_those_of_transformers(side):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    grids = torch.tensor([[1, 8, 12], [3, 10, 6], [2, 2, 14]])
    order, _ = vision_utils.get_vision_window_index(grids, spatial_merge_size=2, window_size=side * 8, patch_size=4)
    assert torch.equal(window_order(grids, 2, side), order)


def test_received_attention_in_windows_comes_from_a_global_layer():
    """Layers 1 and 3 of the tower are global; each picture for itself, so its values sum to 1 / 4 per unit of four."""
    name = "qwen2_5_vl"
    inputs = FAMILIES[name].batch((3, ("image", 0), 2, ("image", 1), 4))
    last, middle = facts(name, inputs)[0], facts(name, inputs, value="RECEIVED_ATTENTION", layer=2)[0]
    assert torch.equal(middle, facts(name, inputs, value="RECEIVED_ATTENTION", layer=1)[0])
    assert not torch.equal(last, middle)
    for values in (last, middle):
        sizes = [24, 24]
        sums = torch.stack([part.sum() for part in values.split(sizes)])
        torch.testing.assert_close(sums, torch.full((2,), 0.25))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl", "internvl", "idefics3"])
def test_every_picture_keeps_its_values_in_a_batch(name):
    tiny = FAMILIES[name]
    prompts = [(3, ("image", 0), 2, ("image", 1), 4), (5, ("image", 2), 4)]
    together = facts(name, tiny.batch(*prompts))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(facts(name, tiny.batch(prompt))[0], together[row], atol=1e-5, rtol=1e-4)


def test_values_of_a_layer_by_hand():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 70, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 1, 70, generator=generator) > 0.3
    attention = torch.softmax((query @ key.transpose(2, 3) * 0.5).masked_fill(~mask, -torch.inf), -1)
    received = layer_value(TowerValue.RECEIVED_ATTENTION, query, key, 0.5, mask)
    torch.testing.assert_close(received[..., 0], attention.mean((1, 2)))
    for threshold in (1.1, 90.0):
        reliable = layer_value(ReliableAttention(threshold), query, key, 0.5, mask)[..., 0]
        for own, found in zip(attention.mean(1), reliable, strict=True):
            received = own.mean(0)
            chosen = received > threshold * received.mean() * 70 / (own[0] > 0).sum()
            torch.testing.assert_close(found, own[chosen].mean(0) if threshold < 2 else received, atol=1e-6, rtol=1e-4)
    cls = layer_value(TowerValue.CLS_ATTENTION, query, key, 0.5, mask)
    torch.testing.assert_close(cls[..., 0], attention[:, :, 0].mean(1))
    wide = torch.softmax(torch.einsum("nhd,nhtd->nt", query[:, :, 0], key) * 24**-0.5, -1)  # all heads as one, 24 wide
    torch.testing.assert_close(layer_value(TowerValue.WIDE_CLS_ATTENTION, query, key, 0.5, None)[..., 0], wide)
    torch.testing.assert_close(layer_value(TowerValue.KEYS, query, key, 0.5, None), key.mean(1))


def test_deepstack_of_merged_tokens_is_the_mean_of_their_members():
    """The weights that travel with a selection make the merged hidden states too."""
    seen = []

    class Checked(AutoPrune):
        def select(self, view, memory):
            selection = super().select(view, memory)
            if selection is not None and selection.merged is not None and max(selection.merged):
                made = selection.weights() @ view.hidden_BVC
                for row, merged in enumerate(selection.merged):
                    torch.testing.assert_close(
                        made[row, :merged], selection.merged_BMC[row, :merged], atol=1e-5, rtol=1e-4
                    )
                    seen.append(merged)
                assert view.sequences.added_BNF is None or selection.weights().sum(2).max() < 1.001
            return selection

    tiny = FAMILIES["qwen3_vl"]
    model, inputs = tiny.model(), tiny.batch((3, ("image", 0), 2, ("image", 1), ("video", 3), 4), (2, ("image", 2), 5))
    with Checked(target_tokens=12, recycle_fraction=0.9).attach(model), torch.no_grad():
        model(**inputs)
    assert max(seen) > 1


def test_deepstack_follows_merged_tokens_through_the_layers():
    """A merge of equal tokens changes nothing but their number: what is added to it is what was added to each."""

    @dataclass(frozen=True, kw_only=True)
    class Weighted(DecoderMethod):
        name: ClassVar[str] = "weighted"

        def stages(self, num_layers):
            return {0: Rows.NONE}

        def select(self, view, memory):
            batch, tokens = view.hidden_BVC.shape[:2]
            keep = torch.arange(tokens - 2).expand(batch, -1)
            weights = torch.zeros(batch, 1, tokens)
            weights[:, 0, -2:] = 0.5
            before = view.sequences.added_BNF
            memory.report["before"] = [before[0, view.sequences.slots_BV[0]]]
            source = torch.full((batch, 1), tokens - 1)
            return Selection(
                keep, (tokens - 2,) * batch, weights @ view.hidden_BVC, (1,) * batch, source, lambda: weights
            )

    tiny = FAMILIES["qwen3_vl"]
    model, inputs = tiny.model(), tiny.batch((3, ("image", 0), 4))
    added = []
    layers = model.model.language_model.layers
    with Weighted().attach(model) as run, torch.no_grad():
        hook = layers[1].register_forward_hook(lambda module, args, output: added.append(output))
        below = layers[2].register_forward_pre_hook(lambda module, args: added.append(args[0]))
        model(**inputs)
        hook.remove(), below.remove()
    width = model.config.text_config.hidden_size
    difference = (added[1] - added[0])[0, 4 : 4 + 23]  # 22 survivors and the merged one, behind text and image start
    features = run.traces[0].details["before"][:, :width]
    torch.testing.assert_close(difference[:22], features[:22], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(difference[22], features[22:].mean(0), atol=1e-5, rtol=1e-4)


def members(name, facts, target):
    """Weights of the patches in each token that leaves, ``[target, P]``, by naive loops: run on unit vectors, they say
    which patches a token is made of.
    """
    patches = len(facts["keys"])
    unit = torch.eye(patches, dtype=torch.float64)
    if name == "visionzip":
        contextual = round(target * 10 / 64)
        kept, merged = naive.visionzip(unit, facts["cls_attention"], facts["keys"], target - contextual, contextual)
        rows = [*unit[kept], *((token > 0).double() for token in merged)]
    elif name == "prumerge_plus":
        _, merged, extra = naive.prumerge_plus(unit, facts["cls"], facts["keys"], target, 5)
        rows = [*merged, extra]
    else:
        tokens, keys, sizes, places = list(unit), list(facts["keys"]), [1.0] * patches, list(range(patches))
        while len(tokens) > target:
            count = min(len(tokens) // 2, len(tokens) - target)
            tokens, keys, sizes, places = naive.tome_step(tokens, keys, sizes, places, count, False)
        rows = [tokens[i] for i in sorted(range(target), key=lambda i: places[i])]
    made = torch.stack(rows)
    return (made / made.sum(1, keepdim=True)).float()


@pytest.mark.parametrize(
    ("name", "options"), [("visionzip", {}), ("prumerge_plus", {"neighbors": 5}), ("tome", {"inside": False})]
)
def test_deepstack_of_tokens_merged_in_front_of_the_decoder(name, options):
    """What the first layers add to a token is the mean of what they add to its members without pruning; two pictures of
    different sizes in a batch with a shorter prompt.
    """
    kind, views = get_method(name), []

    class Seen(kind):
        def reduce(self, view):
            views.append(view)
            return super().reduce(view)

    tiny = FAMILIES["qwen3_vl"]
    model, inputs = tiny.model(), tiny.batch((3, ("image", 0), 2, ("image", 2), 4), (2, ("image", 1), 5))
    given = []
    hook = model.model.language_model.register_forward_pre_hook(lambda _, args, k: given.append(k), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    features = given[0]["deepstack_visual_embeds"]
    # In reading order: first image, second image, then that of the other row.
    sizes = [8 * 12 // 4, 10 * 6 // 4, 12 * 8 // 4]
    assert [len(layer) for layer in features] == [sum(sizes)] * 3 and (inputs["input_ids"] == IMAGE).sum() == sum(sizes)
    layers, outputs, entering = model.model.language_model.layers, [], []
    hooks = [layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in layers]
    hooks += [layer.register_forward_pre_hook(lambda module, args: entering.append(args[0])) for layer in layers]
    with Seen(target_ratio=0.4, positions="original", **options).attach(model), torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    # A row's budget is spread over its pictures: 15 of 24 + 15 tokens are 9 and 6, and 9 of 24.
    assert [(view.tokens_NPC.shape[1], view.target) for view in views] == [(24, 9), (15, 6), (24, 9)]
    expected = [members(name, {key: own[0] for key, own in view.facts.items()}, view.target) for view in views]
    width = entering[0].shape[1]
    # Each row: text, start, tokens, end, ...; the second one stands at the right.
    starts = {0: (0, 3 + 1), 1: (0, 3 + 1 + 9 + 1 + 2 + 1), 2: (1, width - (2 + 1 + 9 + 1 + 5) + 2 + 1)}
    for layer in range(3):
        added = entering[layer + 1] - outputs[layer]
        for image, (row, start) in starts.items():
            own = features[layer][sum(sizes[:image]) : sum(sizes[: image + 1])]
            weights = expected[image]
            assert (weights > 0).sum(1).max() > 1
            got = added[row, start : start + len(weights)]
            torch.testing.assert_close(got, weights @ own, atol=1e-5, rtol=1e-4)
