"""LLaVA-1.6: the dense model equals transformers' LlavaNextForConditionalGeneration on the same random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.multimodal import positions_from_mask
from tests.model.tiny import (
    IMAGE_SIDE,
    NATIVE_IMAGE_ID,
    PATCHES,
    TEXT_FIELDS,
    tiny_images,
    tiny_model,
    write_original,
)

I = IMAGE_TOKEN_INDEX  # noqa: E741 - prompts below read better
S = IMAGE_SIDE
PINPOINTS = [[S, 2 * S], [2 * S, S], [2 * S, 2 * S], [3 * S, S], [S, 3 * S]]
NEXT_FIELDS = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": PINPOINTS,
    "anyres_resolution_rule": "effective",
}
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": S}, crop_size={"height": S, "width": S})
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

SQUARE, WIDE, TALL, VERY_WIDE, VERY_TALL = (70, 70), (120, 50), (40, 90), (300, 9), (9, 300)
LINE, COLUMN, SMALL, DOT = (2000, 5), (5, 2000), (20, 15), (1, 1)
# Prompts, and the sizes of their images in reading order.
CASES = {
    "wide": ([[1, 5, I, 7, 8, 9]], [WIDE]),
    "tall": ([[1, 5, I, 7, 8, 9]], [TALL]),
    "square": ([[1, I, 7]], [SQUARE]),
    "very wide": ([[1, I, 7]], [VERY_WIDE]),
    "very tall": ([[1, I, 7]], [VERY_TALL]),
    "thinner than a patch, wide": ([[1, I, 7]], [LINE]),
    "thinner than a patch, tall": ([[1, I, 7]], [COLUMN]),
    "small: the transposed grid": ([[1, I, 7]], [SMALL]),
    "one pixel": ([[1, I, 7]], [DOT]),
    "image last": ([[1, 5, 7, I]], [WIDE]),
    "several images of different sizes": ([[1, 5, I, I, 7, I, 9]], [WIDE, SMALL, TALL]),
    "batch of equal rows": ([[1, 5, I, 7], [1, I, 9, 8], [I, 3, 4, 5]], [WIDE, WIDE, WIDE]),
    "batch of different rows": ([[1, 5, 6, 10, I, 7], [1, I, 7], [1, 5, I, 8, I]], [SQUARE, VERY_WIDE, TALL, SMALL]),
    "one row without an image": ([[1, 5, I, 6], [1, 4, 3], [1, I, 9, 12, 13]], [TALL, SQUARE]),
    "text only": ([[1, 5, 6, 7, 8], [1, 9]], []),
}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def models(request):
    ours = decoder_model(request.param, **NEXT_FIELDS)
    return ours, native_next(ours)


def decoder_model(kind: str, **fields):
    if kind == "llama":
        return tiny_model(**fields)
    names = set(TEXT_FIELDS) - {"mlp_bias"}
    text = MistralConfig(**{name: TEXT_FIELDS[name] for name in names}, sliding_window=None)
    return tiny_model(text_config=text, **fields)


def native_next(ours) -> LlavaNextForConditionalGeneration:
    config = LlavaNextConfig(
        text_config=ours.config.text_config,
        vision_config=ours.config.vision_config,
        image_token_index=NATIVE_IMAGE_ID,
        # Transformers reads (height, width).
        image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    model.load_state_dict(ours.state_dict())
    return model


def pictures(sizes) -> list[Image.Image]:
    noise = np.random.default_rng(len(sizes))
    return [Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def native_inputs(native, rows, pixels, sizes) -> dict:
    """What transformers wants: as many ids per image as its own packing makes features, left padding."""
    lengths = iter(())
    call = {}
    if sizes:
        call = {"pixel_values": torch.cat(list(pixels)), "image_sizes": torch.tensor([(h, w) for w, h in sizes])}
        lengths = iter([len(part) for part in native.get_image_features(**call, return_dict=True).pooler_output])
    rows = [[i for t in row for i in ([NATIVE_IMAGE_ID] * next(lengths) if t == I else [t])] for row in rows]
    width = max(map(len, rows))
    call["input_ids"] = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    call["attention_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return call


def our_inputs(rows, pixels, sizes, side: str) -> dict:
    width = max(map(len, rows))

    def padded(values, fill):
        return torch.tensor(
            [[fill] * (width - len(v)) + v if side == "left" else v + [fill] * (width - len(v)) for v in values]
        )

    return {
        "input_ids": padded(rows, 0),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "images": pixels if sizes else None,
        "image_sizes": sizes or None,
    }


PADDED = [name for name, (rows, _) in CASES.items() if len(set(map(len, rows))) > 1]


@torch.no_grad()
@pytest.mark.parametrize(("name", "side"), [*((name, "left") for name in CASES), *((name, "right") for name in PADDED)])
def test_logits(models, name, side):
    ours, native = models
    rows, sizes = CASES[name]
    pixels = process_images(pictures(sizes), PROCESSOR, ours.config)
    call = native_inputs(native, rows, pixels, sizes)
    expected = native(**call, position_ids=positions_from_mask(call["attention_mask"])).logits
    inputs = our_inputs(rows, pixels, sizes, side)
    if not sizes and side == "right":  # without images nothing is rearranged
        logits = torch.cat([ours(torch.tensor([row])).logits[0] for row in rows])
        valid = call["attention_mask"].bool()
        torch.testing.assert_close(logits, expected[valid], atol=1e-5, rtol=0)
        return
    logits = ours(**inputs).logits
    valid = call["attention_mask"].bool()
    assert logits.shape == expected.shape and expected[valid].std() > 0.1
    assert (logits[valid] - expected[valid]).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["wide", "several images of different sizes", "batch of different rows"])
def test_generation(models, name):
    ours, native = models
    rows, sizes = CASES[name]
    pixels = process_images(pictures(sizes), PROCESSOR, ours.config)
    call = native_inputs(native, rows, pixels, sizes)
    expected = native.generate(**call, max_new_tokens=5, **GREEDY)[:, call["input_ids"].shape[1] :]
    assert torch.equal(ours.generate(**our_inputs(rows, pixels, sizes, "left"), max_new_tokens=5, **GREEDY), expected)


@torch.no_grad()
def test_both_layouts_of_a_checkpoint_give_the_same_logits(tmp_path, models):
    """Written as the original project and as transformers write it, read by the loader, against transformers."""
    ours, native = models
    rows, sizes = CASES["batch of different rows"]
    pixels = process_images(pictures(sizes), PROCESSOR, ours.config)
    call = native_inputs(native, rows, pixels, sizes)
    expected = native(**call, position_ids=positions_from_mask(call["attention_mask"])).logits
    read = native.config.image_grid_pinpoints
    # The published llava-hf checkpoints hold LLaVA's list as it is; transformers reads its pairs the other way round.
    native.config.image_grid_pinpoints = PINPOINTS
    native.save_pretrained(tmp_path / "hf")
    native.config.image_grid_pinpoints = read
    kind = ours.config.text_config.model_type
    fields = {"model_type": "llava_mistral", "sliding_window": None} if kind == "mistral" else {}
    write_original(tmp_path / "original", ours, **NEXT_FIELDS, **fields)
    for layout in ("hf", "original"):
        _, model, processor, _ = load_pretrained_model(str(tmp_path / layout), None, "llava-v1.6", device="cpu")
        again = process_images(pictures(sizes), processor, model.config)
        assert all(torch.equal(a, b) for a, b in zip(again, pixels, strict=True))
        logits = model(**our_inputs(rows, again, sizes, "left")).logits
        assert (logits - expected)[call["attention_mask"].bool()].abs().max() <= 1e-5


@torch.no_grad()
def test_llava_1_5_on_mistral():
    """The single-crop model, whose Llama cases are in test_parity."""
    ours = decoder_model("mistral")
    native = LlavaForConditionalGeneration(ours.config).eval()
    native.load_state_dict(ours.state_dict())
    images = tiny_images(3)
    rows = [[1, 5, I, 6, I, 7], [1, I, 9]]
    inputs = our_inputs(rows, images, [], "left") | {"images": images}
    expanded = [[i for t in row for i in ([NATIVE_IMAGE_ID] * PATCHES if t == I else [t])] for row in rows]
    width = max(map(len, expanded))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in expanded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in expanded])
    expected = native(
        input_ids=ids, pixel_values=images, attention_mask=mask, position_ids=positions_from_mask(mask)
    ).logits
    assert (ours(**inputs).logits - expected)[mask.bool()].abs().max() <= 1e-5
