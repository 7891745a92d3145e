"""Visual tokens and their CLS attention, recorded from the published code, through our loader and tower."""

from __future__ import annotations

import functools

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.utils import UserError
from tests.conftest import GOLDEN

CASES = ["e2e01", "e2e02_mask", "e2e05", "e2e07_anyres_2x2", "e2e09_anyres_3x1"]


@functools.cache
def golden_model(checkpoint: str):
    # The published code always arranges crops this way.
    return load_pretrained_model(
        str(GOLDEN / checkpoint), None, checkpoint, device="cpu", mm_patch_merge_type="spatial"
    )[1]


@pytest.mark.parametrize("name", CASES)
def test_recorded_features_and_cls_attention(golden, name):
    cases, arrays = golden("e2e_cases")
    case = cases[name]
    model = golden_model(case["checkpoint"])
    get = lambda key: torch.from_numpy(arrays[f"{name}/{key}"])  # noqa: E731
    sizes = [case["image_size_wh"]] if case["image_size_wh"] else None
    masks = [get("mask")] if case["has_mask"] else None
    with torch.no_grad():
        (tokens,) = model.encode_visual_tokens(get("pixel_values"), sizes, image_masks=masks, with_cls_attention=True)
    torch.testing.assert_close(tokens.features, get("image_features"), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.cls_attention, get("image_attns_flat"), atol=1e-6, rtol=1e-4)
    if case["has_mask"]:
        # The mask only zeroes scores: the recorded attention of the tower itself is the same elsewhere.
        kept = get("mask").flatten() == 0
        torch.testing.assert_close(tokens.cls_attention[kept], get("encoder_attns_per_crop")[0][kept])
        assert tokens.cls_attention[~kept].eq(0).all()


@pytest.mark.parametrize("name", CASES)
def test_recorded_layout(golden, name):
    cases, arrays = golden("e2e_cases")
    case = cases[name]
    model = golden_model(case["checkpoint"])
    sizes = [case["image_size_wh"]] if case["image_size_wh"] else None
    with torch.no_grad():
        prepared = model.prepare_multimodal_inputs(
            torch.from_numpy(arrays[f"{name}/input_ids"]), torch.from_numpy(arrays[f"{name}/pixel_values"]), sizes
        )
    assert prepared.inputs_embeds.shape[1] == case["seq_len"]
    assert prepared.layout.spans == (((case["v_start"], case["v_start"] + case["v_num"]),),)


def test_image_sizes_zero_the_padding_where_the_checkpoint_pads(golden):
    cases, arrays = golden("e2e_cases")
    model = golden_model("tiny8_p16")
    pixels = torch.from_numpy(arrays["e2e02_mask/pixel_values"])
    with torch.no_grad():
        # An image this flat masks the first and last row of the 4 x 4 grid, as the recorded mask does.
        (tokens,) = model.encode_visual_tokens(pixels, [(100, 1)], with_cls_attention=True)
    expected = torch.from_numpy(arrays["e2e02_mask/image_attns_flat"])
    torch.testing.assert_close(tokens.cls_attention, expected, atol=1e-6, rtol=1e-4)


def test_crops_need_the_size_that_was_preprocessed(golden):
    _, arrays = golden("e2e_cases")
    model = golden_model("tiny8_p16")
    pixels = torch.from_numpy(arrays["e2e07_anyres_2x2/pixel_values"])
    with pytest.raises(UserError, match="need image_sizes"):
        model.encode_visual_tokens(pixels)
    with pytest.raises(UserError, match="3 x 1 tiles and a whole view, but has 5 crops"):
        model.encode_visual_tokens(pixels, [(300, 50)])


def test_masks_must_fit_the_visual_tokens(golden):
    _, arrays = golden("e2e_cases")
    model = golden_model("tiny8_p16")
    pixels = torch.from_numpy(arrays["e2e01/pixel_values"])
    with pytest.raises(UserError, match="an image mask has 9 entries for 16 visual tokens"):
        model.encode_visual_tokens(pixels, image_masks=[torch.zeros(3, 3)], with_cls_attention=True)
