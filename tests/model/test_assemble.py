"""Arrangements of crops against plain loops and against the pictures they come from."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava.mm_utils import resize_and_pad_image, select_best_resolution
from llava.model.assemble import NEWLINE, arrange_crop, arrange_crops, arrangement_of, unpadded_window
from llava.utils import UserError
from tests.conftest import ROOT

SIDE = 336
GRID = 24
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# Wide, tall, square, small, and pictures thinner than a patch, or than a pixel once scaled.
SIZES = [
    (640, 480), (1000, 300), (336, 336), (350, 700), (320, 240), (1200, 1200), (1920, 1080), (400, 1600), (777, 333),
    (1, 500), (500, 1), (1, 1), (20000, 50), (50, 20000), (20000, 1), (3, 20000), (1024, 1023), (59, 61),
]  # fmt: skip


def coordinates(grid_w: int, grid_h: int, p: int) -> torch.Tensor:
    """Crops whose patches hold (row, column) in the whole raster; those of the whole image hold (-1, patch)."""
    crops = torch.full((1 + grid_w * grid_h, p * p, 2), -1)
    crops[0, :, 1] = torch.arange(p * p)
    for tile in range(grid_w * grid_h):
        for patch in range(p * p):
            row = tile // grid_w * p + patch // p
            column = tile % grid_w * p + patch % p
            crops[1 + tile, patch] = torch.tensor([row, column])
    return crops


def test_spatial_is_the_whole_image_then_one_global_raster():
    crops = coordinates(3, 2, 2)
    arranged = arrange_crops("spatial", 4, 7, (3, 2), None)
    expected = [[-1, i] for i in range(4)] + [[y, x] for y in range(4) for x in range(6)]
    assert arranged.gather(crops).tolist() == arranged.tokens(crops).tolist() == expected
    assert arranged.spans == ((0, 28),) and arranged.newlines == ()
    assert arranged.crops == (0,) * 4 + (1, 1, 2, 2, 3, 3) * 2 + (4, 4, 5, 5, 6, 6) * 2


def test_flat_is_one_crop_after_the_other_and_needs_no_sizes():
    crops = torch.arange(12).view(3, 4)
    arranged = arrange_crops("flat", 4, 3, None, None)
    assert arranged.gather(crops).tolist() == list(range(12)) and arranged.crops == (0,) * 4 + (1,) * 4 + (2,) * 4


def test_unpadding_cuts_both_sides_and_closes_rows_with_newlines():
    # 3 x 1 tiles of 4 x 4 patches; a 120 x 20 picture covers 12 x 2 patches: one row is cut above and one below.
    crops = coordinates(3, 1, 4).float()
    arranged = arrange_crops("spatial_unpad", 16, 4, (3, 1), (120, 20))
    newline = torch.tensor([7.0, 8.0])
    expected = [[-1, i] for i in range(16)]
    for row in (1, 2):
        expected += [[row, column] for column in range(12)] + [[7, 8]]
    assert arranged.tokens(crops, newline).tolist() == expected
    assert arranged.gather(crops).tolist() == [pair for pair in expected if pair != [7, 8]]
    assert arranged.spans == ((0, 28), (29, 41)) and arranged.newlines == ((28, 29), (41, 42))
    assert arranged.source_N[28] == NEWLINE
    assert arranged.crops[:16] == (0,) * 16 and set(arranged.crops[16:]) == {1, 2, 3}


@pytest.mark.parametrize("rule", ["effective", "fill"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_unpadding_equals_transformers_packing(size, rule):
    """Transformers' LlavaNext reads pairs as (height, width): it is given the one resolution that was chosen."""
    width, height = select_best_resolution(size, PINPOINTS, rule)
    grid = (width // SIDE, height // SIDE)
    crops = 1 + grid[0] * grid[1]
    features = torch.arange(crops * GRID * GRID).view(crops, -1, 1).float()
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=SIDE, patch_size=SIDE // GRID), image_grid_pinpoints=[[height, width]]
    )
    (expected,), _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [features], [(size[1], size[0])], "default", torch.tensor([-5.0])
    )
    arranged = arrange_crops("spatial_unpad", GRID * GRID, crops, grid, size)
    assert torch.equal(arranged.tokens(features, torch.tensor([-5.0])), expected)
    assert torch.equal(arranged.gather(features), expected[expected[:, 0] >= 0])
    tokens = len(expected)
    covered = sorted(arranged.spans + arranged.newlines)
    assert covered[0][0] == 0 and covered[-1][1] == tokens
    assert all(before[1] == after[0] for before, after in zip(covered[:-1], covered[1:], strict=True))
    assert arranged.spans[0][1] >= GRID * GRID  # the whole image is there, whatever its shape


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_what_is_cut_off_was_padding(size):
    """On pixels: a white picture on black. No patch full of picture goes, no patch without picture stays."""
    width, height = select_best_resolution(size, PINPOINTS, "effective")
    canvas = np.asarray(resize_and_pad_image(Image.new("RGB", size, "white"), (width, height)))[..., 0] > 0
    patch = SIDE // GRID
    shown = canvas.reshape(height // patch, patch, width // patch, patch).mean((1, 3))
    kept = np.zeros_like(shown, bool)
    kept[unpadded_window(size, (width // patch, height // patch))] = True
    assert not (kept & (shown == 0)).any()
    assert not (~kept & (shown == 1)).any()


def test_pictures_thinner_than_a_patch_leave_the_whole_image():
    wide = arrange_crops("spatial_unpad", 576, 4, (3, 1), (20000, 50))
    assert wide.spans == ((0, 576),) and wide.newlines == ()
    tall = arrange_crops("spatial_unpad", 576, 4, (1, 3), (50, 20000))
    # LLaVA's arithmetic: the rows have lost their patches but not their newlines.
    assert tall.spans == ((0, 576),) and tall.newlines == ((576, 576 + 72),)
    features = torch.randn(4, 576, 2)
    assert tall.tokens(features, torch.zeros(2)).shape == (648, 2) and tall.gather(features).shape == (576, 2)


def test_transposed_grids():
    """D.7's trap: transformers reads [336, 672] as height 336, width 672; for small pictures the tie makes it visible.

    LLaVA takes the first pair as (width, height), so a small square picture becomes 1 x 2 tiles, one above the other.
    """
    config = SimpleNamespace(
        image_grid_pinpoints=str(PINPOINTS),
        vision_config=SimpleNamespace(image_size=336),
        anyres_resolution_rule="effective",
    )
    small = arrangement_of(config, "spatial_unpad", 3, 576, (320, 240), merged=True)
    # 24 patches wide, 48 high; 24 * 240 / 320 = 18 rows show the picture: 15 of 48 rows go on each side.
    assert len(small.spans) == 18 and len(small.crops) == 576 + 18 * 24
    assert small.spans[0] == (0, 576 + 24) and len(small.source_N) == 576 + 18 * 25


def test_single_crops():
    plain, closed = arrange_crop(4), arrange_crop(4, newline=True)
    features = torch.arange(8.0).view(1, 4, 2)
    assert torch.equal(plain.tokens(features), features[0]) and plain.newlines == ()
    assert closed.tokens(features, torch.tensor([9.0, 9.0])).tolist()[-1] == [9, 9] and closed.spans == ((0, 4),)
    assert closed.newlines == ((4, 5),) and closed.crops == (0,) * 4
    with pytest.raises(ValueError, match="no image_newline"):
        closed.tokens(features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spatial", 4, 4, (2, 2), None), "4 crops do not make one image and 2 x 2 tiles"),
        (("spatial", 5, 5, (2, 2), None), "not a square of patches"),
        (("spatial_unpad", 4, 5, (2, 2), (0, 5)), "must be positive"),
        (("spatial_unpad_max_9", 4, 5, (2, 2), None), "'spatial_unpad_max_9' is not supported, only flat"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        arrange_crops(*arguments)


def test_values_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="5 patches per crop, the arrangement has 4"):
        arrange_crop(4).gather(torch.zeros(1, 5))


def test_settings_that_are_missing_are_named():
    bare = SimpleNamespace(vision_config=SimpleNamespace(image_size=336))
    with pytest.raises(UserError, match="need image_sizes"):
        arrangement_of(bare, "spatial", 5, 576, None, True)
    with pytest.raises(UserError, match=r"must be positive, got \(0, 9\)"):
        arrangement_of(bare, "spatial", 5, 576, (0, 9), True)
    with pytest.raises(UserError, match="need image_grid_pinpoints"):
        arrangement_of(bare, "spatial", 5, 576, (9, 9), True)
    with pytest.raises(UserError, match="'anyres_max' is not supported"):
        arrangement_of(bare, "anyres_max", 5, 576, (9, 9), True)
    assert len(arrangement_of(bare, "flat", 5, 576, None, True).crops) == 5 * 576


def test_per_patch_values_of_any_shape_follow_the_same_order():
    arranged = arrange_crops("spatial_unpad", 16, 4, (3, 1), (120, 20))
    keys = torch.randn(4, 16, 3, 5)
    scores = keys[..., 1, 2]
    assert torch.equal(arranged.gather(keys)[:, 1, 2], arranged.gather(scores))
    assert len(arranged.gather(scores)) == len(arranged.crops) == sum(end - start for start, end in arranged.spans)
    assert arranged.gather(keys.half()).shape == (len(arranged.crops), 3, 5)


def test_the_documented_token_counts():
    text = (ROOT / "docs" / "llava_1_6.md").read_text()
    pattern = r"^\| (\d+) x (\d+) \| ([^|]+) \| (\d+) \| (\d+) \+ (\d+)[^|]* \| ([^|]+) \| (\d+) \|$"
    rows = re.findall(pattern, text, re.M)
    assert len(rows) == 4
    for width, height, effective, spatial, patches, newlines, fill, filled in rows:
        size = int(width), int(height)
        for rule, canvas, count in (("effective", effective, spatial), ("fill", fill, filled)):
            best = select_best_resolution(size, PINPOINTS, rule)
            assert f"{best[0]} x {best[1]}" == canvas and 576 * (1 + best[0] * best[1] // SIDE**2) == int(count)
        best = select_best_resolution(size, PINPOINTS, "effective")
        grid = best[0] // SIDE, best[1] // SIDE
        arranged = arrange_crops("spatial_unpad", 576, 1 + grid[0] * grid[1], grid, size)
        assert (len(arranged.crops), len(arranged.newlines)) == (int(patches), int(newlines))
