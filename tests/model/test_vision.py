"""The vision tower: selected layer, nothing behind it, and the CLS row without an attention map."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model import vision
from llava.model.vision import VisionTower, encode_crops, layers_to_run
from llava.pruning.scores import attention_rows
from llava.pruning.vision import TowerValue, VisionFact
from tests.model.tiny import GRID, PATCHES, VISION_FIELDS, sharpen, tiny_images, tiny_model

LAYERS = VISION_FIELDS["num_hidden_layers"]


def tower(attn_implementation: str) -> CLIPVisionModel:
    config = CLIPVisionConfig(**VISION_FIELDS)
    config._attn_implementation = attn_implementation
    model = CLIPVisionModel(config).eval()
    sharpen(model)
    return model


@pytest.fixture(scope="module")
def eager_outputs():
    with torch.no_grad():
        return tower("eager")(tiny_images(3), output_hidden_states=True, output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("select", [-2, -1, -3, -LAYERS])
def test_negative_layers_equal_the_full_towers_outputs(eager_outputs, implementation, select):
    encoded = encode_crops(tower(implementation), tiny_images(3), select, with_cls_attention=True)
    torch.testing.assert_close(encoded.features_NPC, eager_outputs.hidden_states[select][:, 1:], atol=1e-5, rtol=1e-5)
    expected = eager_outputs.attentions[select][:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(encoded.cls_attention_NP, expected, atol=1e-6, rtol=1e-5)
    assert encoded.cls_attention_NP.dtype == torch.float32
    # The row is not renormalized without its CLS entry, and it must be peaked for this comparison to mean
    # something.
    assert (encoded.cls_attention_NP.sum(dim=1) < 1).all() and encoded.cls_attention_NP.max() > 3 / PATCHES


@torch.no_grad()
@pytest.mark.parametrize("select", [1, 2, LAYERS])
def test_positive_layers_use_the_attention_of_the_layer_that_made_the_features(eager_outputs, select):
    encoded = encode_crops(tower("sdpa"), tiny_images(3), select, with_cls_attention=True)
    torch.testing.assert_close(encoded.features_NPC, eager_outputs.hidden_states[select][:, 1:], atol=1e-5, rtol=1e-5)
    expected = eager_outputs.attentions[select - 1][:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(encoded.cls_attention_NP, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_cls_patch_keeps_the_cls_token_first(eager_outputs):
    encoded = encode_crops(tower("sdpa"), tiny_images(3), -2, "cls_patch", with_cls_attention=True)
    torch.testing.assert_close(encoded.features_NPC, eager_outputs.hidden_states[-2], atol=1e-5, rtol=1e-5)
    assert encoded.cls_attention_NP.shape == (3, PATCHES + 1)
    torch.testing.assert_close(encoded.cls_attention_NP.sum(dim=1), torch.ones(3))


@torch.no_grad()
@pytest.mark.parametrize(("select", "ran"), [(-2, LAYERS - 1), (-1, LAYERS), (1, 1), (0, 0)])
def test_layers_behind_the_selected_one_do_not_run(select, ran):
    model = tower("sdpa")
    calls = []
    for i, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    encode_crops(model, tiny_images(1), select)
    assert calls == list(range(ran))


@torch.no_grad()
def test_cls_attention_needs_one_query_row_and_the_tower_keeps_its_kernel():
    model = tower("sdpa")
    rows = []
    model.encoder.layers[LAYERS - 2].self_attn.q_proj.register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].shape[1])
    )
    encode_crops(model, tiny_images(2), -2, with_cls_attention=True)
    assert rows == [1, PATCHES + 1]  # the CLS row alone, then the layer itself
    assert model.config._attn_implementation == "sdpa"
    rows.clear()
    encode_crops(model, tiny_images(2), -2)
    assert rows == [PATCHES + 1]


class Shapes(TorchDispatchMode):
    """Shapes of all that operations return; what is inside a fused kernel is not seen."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(tensor.shape) for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)}
        return result


