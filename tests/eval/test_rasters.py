"""Rasters say where tokens lie in a picture: a white spot is found in the token that covers it, by the real pixels."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava.eval.answering.places import family_rasters, llava_rasters
from llava.eval.answering.rasters import Raster, as_json, numbered
from llava.mm_utils import process_images
from llava.model.assemble import arrangement_of
from tests.families.processors import placeholder, processor

PINPOINTS = [[24, 48], [48, 24], [48, 48]]
SIZES = [(96, 96), (120, 50), (40, 130), (200, 90)]


def spotted(size, spot):
    """A black picture with a white spot; spot: its middle, relative to the picture."""
    image, (width, height) = Image.new("RGB", size), size
    reach = max(size) // 12
    x, y = int(spot[0] * width), int(spot[1] * height)
    image.paste((255, 255, 255), (x - reach, y - reach, x + reach, y + reach))
    return image


def raster_of(rasters, token):
    return next(raster for raster in rasters if raster.first <= token < raster.first + raster.tokens)


def middle(rasters, token):
    """The middle of a token, relative to the picture."""
    raster = raster_of(rasters, token)
    row, column = divmod(token - raster.first, raster.grid[1])
    left, top, right, bottom = raster.box
    return left + (column + 0.5) / raster.grid[1] * (right - left), top + (row + 0.5) / raster.grid[0] * (bottom - top)


def seen(rasters, token, spot):
    """Distance of the spot from the middle of a token, in tokens."""
    raster, (x, y) = raster_of(rasters, token), middle(rasters, token)
    left, top, right, bottom = raster.box
    return max(abs(spot[0] - x) / (right - left) * raster.grid[1], abs(spot[1] - y) / (bottom - top) * raster.grid[0])


def brightness(crops, grid):
    """Mean of every token's pixels, ``[crops, grid * grid]``."""
    return torch.nn.functional.adaptive_avg_pool2d(crops.float(), grid).mean(1).flatten(1)


class FakeLlava:
    """What `llava_rasters` asks of a model."""

    def __init__(self, aspect, merge_type):
        self.config = SimpleNamespace(
            image_aspect_ratio=aspect,
            image_grid_pinpoints=PINPOINTS,
            anyres_resolution_rule="effective",
            vision_config=SimpleNamespace(image_size=24),
        )
        self._merge_type = merge_type

    def merge_type(self):
        return self._merge_type

    def get_vision_tower(self):
        return SimpleNamespace(num_patches=36, select_feature="patch")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return processor("llava", tmp_path_factory.mktemp("clip")).image_processor


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("aspect", "merge_type"),
    [("pad", "flat"), (None, "flat"), ("anyres", "flat"), ("anyres", "spatial"), ("anyres", "spatial_unpad")],
)
def test_a_spot_is_in_the_token_that_sees_it(clip, aspect, merge_type, size):
    model = FakeLlava(aspect, merge_type)
    for spot in [(0.5, 0.5), (0.42, 0.6), (0.55, 0.38)]:
        pixels = process_images([spotted(size, spot)], clip, model.config)[0]
        crops = pixels if pixels.ndim == 4 else pixels[None]
        arrangement = arrangement_of(model.config, merge_type, len(crops), 36, size, True)
        values = arrangement.gather(brightness(crops, 6))
        rasters = llava_rasters(model, clip, [size], [len(crops)], len(values))
        assert sum(raster.tokens for raster in rasters) == len(values)
        for raster in rasters if aspect == "anyres" else []:
            own = values[raster.first : raster.first + raster.tokens]
            if own.max() - own.min() > 0.5:  # a tile may lie elsewhere
                assert seen(rasters, raster.first + int(own.argmax()), spot) < 1.6, (raster, spot)
        inside = [0 <= x <= 1 and 0 <= y <= 1 for x, y in (middle(rasters, token) for token in range(len(values)))]
        values = values.masked_fill(~torch.tensor(inside), -torch.inf)  # padding is gray, the picture black
        assert seen(rasters, int(values.argmax()), spot) < 1.2


