"""Six cameras on a car and what they see of a street: pictures in which one layout is drawn consistently.

Pinholes 1.5 m above the ground with 70 degrees of view, 192 x 108 pixels; neighbors share 15 degrees, and what stands
there is drawn in both. Integer arithmetic with sines of a table, so that a seed gives the same pixels everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .driving import CAMERAS, LANE, Street, Thing
from .scenes import GRID, PATCH, RGB, background, pad_square

WIDTH, HEIGHT = 192, 108
FOCAL = 137
"""Pixels: half the width over the tangent of 35 degrees."""
HORIZON, MIDDLE = HEIGHT // 2, WIDTH // 2
EYE = 150
"""Height of the cameras in centimetres."""
NEAREST = 100
"""Centimetres; what is nearer is not drawn."""
SCALE = 65536
YAW = {  # sine and cosine of the angle to the right, times SCALE
    "FRONT": (0, 65536),
    "FRONT_LEFT": (-53684, 37590),
    "FRONT_RIGHT": (53684, 37590),
    "BACK_LEFT": (-61584, -22415),
    "BACK_RIGHT": (61584, -22415),
    "BACK": (0, -65536),
}
COLOR = {"car": 2, "walker": 3, "red light": 0, "green light": 1, "barrier": 4, "sign": 7}
"""Index into the colors of `scenes`, which the tower tells apart."""
ROAD, VERGE, LINE = (112, 112, 116), (132, 128, 118), (205, 205, 200)
CROSSING = (1150, 1750)
"""Where a street crosses, in centimetres ahead."""


@dataclass(frozen=True)
class View:
    """What one camera sees of a street."""

    street: Street
    camera: str

    def pixels(self) -> np.ndarray:
        """The picture: uint8 [108, 192, 3]."""
        return render_view(self.street, self.camera)


def project(x: int, y: int, z: int, camera: str) -> tuple[int, int, int]:
    """Column, row and depth (centimetres) of a point; the depth is negative behind the camera."""
    sine, cosine = YAW[camera]
    depth, aside = (x * sine + y * cosine) // SCALE, (x * cosine - y * sine) // SCALE
    if depth < NEAREST:
        return 0, 0, depth
    return MIDDLE + FOCAL * aside // depth, HORIZON + FOCAL * (EYE - z) // depth, depth


def outline(thing: Thing, camera: str) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the pixels it covers (the latter two excluded); None if the camera sees nothing."""
    column, foot, depth = project(thing.x, thing.y, thing.above, camera)
    if depth < NEAREST:
        return None
    half, tall = max(FOCAL * thing.width // (2 * depth), 1), max(FOCAL * thing.height // depth, 1)
    box = max(column - half, 0), max(foot - tall, 0), min(column + half, WIDTH), min(foot, HEIGHT)
    return box if box[0] < box[2] and box[1] < box[3] else None


@cache
def _ground(camera: str) -> np.ndarray:
    """The empty street below the horizon: uint8 [54, 192, 3]."""
    sine, cosine = YAW[camera]
    rows, columns = np.mgrid[1 : HEIGHT - HORIZON + 1, 0:WIDTH].astype(np.int64)
    depth = FOCAL * EYE // rows
    aside = (columns - MIDDLE) * depth // FOCAL
    x, y = (depth * sine + aside * cosine) // SCALE, (depth * cosine - aside * sine) // SCALE
    edge = 3 * LANE // 2
    along, across = np.abs(x) <= edge, (y >= CROSSING[0]) & (y <= CROSSING[1])
    out = np.empty((*x.shape, 3), dtype=np.uint8)
    out[:] = VERGE
    out[along | across] = ROAD
    lanes = (np.abs(np.abs(x) - LANE // 2) <= 8) & (y // 300 % 2 == 0)
    borders = np.abs(np.abs(x) - edge) <= 10
    out[(lanes | borders) & ~across] = LINE
    return out


def render_view(street: Street, camera: str) -> np.ndarray:
    """The picture of one camera: uint8 [108, 192, 3]."""
    image = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[:HORIZON] = background(street.texture + CAMERAS.index(camera), HORIZON, WIDTH)
    image[HORIZON:] = _ground(camera)
    for thing in _far_first(street, camera):
        left, top, right, bottom = _seen(thing, camera)
        color = np.clip(RGB[COLOR[thing.kind]] + thing.shade, 0, 255)
        image[top:bottom, left:right] = color
        if thing.kind == "car":  # the shadow under it
            image[max(bottom - max((bottom - top) // 7, 1), top) : bottom, left:right] = color // 3
    return image


def _far_first(street: Street, camera: str) -> list[Thing]:
    seen = [thing for thing in street.things if outline(thing, camera) is not None]
    return sorted(seen, key=lambda thing: -project(thing.x, thing.y, 0, camera)[2])


def _seen(thing: Thing, camera: str) -> tuple[int, int, int, int]:
    box = outline(thing, camera)
    assert box is not None
    return box


def owners(street: Street, camera: str) -> np.ndarray:
    """Index of the thing at every pixel, -1 where there is none: int64 [108, 192]."""
    out = np.full((HEIGHT, WIDTH), -1)
    for thing in _far_first(street, camera):
        left, top, right, bottom = _seen(thing, camera)
        out[top:bottom, left:right] = street.things.index(thing)
    return out


def shown(street: Street, camera: str, share: float = 0.2) -> np.ndarray:
    """Index of the thing that each patch of the padded square shows, at least with that share of its pixels, or -1:
    int64 [24, 24].
    """
    square = np.full((GRID * PATCH, GRID * PATCH), -1)
    top = (GRID * PATCH - HEIGHT) // 2  # as `pad_square` puts it
    square[top : top + HEIGHT] = owners(street, camera)
    blocks = square.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    count = max(len(street.things), 1)
    shares = np.stack([(blocks == i).mean(-1) for i in range(count)])
    return np.where(shares.max(0) >= share, shares.argmax(0), -1)


def squares(street: Street) -> np.ndarray:
    """All six pictures as the tower sees them: uint8 [6, 192, 192, 3]."""
    return np.stack([pad_square(render_view(street, camera)) for camera in CAMERAS])
