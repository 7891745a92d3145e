"""Which rasters the pictures of a model have: how they are padded, cut into tiles and scaled, told from their sizes.

Where a family's places are not known there are no rasters; nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llava.eval.answering.rasters import WHOLE, Box, Raster, numbered
from llava.mm_utils import parse_grid_pinpoints, resolution_rule, select_best_resolution
from llava.model.assemble import unpadded_window

Size = tuple[int, int]


def padded(size_wh: Size, grid: int) -> Raster:
    """A picture in the middle of a square."""
    width, height = size_wh
    side = max(size_wh)
    left, top = (side - width) // 2, (side - height) // 2
    return Raster((grid, grid), _box(size_wh, (-left, -top, side - left, side - top)))


def centered(size_wh: Size, grid: int, kept: float = 1.0) -> Raster:
    """The middle square of a picture; kept: its side, relative to the shorter side of the picture."""
    side = kept * min(size_wh)
    left, top = ((length - side) / 2 for length in size_wh)
    return Raster((grid, grid), _box(size_wh, (left, top, left + side, top + side)))


def anyres(size_wh: Size, canvas_wh: Size, crop: int, grid: int, merge_type: str) -> list[Raster]:
    """The whole picture and its tiles on a canvas, as LLaVA-1.6 cuts it.

    Args:
        size_wh: of the picture.
        canvas_wh: chosen for it, in pixels.
        crop: side of a tile in pixels.
        grid: side of a crop in tokens.
        merge_type: `flat`, `spatial` or `spatial_unpad`.
    """
    columns, rows = canvas_wh[0] // crop, canvas_wh[1] // crop
    box = _canvas_box(size_wh, canvas_wh)
    whole = Raster((rows * grid, columns * grid), box, (columns, rows))
    if merge_type == "flat":
        return [Raster((grid, grid)), *tiled(columns, rows, grid, box)]
    if merge_type == "spatial_unpad":
        window = unpadded_window(size_wh, (columns * grid, rows * grid))
        return [Raster((grid, grid)), *_cut(whole, *window)]
    return [Raster((grid, grid)), whole]


def tiled(columns: int, rows: int, grid: int, box: Box = WHOLE) -> list[Raster]:
    """Tiles that follow one another, row by row."""
    left, top, right, bottom = box
    wide, high = (right - left) / columns, (bottom - top) / rows
    return [
        Raster((grid, grid), (left + x * wide, top + y * high, left + (x + 1) * wide, top + (y + 1) * high))
        for y in range(rows)
        for x in range(columns)
    ]


def _cut(raster: Raster, rows: slice, columns: slice) -> list[Raster]:
    """The part of a raster in a window."""
    height, width = raster.grid
    top, bottom, _ = rows.indices(height)
    left, right, _ = columns.indices(width)
    if bottom <= top or right <= left:
        return []
    x, y = raster.box[0], raster.box[1]
    wide, high = (raster.box[2] - x) / width, (raster.box[3] - y) / height
    box = (x + left * wide, y + top * high, x + right * wide, y + bottom * high)
    return [replace(raster, grid=(bottom - top, right - left), box=box)]


def _box(size_wh: Size, edges: Sequence[float]) -> Box:
    width, height = size_wh
    left, top, right, bottom = edges
    return (left / width, top / height, right / width, bottom / height)


def _canvas_box(size_wh: Size, canvas_wh: Size) -> Box:
    """A canvas around a picture that was scaled into its middle, rounded as `resize_and_pad_image` rounds."""
    (width, height), (canvas_w, canvas_h) = size_wh, canvas_wh
    if canvas_w / width < canvas_h / height:
        scaled = canvas_w, min(math.ceil(height * canvas_w / width), canvas_h)
    else:
        scaled = min(math.ceil(width * canvas_h / height), canvas_w), canvas_h
    left, top = (canvas_w - scaled[0]) // 2, (canvas_h - scaled[1]) // 2
    return _box(scaled, (-left, -top, canvas_w - left, canvas_h - top))


# --- models -----------------------------------------------------------------------------------------------------


def llava_rasters(
    model: Any, processor: Any, sizes: Sequence[Size], crops: Sequence[int], visual_tokens: int
) -> list[Raster] | None:
    """Of a prompt of this package's LLaVA: its pictures' sizes and the number of crops of each."""
    config, patches = model.config, model.get_vision_tower().num_patches
    side = math.isqrt(patches)
    with_cls = getattr(model.get_vision_tower(), "select_feature", "patch") == "cls_patch"
    rule = model.merge_type()
    images = [_llava_image(config, processor, size, own, side, rule) for size, own in zip(sizes, crops, strict=True)]
    return numbered(images, visual_tokens, int(with_cls))


def _llava_image(
    config: Any, processor: Any, size_wh: Size, crops: int, side: int, merge_type: str
) -> list[Raster] | None:
    aspect, crop = getattr(config, "image_aspect_ratio", None), config.vision_config.image_size
    if aspect == "pad":
        return [padded(size_wh, side)]
    if aspect == "anyres":
        canvas = select_best_resolution(
            size_wh, parse_grid_pinpoints(config.image_grid_pinpoints), resolution_rule(config)
        )
        return anyres(size_wh, canvas, crop, side, merge_type) if crops > 1 else [Raster((side, side))]
    short = processor.size.get("shortest_edge") if hasattr(processor.size, "get") else None
    return [Raster((side, side))] if not short else [centered(size_wh, side, crop / short)]


def family_rasters(
    family: str, processor: Any, values: Mapping[str, Any], sizes: Sequence[Sequence[Size]]
) -> list[list[list[Raster] | None]]:
    """Rasters of the pictures of every prompt of a batch, before they are numbered; None where they are not known.

    Args:
        family: of `llava.families`.
        processor: the model's.
        values: what the processor made of the batch.
        sizes: of each prompt's pictures.
    """
    images = processor.image_processor
    if family.startswith("qwen"):
        grids = iter([] if values.get("image_grid_thw") is None else values["image_grid_thw"].tolist())
        return [[_qwen_image(next(grids), images.merge_size) for _ in own] for own in sizes]
    one: Callable[[Size], list[Raster] | None] = lambda size: None  # noqa: E731
    if family in ("idefics3", "smolvlm"):
        longest, tile = images.size["longest_edge"], images.max_image_size["longest_edge"]
        side = math.isqrt(processor.image_seq_len)
        one = lambda size: _with_whole(*_idefics_tiles(size, longest, tile), side)  # noqa: E731
    elif family == "internvl":
        side = math.isqrt(processor.image_seq_length)
        one = lambda size: _with_whole(*_intern_tiles(size, images), side)  # noqa: E731
    elif family == "llava_onevision":
        side = math.isqrt(processor.num_image_tokens)
        most = int(processor.vision_aspect_ratio.removeprefix("anyres_max_"))
        one = lambda size: _onevision_image(size, images, side, most)  # noqa: E731
    return [[one(size) for size in own] for own in sizes]


def _qwen_image(grid: Sequence[int], merge: int) -> list[Raster] | None:
    frames, height, width = grid
    return [Raster((height // merge, width // merge))] if frames == 1 else None


def _with_whole(columns: int, rows: int, side: int) -> list[Raster]:
    """Tiles, and the whole picture behind them; a picture that is not cut is only whole."""
    return [*(tiled(columns, rows, side) if columns * rows > 1 else []), Raster((side, side))]


def _idefics_tiles(size_wh: Size, longest: int, tile: int) -> Size:
    """Columns and rows of tiles: scaled to a longest side, then both sides up to whole tiles."""
    width, height = size_wh
    ratio = width / height
    if width >= height:
        wide = math.ceil(longest / tile)
        return wide, math.ceil(int(wide * tile / ratio) / tile)
    high = math.ceil(longest / tile)
    return math.ceil(int(high * tile * ratio) / tile), high


def _intern_tiles(size_wh: Size, images: Any) -> Size:
    """Columns and rows of tiles: of all rasters that are allowed the one whose shape is nearest to the picture's; of
    equals the larger one, if the picture fills half of it.
    """
    if not images.crop_to_patches:
        return 1, 1
    width, height = size_wh
    side, numbers = images.size["height"], range(1, images.max_patches + 1)
    allowed = [(c, r) for c in numbers for r in numbers if images.min_patches <= c * r <= images.max_patches]
    best, distance = (1, 1), math.inf
    for columns, rows in sorted(allowed, key=lambda tiles: tiles[0] * tiles[1]):
        own = abs(width / height - columns / rows)
        if own < distance or (own == distance and width * height > 0.5 * side * side * columns * rows):
            best, distance = (columns, rows), own
    return best


def _onevision_image(size_wh: Size, images: Any, side: int, most: int) -> list[Raster]:
    """As LLaVA-1.6 with unpadding; a raster of more tokens than `most` tiles have is scaled down to as many."""
    canvas = select_best_resolution(size_wh, [(w, h) for h, w in images.image_grid_pinpoints], "effective")
    whole, *tiles = anyres(size_wh, canvas, images.size["height"], side, "spatial_unpad")
    shrunk = []
    for raster in tiles:
        ratio = math.sqrt(raster.tokens / (most * side * side))
        grid = (int(raster.grid[0] // ratio), int(raster.grid[1] // ratio)) if ratio > 1.1 else raster.grid
        shrunk.append(replace(raster, grid=grid))
    return [whole, *shrunk]