def test_padding_lies_outside_of_the_picture(clip):
    (raster,) = llava_rasters(FakeLlava("pad", "flat"), clip, [(200, 100)], [1], 36)
    assert raster.box == (0.0, -0.5, 1.0, 1.5)
    (raster,) = llava_rasters(FakeLlava(None, "flat"), clip, [(200, 100)], [1], 36)
    assert raster.box == (0.25, 0.0, 0.75, 1.0)
    whole, tiles = llava_rasters(FakeLlava("anyres", "spatial"), clip, [(200, 50)], [3], 36 + 72)
    assert whole.box == (0.0, 0.0, 1.0, 1.0) and tiles.tiles == (2, 1) and tiles.box == (0.0, -0.5, 1.0, 1.5)
    whole, tiles = llava_rasters(FakeLlava("anyres", "spatial_unpad"), clip, [(200, 50)], [3], 36 + 48)
    # 24 pixels of canvas for 12 of picture are 6 rows; (6 - 3) // 2 of them go above and below.
    assert tiles.grid == (4, 12) and tiles.box == pytest.approx((0.0, -1 / 6, 1.0, 7 / 6))


def test_rasters_that_do_not_make_the_prompt_are_none(clip):
    assert llava_rasters(FakeLlava("pad", "flat"), clip, [(20, 10)], [1], 35) is None
    assert numbered([[Raster((2, 2))], [Raster((3, 1))]], 7)[1] == Raster((3, 1), first=4, image=1)
    assert numbered([[Raster((2, 2))], None], 4) is None and numbered([], 0) is None
    assert numbered([[Raster((2, 2))]], 5, extra=1) == [Raster((2, 2), first=1)]
    assert as_json([Raster((2, 2))]) == [
        {"grid": [2, 2], "box": [0.0, 0.0, 1.0, 1.0], "tiles": [1, 1], "first": 0, "image": 0}
    ]


@pytest.mark.parametrize("size", [(96, 96), (120, 60)])
def test_a_spot_in_the_tokens_of_qwen(tmp_path, size):
    made = processor("qwen2_vl", tmp_path)
    spot = (0.45, 0.62)
    values = made.image_processor([spotted(size, spot)], return_tensors="pt")
    (rasters,) = family_rasters("qwen2_vl", made, values, [[size]])
    rasters = numbered(rasters, int(values["image_grid_thw"].prod()) // made.image_processor.merge_size**2)
    # The patches of a token stand side by side.
    means = values["pixel_values"].mean(1).view(-1, made.image_processor.merge_size**2).mean(1)
    assert seen(rasters, int(means.argmax()), spot) < 1.0


@pytest.mark.parametrize("name", ["idefics3", "internvl"])
@pytest.mark.parametrize("size", [(60, 44), (44, 60), (100, 30), (50, 50)])
def test_a_spot_in_the_tokens_of_families_that_cut_tiles(tmp_path, name, size):
    made, spot = processor(name, tmp_path), (0.3, 0.7)
    values = made(text=[f"{placeholder(name)} what ?"], images=[[spotted(size, spot)]], return_tensors="pt")
    side = math.isqrt(made.image_seq_len if name == "idefics3" else made.image_seq_length)
    pixels = values["pixel_values"]
    means = brightness(pixels[0] if pixels.ndim == 5 else pixels, side)
    ((rasters,),) = family_rasters(name, made, values, [[size]])
    rasters = numbered([rasters], means.numel())
    assert len(rasters) == len(means) > 1
    for number, own in enumerate(means):
        if own.max() - own.min() > 0.5:
            assert seen(rasters, number * side * side + int(own.argmax()), spot) < 1.6
    assert seen(rasters, int(means.argmax()), spot) < 1.0


@pytest.mark.parametrize("size", [(60, 44), (44, 60), (120, 30), (50, 50)])
def test_onevision_has_as_many_tokens_as_its_processor_says(tmp_path, size):
    """How many there are and their rows and columns follow from each other; newlines are no visual tokens."""
    made = processor("llava_onevision", tmp_path)
    values = made(text=["<image> what ?"], images=[[spotted(size, (0.5, 0.5))]], return_tensors="pt")
    ((rasters,),) = family_rasters("llava_onevision", made, values, [[size]])
    rows = sum(raster.grid[0] for raster in rasters[1:])
    places = int((values["input_ids"] == made.tokenizer.convert_tokens_to_ids("<image>")).sum())
    assert sum(raster.tokens for raster in rasters) + rows in (places, places - 1)  # and perhaps one behind the picture
    assert len(rasters) == 2


def test_families_whose_places_are_not_known_have_no_rasters():
    made = SimpleNamespace(image_processor=None)
    assert family_rasters("video_llava", made, {}, [[(8, 8)], []]) == [[None], []]
