"""Crowded scenes: 16 to 32 small objects, several alike, words and digits hanging on some, over natural clutter.

The second family of scenes. An object is a colored shape of 17 or 19 pixels; its label, if it has one, hangs below it
on patches of its own, so that no single patch tells everything about an object. Backgrounds are smooth noise with
fallen leaves in muted tones, light falls off across the picture, and twigs lie over some of the objects.

Geometry: cells of 32 x 32 pixels, 6 x 6, 5 x 6 or 6 x 5 of them; patches as in `scenes`. Everything is integer
arithmetic, so a seed gives the same pixels everywhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from . import scenes
from .scenes import COLORS, GRID, IMAGE, ON_OBJECT, PATCH, RGB, SHAPES, WORDS, Scene, Thing, full_name

SMALL_CELL, SIDE = 32, 6
SIZES = (8, 9)
LAYOUTS = ((6, 6), (6, 6), (6, 6), (5, 6), (6, 5))
LOW, HIGH = 16, 32
LIMIT = GRID * GRID * 8 // 100
"""Patches that an answer may need: 8% of the picture, 46."""
DIGITS = tuple("0123456789")
LABELS = (*WORDS, *DIGITS)
VISIBLE = 4, 5
"""At least four fifths of every object can be seen."""
_DIGIT_GLYPHS = {  # 5 x 7 pixels, one 5-bit number per row
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 6, 8, 16, 31),
    "3": (30, 1, 1, 14, 1, 1, 30),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
}


@dataclass(frozen=True)
class Small(Thing):
    """An object of a crowded scene: `digit` is the digit of its label, -1 for none; it has a word or a digit, not both.

    `dy` and `dx` place the center of the shape within the cell.
    """

    digit: int = -1

    @property
    def label(self) -> int:
        """Index into LABELS, -1: no label."""
        return self.word if self.word >= 0 else len(WORDS) + self.digit if self.digit >= 0 else -1


@dataclass(frozen=True)
class Crowd(Scene):
    """A crowded scene; `texture` seeds background, light, leaves and twigs."""

    @property
    def crowded(self) -> bool:
        return True

    @property
    def offset(self) -> tuple[int, int]:
        return (SIDE - self.rows) * 2, (SIDE - self.cols) * 2

    def bins(self, thing: Thing) -> tuple[int, int]:
        """Row and column in half cells of the padded square, 0..10."""
        return 2 * thing.row + SIDE - self.rows, 2 * thing.col + SIDE - self.cols

    @property
    def side(self) -> int:
        return SIDE

    def coarse(self, thing: Thing) -> tuple[int, int]:
        """The half cells of 24 pixels that scenes with large objects count in, 0..6, nearest to the object's cell."""
        return tuple((SMALL_CELL // 2 * (k + 1) + 12) // 24 - 1 for k in self.bins(thing))  # type: ignore[return-value]

    def names(self, index: int, hide: str = "") -> list[str]:
        """By color and shape where no other object has both, by its label where it has one."""
        thing = self.things[index]
        alike = sum((t.color, t.shape) == (thing.color, thing.shape) for t in self.things)
        names = [full_name(thing)] * 2 if alike == 1 and hide not in ("color", "shape") else []
        if thing.label >= 0 and hide != "word":
            names.append(f"object with the {'word' if thing.word >= 0 else 'digit'} {LABELS[thing.label]}")
        return names

    def fits(self, members: tuple[int, ...] | list[int]) -> bool:
        """True if these objects have no more patches than an answer may need."""
        return int(self.parts()[list(members)].any((0, 1)).sum()) <= LIMIT

    def parts(self) -> np.ndarray:
        return _parts(self)

    def shares(self) -> np.ndarray:
        """Share of each patch that shape and label of each object cover: float [objects, 2, 576]."""
        return _shares(self)

    def cover(self) -> np.ndarray:
        return _shares(self).sum(1).reshape(-1, GRID, GRID)

    def center(self, thing: Thing) -> tuple[int, int]:
        (top, left), (y, x) = self.offset, _middle(thing)
        return top + y // PATCH, left + x // PATCH

    def draw(self) -> np.ndarray:
        return _paint(self)[0]


def sample_crowd(
    rng: np.random.Generator, held_out: bool, word_share: float = 0.6, low: int = LOW, high: int = HIGH
) -> Crowd:
    """Draw a scene of low..high objects, more often many, in the wanted half of the split.

    Seven colors and five shapes; three to five kinds of objects occur two to four times, all others once.
    """
    while True:
        rows, cols = LAYOUTS[rng.integers(len(LAYOUTS))]
        count = min(int(max(rng.integers(low, high + 1, 2))), rows * cols - 2)
        cells = rng.permutation(rows * cols)[:count]
        colors, shapes = rng.permutation(len(COLORS))[:7], rng.permutation(len(SHAPES))[:5]
        pairs = [(int(colors[k // 5]), int(shapes[k % 5])) for k in rng.permutation(35)]
        repeats = [int(rng.integers(2, 5)) for _ in range(int(rng.integers(3, 6)))]
        kinds = [pair for pair, times in zip(pairs, repeats, strict=False) for _ in range(times)]
        kinds = (kinds + pairs[len(repeats) :])[:count]
        texts = [int(k) for k in rng.permutation(len(WORDS))[: round(len(WORDS) * word_share * rng.uniform(0.6, 1.0))]]
        texts += [len(WORDS) + int(k) for k in rng.permutation(len(DIGITS))[: int(rng.integers(3, 7))]]
        labels = [*texts, *[-1] * count][:count]
        order = rng.permutation(count)
        things = []
        for i, (color, shape) in enumerate(kinds):
            label = labels[int(order[i])]
            down = int(rng.integers(2 if label >= 0 else 3))
            things.append(
                Small(
                    color,
                    shape,
                    label if label < len(WORDS) else -1,
                    int(cells[i]) // cols,
                    int(cells[i]) % cols,
                    4 * down,
                    int(rng.integers(-1, 2)) * 4,
                    int(SIZES[rng.integers(2)]),
                    int(rng.integers(-14, 15)),
                    label - len(WORDS) if label >= len(WORDS) else -1,
                )
            )
        things.sort(key=lambda t: (t.row, t.col))
        scene = Crowd(tuple(things), rows, cols, int(rng.integers(1 << 31)))
        if scene.held_out() == held_out:
            return scene


def _middle(thing: Thing) -> tuple[int, int]:
    """The pixel of the picture in the middle of the shape: (y, x)."""
    return SMALL_CELL * thing.row + 10 + thing.dy, SMALL_CELL * thing.col + 16 + thing.dx


@cache
def label_bitmap(label: int) -> np.ndarray:
    """Black letters on a white band: bool [9, 19] for a word, [9, 7] for a digit, True where black."""
    if label < len(WORDS):
        return scenes.word_bitmap(label)
    band = np.zeros((9, 7), dtype=bool)
    for j, bits in enumerate(_DIGIT_GLYPHS[LABELS[label]]):
        band[1 + j, 1:6] = [bits >> (4 - k) & 1 for k in range(5)]
    return band


@cache
def _body(shape: int, size: int) -> np.ndarray:
    """Pixels of a shape around its middle: bool [24, 24]."""
    return scenes.shape_mask(shape, size, 0, 0)[12:36, 12:36]


def _smooth(rng: np.random.Generator, height: int, width: int, step: int, strength: int) -> np.ndarray:
    """Smooth noise: random numbers every `step` pixels, linear between them; int [height, width]."""
    grid = rng.integers(-strength, strength + 1, (height // step + 2, width // step + 2))
    y, x = np.arange(height), np.arange(width)
    (row, down), (col, right) = np.divmod(y, step), np.divmod(x, step)
    top = grid[row][:, col] * (step - right) + grid[row][:, col + 1] * right
    bottom = grid[row + 1][:, col] * (step - right) + grid[row + 1][:, col + 1] * right
    return (top * (step - down)[:, None] + bottom * down[:, None]) // (step * step)


def _tone(rng: np.random.Generator, gray: int) -> np.ndarray:
    """A muted color of about this brightness."""
    return np.clip(gray + rng.integers(-14, 15, 3), 15, 235)


def _box(middle: tuple[int, int], reach: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the picture that are at most `reach` away from a pixel."""
    (y, x), (ry, rx), (height, width) = middle, reach, size
    return slice(max(0, y - ry), min(height, y + ry + 1)), slice(max(0, x - rx), min(width, x + rx + 1))


def _strip(size: tuple[int, int], rng: np.random.Generator, length: int, breadth: int) -> tuple:
    """A straight strip of random place and direction: its box, and its pixels there as bool [h, w]."""
    cy, cx = int(rng.integers(size[0])), int(rng.integers(size[1]))
    dy, dx = ((0, 4), (4, 0), (3, 3), (3, -3), (2, 4), (2, -4), (4, 2), (4, -2))[int(rng.integers(8))]
    box = _box((cy, cx), (length // 2 + 4, length // 2 + 4), size)
    y, x = np.mgrid[box]
    along, across = (y - cy) * dy + (x - cx) * dx, (y - cy) * dx - (x - cx) * dy
    return box, (abs(along) <= length * 2) & (abs(across) <= breadth * 2)


def _ground(scene: Crowd, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Background with leaves on it: int [height, width, 3]."""
    gray = int(rng.integers(70, 180))
    if rng.random() < 0.3:
        image = scenes.background(scene.texture, height, width).astype(np.int64)
    else:
        noise = _smooth(rng, height, width, 32, 24) + _smooth(rng, height, width, 8, 12)
        image = _tone(rng, gray) + noise[..., None] // 6 * 6
    for _ in range(int(rng.integers(8, 20))):
        cy, cx, ry, rx = (int(rng.integers(*span)) for span in ((height,), (width,), (3, 11), (3, 11)))
        box = _box((cy, cx), (ry, rx), (height, width))
        y, x = np.mgrid[box]
        leaf = ((y - cy) * rx) ** 2 + ((x - cx) * ry) ** 2 <= (rx * ry) ** 2
        image[box][leaf] = _tone(rng, gray + int(rng.integers(-50, 51)))
    return image


@lru_cache(maxsize=256)
def _paint(scene: Crowd) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [32 rows, 32 cols, 3], and what every pixel shows: twice the index of an object for its shape,
    one more for its label, -1 for anything else; int16 [32 rows, 32 cols]."""
    rng = np.random.default_rng([scene.texture, 8])
    height, width = SMALL_CELL * scene.rows, SMALL_CELL * scene.cols
    image, owner = _ground(scene, rng, height, width), np.full((height, width), -1, dtype=np.int16)
    for i, thing in enumerate(scene.things):
        y, x = _middle(thing)
        mask = _body(thing.shape, thing.size)
        top, bottom, left, right = max(0, y - 12), min(height, y + 12), max(0, x - 12), min(width, x + 12)
        mask = mask[top - y + 12 : bottom - y + 12, left - x + 12 : right - x + 12]
        image[top:bottom, left:right][mask] = RGB[thing.color] + thing.shade
        owner[top:bottom, left:right][mask] = 2 * i
    _lay_twigs(image, owner, rng, len(scene.things))
    for i, thing in enumerate(scene.things):
        if thing.label >= 0:
            (y, x), band = _middle(thing), label_bitmap(thing.label)
            top, left = y + 7, x - band.shape[1] // 2
            image[top : top + 9, left : left + band.shape[1]] = np.where(band[..., None], 15, 245)
            owner[top : top + 9, left : left + band.shape[1]] = 2 * i + 1
    light = rng.integers(200, 257, 4)  # of the corners, of 256
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    upper, lower = light[0] * (width - x) + light[1] * x, light[2] * (width - x) + light[3] * x
    shine = (upper * (height - y) + lower * y) // (height * width)
    return np.clip(image * shine[..., None] // 256, 0, 255).astype(np.uint8), owner


def _lay_twigs(image: np.ndarray, owner: np.ndarray, rng: np.random.Generator, objects: int) -> None:
    """Thin strips over the picture, in place; one that would hide too much of an object is left out."""
    whole = np.bincount(owner[owner >= 0] // 2, minlength=objects)
    hidden = np.zeros_like(whole)
    for _ in range(int(rng.integers(4, 10))):
        box, twig = _strip(owner.shape, rng, int(rng.integers(20, 70)), int(rng.integers(1, 3)))
        tone, under = _tone(rng, int(rng.integers(40, 190))), owner[box]
        more = hidden + np.bincount(under[twig & (under >= 0)] // 2, minlength=objects)
        if (more * VISIBLE[1] <= whole * (VISIBLE[1] - VISIBLE[0])).all():
            hidden = more
            image[box][twig], under[twig] = tone, -1


@lru_cache(maxsize=256)
def _shares(scene: Crowd) -> np.ndarray:
    """Share of each patch of the padded square that shape and label of each object cover: float [objects, 2, 576]."""
    owner, (top, left) = _paint(scene)[1], scene.offset
    square = np.full((IMAGE, IMAGE), -1, dtype=np.int64)
    square[PATCH * top : PATCH * top + owner.shape[0], PATCH * left : PATCH * left + owner.shape[1]] = owner
    patch = np.arange(GRID * GRID).reshape(GRID, GRID).repeat(PATCH, 0).repeat(PATCH, 1)
    on, kinds = square >= 0, 2 * len(scene.things)
    counts = np.bincount(patch[on] * kinds + square[on], minlength=GRID * GRID * kinds)
    return counts.reshape(GRID * GRID, len(scene.things), 2).transpose(1, 2, 0) / PATCH**2


@lru_cache(maxsize=256)
def _parts(scene: Crowd) -> np.ndarray:
    return _shares(scene) >= ON_OBJECT


def counts(scene: Scene) -> Counter[tuple[int, int]]:
    """How many objects have each color and shape."""
    return Counter((t.color, t.shape) for t in scene.things)
