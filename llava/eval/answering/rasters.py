"""Where the visual tokens of a picture lie in it: rasters of tokens, each over a box of the picture.

A picture of LLaVA-1.5 is one raster, one of LLaVA-1.6 two: the whole picture and its tiles. Traces carry rasters, so
that a report can draw survivors without the model. Which rasters a model's pictures have is in `places`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Raster:
    """A raster of visual tokens.

    Attributes:
        grid: rows and columns of tokens.
        box: left, top, right and bottom of the raster in widths and heights of the picture; what lies outside of 0..1
            is padding.
        tiles: columns and rows of crops that the raster is put together from.
        first: index of its first token among the visual tokens of the prompt; the others follow row by row.
        image: number of the picture in the prompt.
    """

    grid: tuple[int, int]
    box: Box = WHOLE
    tiles: tuple[int, int] = (1, 1)
    first: int = 0
    image: int = 0

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.grid[0] * self.grid[1]


def as_json(rasters: Sequence[Raster] | None) -> list[dict[str, Any]] | None:
    """As a trace has them."""
    if rasters is None:
        return None
    return [
        {
            "grid": list(raster.grid),
            "box": [round(edge, 6) for edge in raster.box],
            "tiles": list(raster.tiles),
            "first": raster.first,
            "image": raster.image,
        }
        for raster in rasters
    ]


def numbered(images: Sequence[Sequence[Raster] | None], visual_tokens: int, extra: int = 0) -> list[Raster] | None:
    """The rasters of all pictures of a prompt, with their places in it; None if they are not what the prompt has.

    extra: tokens in front of every raster that are no patches (a CLS token).
    """
    rasters, first = [], 0
    for number, own in enumerate(images):
        if own is None:
            return None
        for raster in own:
            first += extra
            rasters.append(replace(raster, first=first, image=number))
            first += raster.tokens
    return rasters if rasters and first == visual_tokens else None
