"""Where the visual tokens of a picture lie in it: views, rasters of tokens over a box of the picture.

A picture of LLaVA-1.5 is one view, one of LLaVA-1.6 the whole picture and the tiles. Traces carry views, so that a
report can draw survivors without the model. Which views a model's pictures have is in `places`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
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


def as_json(views: Sequence[View] | None) -> list[dict[str, Any]] | None:
    """As a trace has them."""
    if views is None:
        return None
    return [{**asdict(view), "box": [round(edge, 6) for edge in view.box]} for view in views]


def numbered(images: Sequence[Sequence[View] | None], visual_tokens: int, extra: int = 0) -> list[View] | None:
    """The views of all pictures of a prompt, with their places in it; None if they are not what the prompt has.

    extra: tokens in front of every view that are no patches (a CLS token).
    """
    views, first = [], 0
    for number, own in enumerate(images):
        if own is None:
            return None
        for view in own:
            first += extra
            views.append(replace(view, first=first, image=number))
            first += view.tokens
    return views if views and first == visual_tokens else None
