"""Pixels: the published code's recorded tensors, and an independent computation on real photographs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava.mm_utils import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    padding_mask,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
)
from tests.conftest import GOLDEN

GOLDEN_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def golden_processor():
    return CLIPImageProcessorPil.from_pretrained(GOLDEN / "tiny8_p16" / "vision_tower")


def config(aspect_ratio, pinpoints=None, **fields):
    return SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=pinpoints, **fields)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("mode", ["pad", "anyres"])
def test_recorded_pixel_values(golden, golden_processor, mode, index):
    _, arrays = golden("pure_functions")
    image = Image.fromarray(arrays[f"pad_pre{index}/image"])
    pixels = process_images([image], golden_processor, config(mode, GOLDEN_PINPOINTS))[0]
    np.testing.assert_array_equal(pixels.numpy(), arrays[f"{mode}_pre{index}/pixel_values"])


def test_recorded_padding_masks(golden):
    cases, arrays = golden("pure_functions")
    assert cases["pad_masks"]
    for name, case in cases["pad_masks"].items():
        mask = padding_mask((case["w"], case["h"]), 24)
        assert mask.dtype == torch.bool and int(mask.sum()) == case["n_masked"]
        np.testing.assert_array_equal(mask.numpy(), arrays[f"{name}/mask24"].astype(bool))


@pytest.mark.parametrize("grid", [4, 8, 16, 24, 27])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (100, 1), (335, 336), (1000, 300), (7, 5)])
def test_padding_mask_never_hides_the_image(size, grid):
    # Checked on pixels: paint the image white on black padding, then look at every patch.
    side = max(size)
    picture = np.zeros((side, side), bool)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    picture[top : top + size[1], left : left + size[0]] = True
    mask = padding_mask(size, grid).numpy()
    for row in range(grid):
        for column in range(grid):
            if mask[row, column]:
                y, x = row * side // grid, column * side // grid
                patch = picture[y : math.ceil((row + 1) * side / grid), x : math.ceil((column + 1) * side / grid)]
                assert not patch.any(), (row, column)


def test_padding_mask_is_transposed_with_the_image_and_refuses_nonsense():
    assert torch.equal(padding_mask((300, 900), 12), padding_mask((900, 300), 12).T)
    assert padding_mask((900, 300), 12).any() and not padding_mask((50, 50), 12).any()
    with pytest.raises(ValueError, match="positive"):
        padding_mask((0, 5), 4)


def test_best_resolutions_of_the_published_code(golden):
    cases, _ = golden("pure_functions")
    for case in cases["anyres_tokens_llava_next"]:
        best = select_best_resolution((case["w"], case["h"]), NEXT_PINPOINTS)
        assert best == tuple(case["best"])
        grid_w, grid_h = get_anyres_image_grid_shape((case["w"], case["h"]), str(NEXT_PINPOINTS), 336)
        assert (1 + grid_w * grid_h) * 576 == case["n_visual"]
    for case in cases["preprocess"].values():
        assert select_best_resolution((case["w"], case["h"]), GOLDEN_PINPOINTS) == tuple(case["best_resolution"])


def test_the_two_published_resolution_rules_differ_for_small_images_and_for_wide_ones():
    assert select_best_resolution((336, 336), NEXT_PINPOINTS, "fill") == (672, 672)
    # LLaVA's rule counts no upscaling: pictures smaller than every canvas get the first of the smallest.
    assert select_best_resolution((336, 336), NEXT_PINPOINTS, "effective") == (336, 672)
    assert select_best_resolution((320, 240), NEXT_PINPOINTS, "effective") == (336, 672)
    # 16:9 at any size: most pixels, or least empty canvas.
    assert select_best_resolution((1920, 1080), NEXT_PINPOINTS, "effective") == (672, 672)
    assert select_best_resolution((1920, 1080), NEXT_PINPOINTS, "fill") == (672, 336)
    for size in ((1200, 1200), (2000, 600), (700, 1400)):
        assert len({select_best_resolution(size, NEXT_PINPOINTS, rule) for rule in ("fill", "effective")}) == 1
    for long in range(2010, 6000, 70):  # large pictures: from sqrt(2) to sqrt(6), as the footguns say
        for size in ((long, 2000), (2000, long)):
            rules = {select_best_resolution(size, NEXT_PINPOINTS, rule) for rule in ("fill", "effective")}
            assert len(rules) == 1 + (2**0.5 < long / 2000 < 6**0.5), size
    with pytest.raises(ValueError, match="unknown resolution rule"):
        select_best_resolution((1, 1), NEXT_PINPOINTS, "best")
    with pytest.raises(ValueError, match="empty"):
        select_best_resolution((1, 1), [])


def test_anyres_rule_is_an_option_of_the_config(golden_processor):
    image = Image.new("RGB", (56, 56), (9, 99, 199))
    fill = process_images([image], golden_processor, config("anyres", GOLDEN_PINPOINTS))
    effective = process_images(
        [image], golden_processor, config("anyres", GOLDEN_PINPOINTS, anyres_resolution_rule="effective")
    )
    assert fill.shape == (1, 5, 3, 56, 56) and effective.shape == (1, 3, 3, 56, 56)


def test_images_of_different_crop_counts_stay_a_list(golden_processor):
    images = [Image.new("RGB", (112, 112)), Image.new("RGB", (168, 56))]
    pixels = process_images(images, golden_processor, config("anyres", GOLDEN_PINPOINTS))
    assert [tuple(p.shape) for p in pixels] == [(5, 3, 56, 56), (4, 3, 56, 56)]


def test_padding_centers_with_the_odd_pixel_below():
    square = expand2square(Image.new("RGB", (4, 1), (255, 0, 0)), (1, 2, 3))
    rows = np.asarray(square)[:, 0]
    assert square.size == (4, 4) and rows.tolist() == [[1, 2, 3], [255, 0, 0], [1, 2, 3], [1, 2, 3]]


def test_tiles_are_row_major_and_resizing_centers_on_black():
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    assert [np.asarray(t)[0, 0] for t in divide_to_patches(picture, 2)] == [0, 2, 8, 10]
    canvas = np.asarray(resize_and_pad_image(Image.new("RGB", (10, 5), (50, 60, 70)), (8, 8)))
    assert (canvas[:2] == 0).all() and (canvas[6:] == 0).all() and (canvas[2:6] == (50, 60, 70)).all()


# --- real photographs: an independent computation, and transformers' own processors -------------------------


def normalized(pixels: np.ndarray) -> np.ndarray:
    """CLIP's scaling of `[H, W, 3]` bytes to `[3, H, W]`, in the precision and order of the published tools."""
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((scaled - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


def independent_plain(image: Image.Image, side: int) -> np.ndarray:
    """Bicubic resize of the short edge, center crop by slicing."""
    width, height = image.size
    size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
    pixels = np.asarray(image.resize(size, Image.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return normalized(pixels[top : top + side, left : left + side])


def independent_pad(image: Image.Image, side: int) -> np.ndarray:
    full = max(image.size)
    canvas = np.empty((full, full, 3), np.uint8)
    canvas[:] = (122, 116, 104)
    x, y = (full - image.width) // 2, (full - image.height) // 2
    canvas[y : y + image.height, x : x + image.width] = np.asarray(image)
    return independent_plain(Image.fromarray(canvas), side)


def independent_anyres(image: Image.Image, side: int) -> np.ndarray:
    """Whole view, then tiles; the canvas is the one that the scaled image fills best."""
    width, height = image.size
    filled = {}
    for canvas_w, canvas_h in NEXT_PINPOINTS:
        scale = min(canvas_w / width, canvas_h / height)
        filled.setdefault(int(width * scale) * int(height * scale) / (canvas_w * canvas_h), (canvas_w, canvas_h))
    canvas_w, canvas_h = filled[max(filled)]
    if canvas_w / width < canvas_h / height:
        new_w, new_h = canvas_w, min(math.ceil(height * (canvas_w / width)), canvas_h)
    else:
        new_w, new_h = min(math.ceil(width * (canvas_h / height)), canvas_w), canvas_h
    canvas = np.zeros((canvas_h, canvas_w, 3), np.uint8)
    x, y = (canvas_w - new_w) // 2, (canvas_h - new_h) // 2
    canvas[y : y + new_h, x : x + new_w] = np.asarray(image.resize((new_w, new_h), Image.BICUBIC))
    rows, columns = canvas_h // side, canvas_w // side
    tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    whole = np.asarray(image.resize((side, side), Image.BICUBIC))
    return np.stack([normalized(crop) for crop in (whole, *tiles)])


@pytest.fixture(scope="module")
def photographs(shared_benchmarks):
    opened = {path.name: Image.open(path) for path in sorted((shared_benchmarks / "images").iterdir())}
    assert len(opened) >= 10
    # Smaller copies of both orientations would hide nothing: the arithmetic is per pixel. All are used as they are.
    return {name: image.convert("RGB") for name, image in opened.items()}


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_mean=MEAN, image_std=STD
    )


@pytest.mark.parametrize("mode", ["pad", "anyres", "plain"])
def test_real_photographs_against_an_independent_computation(photographs, processor, mode):
    reference = {"pad": independent_pad, "anyres": independent_anyres, "plain": independent_plain}[mode]
    for name, image in photographs.items():
        pixels = process_images([image], processor, config(mode, NEXT_PINPOINTS))[0].numpy()
        np.testing.assert_array_equal(pixels, reference(image, 336), err_msg=name)


def test_real_photographs_against_transformers_own_processors(photographs, processor):
    from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil

    common = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    # Two traps: without do_pad it crops where LLaVA pads, and it reads pinpoints as (height, width).
    padding = LlavaImageProcessorPil(do_pad=True, **common)
    tiling = LlavaNextImageProcessorPil(image_grid_pinpoints=[[h, w] for w, h in NEXT_PINPOINTS], **common)
    for name, image in photographs.items():
        pixels = process_images([image], processor, config("pad"))[0].numpy()
        np.testing.assert_array_equal(pixels, padding(image, return_tensors="np")["pixel_values"][0], err_msg=name)
        tiles = process_images([image], processor, config("anyres", NEXT_PINPOINTS, anyres_resolution_rule="effective"))
        theirs = tiling(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(tiles[0].numpy(), theirs, err_msg=name)


def test_the_loader_gives_the_recorded_pixels(golden):
    # On the PIL backend: torchvision's rounds differently, and answers measured with LLaVA used PIL.
    from llava.model.builder import load_image_processor
    from tests.model.tiny import tiny_config

    _, arrays = golden("pure_functions")
    small = tiny_config(vision={"image_size": 56, "patch_size": 14})
    processor = load_image_processor(GOLDEN, GOLDEN / "tiny8_p16" / "vision_tower", small)
    assert isinstance(processor, CLIPImageProcessorPil)
    pixels = process_images([Image.fromarray(arrays["pad_pre0/image"])], processor, config("pad"))[0]
    np.testing.assert_array_equal(pixels.numpy(), arrays["pad_pre0/pixel_values"])
