"""How the crops of one image become one sequence of visual tokens.

Pure index arithmetic on tensors; the same arrangement serves features and per-patch scores. Knows nothing
of towers or prompts. Shapes: crop 0 is the whole image, then tiles row by row; P = p * p patches per crop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assemble_spatial(crops: Tensor, grid_wh: tuple[int, int]) -> Tensor:
    """Whole image in raster order, then the tiles joined into one global raster.

    Args:
        crops: `[1 + grid_w * grid_h, P, ...]`, crop 0 the whole image, tiles row by row.
        grid_wh: tiles along (width, height).

    Returns:
        `[(1 + grid_w * grid_h) * P, ...]`. No unpadding, no newline tokens.

    Source: the published AutoPrune code, which always uses this arrangement (merge type "spatial"),
    whatever the checkpoint's `mm_patch_merge_type` says.
    """
    grid_w, grid_h = grid_wh
    count, patches, *rest = crops.shape
    side = math.isqrt(patches)
    if count != 1 + grid_w * grid_h:
        raise ValueError(f"{count} crops do not make one image and {grid_w} x {grid_h} tiles")
    if side * side != patches:
        raise ValueError(f"{patches} features per crop are not a square of patches: keep the CLS token out")
    tiles = crops[1:].reshape(grid_h, grid_w, side, side, *rest)
    # [gh, gw, p, p] -> [gh, p, gw, p]: pixel rows of neighboring tiles become one row of the whole picture.
    raster = tiles.transpose(1, 2).reshape(grid_w * grid_h * patches, *rest)
    return torch.cat((crops[0], raster), dim=0)


def assemble(crops: Tensor, grid_wh: tuple[int, int] | None) -> Tensor:
    """One sequence `[tokens, ...]` from the crops of one image `[crops, P, ...]`; `grid_wh` is None for a
    single crop.
    """
    if grid_wh is None:
        return crops.flatten(0, 1)
    return assemble_spatial(crops, grid_wh)