@torch.no_grad()
def test_no_map_of_all_tokens_is_made_for_the_cls_row():
    tokens = PATCHES + 1
    maps = {}
    for implementation in ("eager", "sdpa"):
        model = tower(implementation)
        with Shapes() as shapes:
            encode_crops(model, tiny_images(2), -2, with_cls_attention=True)
        maps[implementation] = {shape for shape in shapes.seen if shape.count(tokens) > 1}
        assert (2, 4, 1, tokens) in shapes.seen, "the CLS row of each head"
    assert (2, 4, tokens, tokens) in maps["eager"], "the watch sees one where there is one"
    assert not maps["sdpa"]


def test_what_cannot_work_is_refused():
    assert layers_to_run(-2, 24) == 23 and layers_to_run(0, 24) == 0 and layers_to_run(24, 24) == 24
    for select in (25, -26):
        with pytest.raises(ValueError, match="out of range for a tower of 24 layers"):
            layers_to_run(select, 24)
    with pytest.raises(ValueError, match="embeddings, which have no attention"):
        encode_crops(tower("sdpa"), tiny_images(1), 0, with_cls_attention=True)
    with pytest.raises(ValueError, match="mm_vision_select_feature"):
        encode_crops(tower("sdpa"), tiny_images(1), -2, "cls")


def test_pixel_values_of_any_dtype_are_moved():
    with torch.no_grad():
        half = encode_crops(tower("sdpa"), tiny_images(1).half(), -2).features_NPC
        double = encode_crops(tower("sdpa"), tiny_images(1).double(), -2).features_NPC
    assert half.dtype == double.dtype == torch.float32
    torch.testing.assert_close(half, double, atol=0.05, rtol=0.05)


def test_llavas_view_of_the_tower():
    model = tiny_model()
    view = model.get_vision_tower()
    assert isinstance(view, VisionTower) and view.is_loaded and view.load_model() is None
    assert (view.num_patches, view.num_patches_per_side, view.hidden_size) == (PATCHES, GRID, 24)
    assert view.select_layer == -2 and view.select_feature == "patch" and view.dtype == torch.float32
    stack = view(tiny_images(2))
    assert stack.shape == (2, PATCHES, 24) and not stack.requires_grad
    one_by_one = view([tiny_images(2)[0], tiny_images(2)[1:]])
    torch.testing.assert_close(torch.cat(one_by_one), stack, atol=1e-5, rtol=1e-5)
    assert view.vision_tower is model.model.vision_tower and model.get_model() is model.model


@torch.no_grad()
def test_received_attention_is_summed_in_blocks(eager_outputs, monkeypatch):
    """Never the map of all rows and heads; the result is that of the full map."""
    rows = []

    def watched(query, *args):
        rows.append(query.shape[2])
        return attention_rows(query, *args)

    monkeypatch.setattr(vision, "_BLOCK", 5)
    monkeypatch.setattr(vision, "attention_rows", watched)
    facts = {
        "middle": VisionFact(TowerValue.RECEIVED_ATTENTION, 1),
        "last": VisionFact(TowerValue.RECEIVED_ATTENTION, -1),
    }
    encoded = encode_crops(tower("sdpa"), tiny_images(3), -2, facts=facts)
    for name, layer in (("middle", 1), ("last", -1)):
        expected = eager_outputs.attentions[layer].mean(dim=(1, 2))[:, 1:]
        torch.testing.assert_close(encoded.facts[name], expected, atol=1e-6, rtol=1e-5)
    assert max(rows) == 5 and sum(rows) == 2 * (PATCHES + 1)


@torch.no_grad()
def test_a_fact_of_a_layer_behind_the_selected_one_does_not_run_it():
    model, calls = tower("sdpa"), []
    for i, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    facts = {"keys": VisionFact(TowerValue.WIDE_KEYS, -1)}
    encode_crops(model, tiny_images(1), -2, facts=facts)
    assert calls == list(range(LAYERS - 1))
    calls.clear()
    plain = encode_crops(model, tiny_images(1), 1).features_NPC
    calls.clear()
    encoded = encode_crops(model, tiny_images(1), 1, facts=facts)
    assert calls == list(range(LAYERS - 1)) and torch.equal(encoded.features_NPC, plain)
