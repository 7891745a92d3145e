"""Images that are not 8-bit RGB, carry EXIF or frames, or have extreme shapes: every case of
docs/images_and_prompts.md.
"""

from __future__ import annotations

import io
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

import llava.mm_utils
from llava.mm_utils import process_images, to_rgb
from llava.thin_images import pad_and_scale

SIDE = 56
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
RAMP = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(4, 0)


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def config(aspect_ratio):
    return SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=PINPOINTS)


def through_file(image, form, **options):
    """The image as it comes back from a file of that format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return Image.open(buffer)


def gray(image):
    """The gray levels of an RGB picture whose channels must agree."""
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()
    return pixels[..., 0]


# --- modes --------------------------------------------------------------------------------------------------


def test_rgb_is_the_same_object():
    image = Image.new("RGB", (3, 2))
    assert to_rgb(image) is image


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_the_file_may_be_closed_afterwards(tmp_path, mode):
    Image.new("RGB", (3, 2), "white").convert(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        converted = to_rgb(image)
    assert converted.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_ordinary_modes_are_llavas_conversion(mode):
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))
    image = colors.convert("L").convert(mode) if mode == "PA" else colors.convert(mode)
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(converted), np.asarray(image.convert("RGB")))


def test_gray_one_bit_and_gray_with_alpha():
    np.testing.assert_array_equal(gray(to_rgb(Image.fromarray(RAMP))), RAMP)
    np.testing.assert_array_equal(gray(to_rgb(Image.fromarray(RAMP > 99))), np.where(RAMP > 99, 255, 0))
    alpha = Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)])
    np.testing.assert_array_equal(gray(to_rgb(through_file(alpha, "PNG"))), RAMP)


def test_alpha_is_dropped_not_blended():
    hidden = Image.new("RGBA", (2, 2), (10, 200, 30, 0))
    assert to_rgb(through_file(hidden, "PNG")).getpixel((0, 0)) == (10, 200, 30)


def test_premultiplied_modes():
    image = Image.new("RGBA", (2, 2), (200, 100, 40, 128)).convert("RGBa")
    assert np.abs(np.subtract(to_rgb(image).getpixel((0, 0)), (200, 100, 40))).max() <= 1
    image = Image.new("LA", (2, 2), (200, 128)).convert("La")
    assert abs(gray(to_rgb(image))[0, 0] - 200.0) <= 1


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])], ids=["one color", "a table"])
def test_palette_with_transparency_gives_its_colors_without_a_warning(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image = through_file(image, "PNG", transparency=transparency)
    assert image.mode == "P" and image.info["transparency"] == transparency
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = to_rgb(image)
    assert [converted.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_cmyk_jpeg():
    image = through_file(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = to_rgb(image).getpixel((8, 8))
    assert image.mode == "CMYK" and red > 240 and green < 15 and blue < 15


# --- more than 8 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_picture(form):
    deep = RAMP.astype(np.uint16) * 256 + 77
    image = through_file(Image.fromarray(deep), form)
    assert image.mode.startswith("I")
    np.testing.assert_array_equal(gray(to_rgb(image)), RAMP)
    assert (np.asarray(image.convert("RGB"))[RAMP > 0] == 255).all(), "PIL's own conversion clips to white"


def test_big_endian_16_bit_gray():
    image = Image.frombytes("I;16B", (3, 1), np.array([0, 300, 65535], ">u2").tobytes())
    assert gray(to_rgb(image)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 7, 255], [0, 7, 255]),  # 8 bits in a wider container
        ([0, 256, 65535], [0, 1, 255]),  # 16 bits
        ([0, 500_000, 1_000_000], [0, 127, 255]),  # anything larger: the largest value is white
        ([-5, 0, 255], [0, 0, 255]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_32_bit_gray(values, expected):
    image = Image.fromarray(np.array([values], np.int32))
    assert image.mode == "I" and gray(to_rgb(image)).tolist() == [expected]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 127, 255]),
        ([0, 7.9, 255], [0, 7, 255]),
        ([0, 256, 65535], [0, 1, 255]),
        ([-1, float("nan"), 1], [0, 0, 255]),
        ([0, float("inf"), 0.5], [0, 0, 127]),
        ([0, 5e5, 1e6], [0, 127, 255]),
    ],
)
def test_float_gray(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    assert image.mode == "F" and gray(to_rgb(through_file(image, "TIFF"))).tolist() == [expected]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "I;16", "F", "CMYK"])
@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres", "plain"])
def test_preprocessing_sees_the_rgb_picture(processor, mode, aspect_ratio):
    noise = np.random.default_rng(1).integers(0, 256, (40, 60), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise.astype(np.uint16) * 256)
    elif mode == "F":
        image = Image.fromarray(noise.astype(np.float32))
    else:
        image = Image.fromarray(noise).convert(mode)
    pixels = process_images([image], processor, config(aspect_ratio))
    expected = process_images([to_rgb(image)], processor, config(aspect_ratio))
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.std() > 0.1, "a picture, not one color"


# --- metadata and frames ------------------------------------------------------------------------------------


def test_exif_orientation_is_not_applied():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees
    stored = through_file(image, "PNG", exif=exif)
    assert stored.getexif()[0x0112] == 6
    assert to_rgb(stored).size == (40, 20) and to_rgb(stored).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_show_their_first_frame(form):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    image = through_file(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert image.n_frames == 3
    assert to_rgb(image).getpixel((8, 8)) == (255, 0, 0)


# --- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 1), (1, 3), (3000, 8), (8, 3000)])
@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres", "plain"])
def test_extreme_shapes(processor, size, aspect_ratio):
    pixels = process_images([Image.new("RGB", size, (10, 100, 200))], processor, config(aspect_ratio))[0]
    crops = pixels if aspect_ratio == "anyres" else pixels[None]
    assert crops.shape[1:] == (3, SIDE, SIDE) and crops.isfinite().all()
    color = (np.array([10, 100, 200]) / 255 - processor.image_mean) / processor.image_std
    whole = aspect_ratio != "pad" or size[0] == size[1]
    middle = crops[0] if whole else crops[0][:, SIDE // 2 - 1 : SIDE // 2 + 1, SIDE // 2 - 1 : SIDE // 2 + 1]
    if whole:
        np.testing.assert_allclose(middle, np.broadcast_to(color[:, None, None], middle.shape), atol=1e-5)
    elif min(size) / max(size) > 0.5 / SIDE:
        # The line is still visible in the padded square: bluer than the padding around it.
        assert middle[2].max() > crops[0][2].median() + 0.1


@pytest.mark.parametrize("rotate", [False, True])
def test_squares_built_in_strips_have_the_same_bytes(shared_benchmarks, monkeypatch, rotate):
    large = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    for name in ("china.jpg", "horse.png", "text.png"):
        image = to_rgb(Image.open(shared_benchmarks / "images" / name))
        image = image.transpose(Image.Transpose.ROTATE_90) if rotate else image
        whole = process_images([image], large, config("pad"))
        with monkeypatch.context() as patch:
            patch.setattr(llava.mm_utils, "MAX_CANVAS_PIXELS", 1)
            np.testing.assert_array_equal(process_images([image], large, config("pad")), whole)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_middle_of_a_very_long_image_is_the_center_crop(shared_benchmarks, monkeypatch, rotate):
    large = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    image = to_rgb(Image.open(shared_benchmarks / "images" / "china.jpg"))
    image = image.transpose(Image.Transpose.ROTATE_90) if rotate else image
    whole = process_images([image], large, config("plain"))
    monkeypatch.setattr(llava.mm_utils, "MAX_CANVAS_PIXELS", 1)
    difference = (process_images([image], large, config("plain")) - whole).abs()
    one_level = 1 / 255 / min(large.image_std)
    assert difference.mean() < 0.01 * one_level and (difference > 1.01 * one_level).double().mean() < 1e-3


@pytest.mark.parametrize(
    ("size", "aspect_ratio"),
    [
        *[(size, mode) for size in [(20000, 50), (50, 20000)] for mode in ["pad", "anyres", "plain"]],
        *[(size, "plain") for size in [(20000, 1), (1, 20000)]],
    ],
)
def test_very_long_images_need_no_gigabytes(processor, size, aspect_ratio, monkeypatch):
    # A 20000 x 20000 square, or 56 x 1120000 pixels of a scaled line, must never exist. (A lower limit than the real
    # one, at which the scaled line would still be made: the test would take long.)
    monkeypatch.setattr(llava.mm_utils, "MAX_CANVAS_PIXELS", 2**22)
    largest = []
    new, resize = Image.new, Image.Image.resize

    def watched_new(mode, size, *rest):
        largest.append(size[0] * size[1])
        return new(mode, size, *rest)

    def watched_resize(self, size, *rest, **options):
        largest.append(size[0] * size[1])
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image, "new", watched_new)
    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    pixels = process_images([new("RGB", size, (10, 100, 200))], processor, config(aspect_ratio))[0]
    assert pixels.shape[-3:] == (3, SIDE, SIDE) and pixels.isfinite().all()
    assert max(largest) <= llava.mm_utils.MAX_CANVAS_PIXELS


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (37, 3001), (3001, 37), (350, 1500), (1500, 351), (7, 400)])
def test_thin_pictures_are_padded_and_scaled_to_the_same_bytes(size):
    draw = np.random.default_rng(size[0])
    image = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for side, color in ((336, (122, 116, 104)), (56, (0, 0, 0))):
        square = llava.mm_utils.expand2square(image, color).resize((side, side), Image.Resampling.BICUBIC)
        assert pad_and_scale(image, side, color).tobytes() == square.tobytes()


def test_tall_pictures_cost_what_wide_ones_do(processor):
    """Their rows lie inside rows of padding as long as they are tall: the work grew with the height squared."""
    image = Image.effect_noise((12, 100_000), 80).convert("RGB")
    large = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    started = time.perf_counter()
    pixels = process_images([image], large, config("pad"))
    assert time.perf_counter() - started < 10  # over 20 s before, 0.2 s now
    assert pixels.shape == (1, 3, 336, 336)


@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres", "plain"])
@pytest.mark.parametrize("tall", [False, True])
def test_sides_are_bounded_by_what_scaling_needs(processor, aspect_ratio, tall, monkeypatch):
    monkeypatch.setattr(llava.mm_utils, "MAX_SCALED_PIXELS", SIDE * 500)
    for length, fits in ((500, True), (501, False)):
        image = Image.new("RGB", (1, length) if tall else (length, 1))
        if fits:
            process_images([image], processor, config(aspect_ratio))
        else:
            with pytest.raises(llava.mm_utils.ImageTooLarge, match="a side may have 500 pixels"):
                process_images([image], processor, config(aspect_ratio))


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_deep_gray_is_converted_in_pieces_to_the_same_values(monkeypatch, mode):
    draw = np.random.default_rng(0)
    values = draw.integers(0, 60_000, (50, 30))
    dtype = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
    image = Image.fromarray(values.astype(dtype))
    assert image.mode == mode
    whole = to_rgb(image).tobytes()
    monkeypatch.setattr(llava.mm_utils, "_BLOCK_VALUES", 70)
    assert to_rgb(image).tobytes() == whole
