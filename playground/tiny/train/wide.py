"""Large pictures for the tiny LLaVA-1.6: wide, tall and big scenes, cut into views as anyres does.

Cells are as large as ever (48 pixels), so in the whole-image view, squeezed to 192 x 192, objects are about half as
large as the tower knows them and words cannot be read; in the crops they look as usual. Here are
the views, the order of the visual tokens in both merge modes, and what every visual token shows.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from llava.mm_utils import divide_to_patches, resize_and_pad_image, select_best_resolution
from playground.tiny.world.scenes import (
    CELL,
    GRID,
    IMAGE,
    ON_OBJECT,
    PATCH,
    Scene,
    center_cell,
    render,
    shape_mask,
)

PINPOINTS = ((192, 384), (384, 192), (384, 384), (576, 192), (192, 576))
"""Width and height of the canvases, LLaVA-1.6's list for tiles of 192 pixels."""
MERGES = ("spatial_unpad", "spatial")
NEWLINE = -1


def canvas(scene: Scene) -> tuple[int, int]:
    """Width and height of the canvas that LLaVA chooses for the picture."""
    return select_best_resolution((CELL * scene.cols, CELL * scene.rows), PINPOINTS, "effective")


def views(scene: Scene) -> np.ndarray:
    """What the tower sees: uint8 [1 + crops, 192, 192, 3], the squeezed picture first."""
    picture = Image.fromarray(render(scene))
    crops = divide_to_patches(resize_and_pad_image(picture, canvas(scene)), IMAGE)
    return np.stack([np.asarray(view) for view in (picture.resize((IMAGE, IMAGE)), *crops)])


@cache
def order(rows: int, cols: int, merge: str) -> np.ndarray:
    """Index into [views * 576] of every visual token, `NEWLINE` for newlines, in the order the decoder gets them.

    spatial: the squeezed picture, then all crops as one raster. spatial_unpad: the same without the padding, a newline
    behind every row of the raster.
    """
    width, height = select_best_resolution((CELL * cols, CELL * rows), PINPOINTS, "effective")
    across, down = width // IMAGE, height // IMAGE
    crop = np.arange(1, 1 + across * down).reshape(down, 1, across, 1)
    inside = np.arange(GRID * GRID).reshape(1, GRID, 1, GRID)
    raster = (crop * GRID * GRID + inside).reshape(down * GRID, across * GRID)
    if merge == "spatial_unpad":
        top, left = (raster.shape[0] - 6 * rows) // 2, (raster.shape[1] - 6 * cols) // 2
        raster = raster[top : top + 6 * rows, left : left + 6 * cols]
        raster = np.concatenate([raster, np.full((len(raster), 1), NEWLINE)], axis=1)
    return np.concatenate([np.arange(GRID * GRID), raster.reshape(-1)])


def owners(scene: Scene) -> np.ndarray:
    """Index of the object at every pixel, -1 for the background: int64 [48 rows, 48 cols]."""
    out = np.full((CELL * scene.rows, CELL * scene.cols), -1)
    for i, t in enumerate(scene.things):
        mask = shape_mask(t.shape, t.size, t.dy, t.dx).copy()
        if t.word >= 0:
            mask[CELL // 2 + t.dy - 4 : CELL // 2 + t.dy + 5, CELL // 2 + t.dx - 9 : CELL // 2 + t.dx + 10] = True
        out[CELL * t.row : CELL * (t.row + 1), CELL * t.col : CELL * (t.col + 1)][mask] = i
    return out


def _shown(owner: np.ndarray) -> np.ndarray:
    """Index of the object that a patch shows, -1 for none: int64 [h, w] from pixels [8 h, 8 w]."""
    height, width = owner.shape[0] // PATCH, owner.shape[1] // PATCH
    blocks = owner.reshape(height, PATCH, width, PATCH).transpose(0, 2, 1, 3).reshape(height, width, -1)
    count = max(1, int(owner.max()) + 1)
    share = np.stack([(blocks == i).mean(-1) for i in range(count)])
    return np.where(share.max(0) >= ON_OBJECT, share.argmax(0), -1)


def attributes(scene: Scene, merge: str) -> np.ndarray:
    """Like `packing.attributes` for the visual tokens in order: int64 [tokens, 6], zeros on background and newlines.

    The squeezed picture shows no words and has no centers, so that every object has one center.
    """
    owner = owners(scene)
    width, height = canvas(scene)
    whole = np.full((height, width), -1)
    top, left = (height - owner.shape[0]) // 2, (width - owner.shape[1]) // 2
    whole[top : top + owner.shape[0], left : left + owner.shape[1]] = owner
    small = np.asarray(Image.fromarray(owner.astype(np.int32)).resize((IMAGE, IMAGE), Image.NEAREST))
    raster = _shown(whole)
    crops = raster.reshape(height // IMAGE, GRID, width // IMAGE, GRID).transpose(0, 2, 1, 3).reshape(-1, GRID * GRID)
    shown = np.concatenate([_shown(small).reshape(1, -1), crops]).reshape(-1)
    table = np.zeros((len(shown) + 1, 6), dtype=np.int64)  # the last row: newlines
    for i, thing in enumerate(scene.things):
        table[np.flatnonzero(shown == i), :3] = thing.color + 1, thing.shape + 1, thing.word + 1
        row, col = center_cell(thing)
        y, x = top // PATCH + row, left // PATCH + col
        crop = 1 + (y // GRID) * (width // IMAGE) + x // GRID
        table[crop * GRID * GRID + y % GRID * GRID + x % GRID, 5] = 1
    table[: GRID * GRID, 2] = 0
    return table[order(scene.rows, scene.cols, merge)]
