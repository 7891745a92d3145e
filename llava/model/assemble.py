"""How the crops of one image become one sequence of visual tokens.

Index arithmetic: an `Arrangement` says which patch of which crop stands where, and any per-patch tensor (features, CLS
attention, keys of the tower) is gathered through it. The settings are the checkpoint's.

Shapes: crop 0 is the whole image, then tiles row by row; P = p * p patches per crop; N tokens of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from llava.mm_utils import get_anyres_image_grid_shape, resolution_rule
from llava.utils import UserError

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
NEWLINE = -1
"""Entry of an arrangement where an `image_newline` token stands."""

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Order of the tokens of one image.

    Attributes:
        source_N: int64 on the CPU, `crop * patches + patch` for each token, or `NEWLINE`.
        patches: P, patches per crop.
        spans: half-open intervals of patches in the sequence of tokens, first token 0.
        newlines: the same for newline tokens.
        crops: for every patch token the number of its crop.
    """

    source_N: Tensor
    patches: int
    spans: tuple[tuple[int, int], ...]
    newlines: tuple[tuple[int, int], ...]
    crops: tuple[int, ...]

    @classmethod
    def of(cls, source_N: Tensor, patches: int) -> Arrangement:
        is_patch = source_N != NEWLINE
        steps = torch.diff(is_patch).nonzero().flatten().add(1).tolist()
        edges = [0, *steps, len(source_N)]
        parts = [part for part in zip(edges[:-1], edges[1:], strict=True) if part[0] < part[1]]
        kinds = [bool(is_patch[start]) for start, _ in parts]
        return cls(
            source_N,
            patches,
            tuple(part for part, visual in zip(parts, kinds, strict=True) if visual),
            tuple(part for part, visual in zip(parts, kinds, strict=True) if not visual),
            tuple((source_N[is_patch] // patches).tolist()),
        )

    def gather(self, values: Tensor) -> Tensor:
        """Per-patch values `[crops, P, ...]` of the patch tokens, in sequence order: `[visual tokens, ...]`."""
        flat = self._flat(values)
        if self._in_order and len(flat) == len(self.source_N):
            return flat
        source = self.source_N[self.source_N != NEWLINE] if self.newlines else self.source_N
        return flat.index_select(0, source.to(values.device, non_blocking=True))

    @cached_property
    def _in_order(self) -> bool:
        """Whether it is patches as they come, one crop behind the other, without newlines: nothing to gather."""
        return torch.equal(self.source_N, torch.arange(len(self.source_N)))

    def tokens(self, features: Tensor, newline: Tensor | None = None) -> Tensor:
        """Features `[crops, P, C]` as the sequence `[N, C]`, `newline` `[C]` in its places."""
        if not self.newlines:
            return self.gather(features)
        if newline is None:
            raise ValueError("this arrangement has newline tokens but the model has no image_newline")
        table = torch.cat((self._flat(features), newline[None].to(features)))
        source = torch.where(self.source_N == NEWLINE, len(table) - 1, self.source_N)
        return table.index_select(0, source.to(features.device, non_blocking=True))

    def _flat(self, values: Tensor) -> Tensor:
        if values.shape[1] != self.patches:
            raise ValueError(f"values of {values.shape[1]} patches per crop, the arrangement has {self.patches}")
        return values.flatten(0, 1)


@lru_cache
def arrange_crop(patches: int, newline: bool = False) -> Arrangement:
    """A single crop in its own order; `newline` puts one behind it, as LLaVA does when it merges with unpadding."""
    source = torch.arange(patches)
    return Arrangement.of(torch.cat((source, source.new_full((int(newline),), NEWLINE))), patches)


@lru_cache(maxsize=256)
def arrange_crops(merge_type: str, patches: int, crops: int, grid_wh: Size | None, size_wh: Size | None) -> Arrangement:
    """The whole image and its tiles.

    Args:
        merge_type: `flat`: one crop after the other. `spatial`: the whole image, then the tiles joined into one raster,
            padding included, no newlines (what the published AutoPrune code always does). `spatial_unpad`: the same
            without the padding around the picture, and a newline behind every row of the raster (LLaVA-1.6).
        patches: P, patches per crop.
        crops: number of crops, the whole image included.
        grid_wh: tiles along (width, height); not needed for `flat`.
        size_wh: of the image in pixels; only needed for `spatial_unpad`.

    Raises:
        ValueError: unknown merge type, or numbers that do not fit together.
    """
    if merge_type not in MERGE_TYPES:
        raise ValueError(f"mm_patch_merge_type {merge_type!r} is not supported, only {', '.join(MERGE_TYPES)}")
    everything = torch.arange(crops * patches)
    if merge_type == "flat":
        return Arrangement.of(everything, patches)
    if grid_wh is None:
        raise ValueError(f"mm_patch_merge_type {merge_type!r} needs the grid of tiles")
    grid_w, grid_h = grid_wh
    side = math.isqrt(patches)
    if crops != 1 + grid_w * grid_h:
        raise ValueError(f"{crops} crops do not make one image and {grid_w} x {grid_h} tiles")
    if side * side != patches:
        raise ValueError(f"{patches} features per crop are not a square of patches: keep the CLS token out")
    tiles = everything[patches:].view(grid_h, grid_w, side, side)
    # [gh, gw, p, p] -> [gh, p, gw, p]: patch rows of neighboring tiles become one row of the whole picture.
    raster = tiles.transpose(1, 2).reshape(grid_h * side, grid_w * side)
    if merge_type == "spatial_unpad":
        rows, columns = unpadded_window(size_wh, (grid_w * side, grid_h * side))
        raster = raster[rows, columns]
        raster = torch.cat((raster, raster.new_full((len(raster), 1), NEWLINE)), dim=1)
    return Arrangement.of(torch.cat((everything[:patches], raster.flatten())), patches)


def unpadded_window(size_wh: Size, raster_wh: Size) -> tuple[slice, slice]:
    """Rows and columns of a `raster_wh` raster of patches that a centered image of `size_wh` pixels covers.

    The arithmetic of LLaVA-1.6, float rounding included: the covered length is truncated, and what is cut off on one
    side is cut off on the other. The window is empty along one axis for pictures thinner than a patch (20000 x 50):
    rows without columns keep their newline, columns without rows leave only the whole image.
    """
    width, height = size_wh
    raster_w, raster_h = raster_wh
    if width < 1 or height < 1:
        raise ValueError(f"image sizes must be positive, got {tuple(size_wh)}")
    if width / height > raster_w / raster_h:
        cut = (raster_h - int(height * (raster_w / width))) // 2
        return slice(cut, raster_h - cut), slice(None)
    cut = (raster_w - int(width * (raster_h / height))) // 2
    return slice(None), slice(cut, raster_w - cut)


def arrangement_of(
    config: Any, merge_type: str, crops: int, patches: int, size_wh: Size | None, merged: bool
) -> Arrangement:
    """The arrangement of an image of `crops` crops under the settings of a checkpoint.

    Args:
        config: with `image_grid_pinpoints`, `vision_config.image_size`, perhaps `anyres_resolution_rule`.
        merge_type: see `arrange_crops`.
        crops: crops of the image as it was preprocessed.
        patches: features per crop.
        size_wh: the original image's size; needed for several crops, but not for `flat`.
        merged: the image came as a list of crops. A single crop then ends in a newline under `spatial_unpad`, as in
            LLaVA; a plain stack of images does not.

    Raises:
        UserError: sizes and crops do not fit together, or a setting is missing or not supported.
    """
    if merge_type not in MERGE_TYPES:
        raise UserError(f"mm_patch_merge_type {merge_type!r} is not supported, only {', '.join(MERGE_TYPES)}")
    if crops == 1:
        return arrange_crop(patches, newline=merged and merge_type == "spatial_unpad")
    grid = None if merge_type == "flat" else _grid(config, crops, size_wh)
    try:
        return arrange_crops(merge_type, patches, crops, grid, size_wh if merge_type == "spatial_unpad" else None)
    except ValueError as error:
        raise UserError(f"images cannot be put together from their crops: {error}") from None


def _grid(config: Any, crops: int, size_wh: Size | None) -> Size:
    """Tiles along (width, height) of an image that was cut into `crops` crops."""
    if size_wh is None:
        raise UserError("images cut into several crops need image_sizes=[(width, height), ...] to be put together")
    if min(size_wh) < 1:
        raise UserError(f"image_sizes must be positive, got {tuple(size_wh)}")
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if not pinpoints:
        raise UserError("images cut into several crops need image_grid_pinpoints in the checkpoint's config.json")
    grid = get_anyres_image_grid_shape(size_wh, pinpoints, config.vision_config.image_size, resolution_rule(config))
    if 1 + grid[0] * grid[1] != crops:
        raise UserError(
            f"an image of size {tuple(size_wh)} makes {grid[0]} x {grid[1]} tiles and a whole view, but has "
            f"{crops} crops: pass in image_sizes the size of the image that was preprocessed"
        )
    return grid
