"""Scenes of colored shapes with words on them: sampling, rendering, and which patch shows what.

Everything is integer arithmetic in numpy, so a seed gives the same pixels everywhere.

Geometry: cells of 48 x 48 pixels, one object per cell at most; 4 x 4, 4 x 3 or 3 x 4 cells. A patch has 8 pixels, and a
picture padded to the square of 192 pixels (as the real preprocessing does) has 24 x 24 patches.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
WORDS = ("CAT", "DOG", "SUN", "MAP", "KEY", "CUP", "BOX", "FOX", "JAM", "NET", "PIE", "VAN")
RGB = np.array(
    [
        (220, 40, 40),
        (40, 160, 60),
        (50, 80, 220),
        (235, 215, 50),
        (140, 60, 170),
        (240, 140, 30),
        (245, 150, 190),
        (60, 200, 210),
    ],
    dtype=np.int64,
)
IMAGE, PATCH, CELL, GRID = 192, 8, 48, 24
JITTER = (-8, -4, 0, 4, 8)
SIZES = (15, 16)
LAYOUTS = ((4, 4), (4, 4), (4, 4), (3, 4), (4, 3))
WIDE = ((4, 8), (8, 4), (8, 8), (6, 8), (8, 6), (4, 12), (12, 4), (4, 6), (6, 4))
"""Layouts whose pictures anyres neither scales nor cuts through cells on their canvas (`train.wide`)."""
ON_OBJECT = 0.2
"""A patch lies on an object when at least this share of its pixels does."""
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

GLYPHS = {  # 5 x 7 pixels, one 5-bit number per row
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 14),
    "I": (31, 4, 4, 4, 4, 4, 31),
    "J": (7, 2, 2, 2, 2, 18, 12),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "M": (17, 27, 21, 21, 17, 17, 17),
    "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "V": (17, 17, 17, 17, 17, 10, 4),
    "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 10, 4, 4, 4, 4),
}


@dataclass(frozen=True)
class Thing:
    """One object: indices into COLORS, SHAPES, WORDS (-1: no word), its cell, and pixel jitter within the cell."""

    color: int
    shape: int
    word: int
    row: int
    col: int
    dy: int = 0
    dx: int = 0
    size: int = 16
    shade: int = 0

    @property
    def label(self) -> int:
        """What is written on it: index into WORDS, -1: nothing."""
        return self.word


def full_name(thing: Thing) -> str:
    """`red star`."""
    return f"{COLORS[thing.color]} {SHAPES[thing.shape]}"


@dataclass(frozen=True)
class Scene:
    """Objects on `rows` x `cols` cells; `texture` seeds the background."""

    things: tuple[Thing, ...]
    rows: int
    cols: int
    texture: int

    @property
    def offset(self) -> tuple[int, int]:
        """Patches of padding above and to the left, once the picture is padded to the square."""
        return (4 - self.rows) * 3, (4 - self.cols) * 3

    def held_out(self) -> bool:
        """True if this arrangement belongs to evaluation: training draws such scenes again, evaluation the others.

        The split is a property of the arrangement itself, so no seed can bring an evaluation scene into training.
        """
        key = sorted((t.row, t.col, t.color, t.shape) for t in self.things)
        return zlib.crc32(repr((self.rows, self.cols, key)).encode()) % 16 == 0

    @property
    def side(self) -> int:
        """Cells along the side of the padded square."""
        return max(4, self.rows, self.cols)

    def bins(self, thing: Thing) -> tuple[int, int]:
        """Row and column of the object on the padded square in half cells, 0..6 for a square of 4 cells."""
        return 2 * thing.row + self.side - self.rows, 2 * thing.col + self.side - self.cols

    def coarse(self, thing: Thing) -> tuple[int, int]:
        """`bins` in steps of 24 pixels, whatever the size of the cells."""
        return self.bins(thing)

    @property
    def crowded(self) -> bool:
        """Many small objects of which a question may ask about a few only (`crowded.Crowd`)."""
        return False

    def names(self, index: int, hide: str = "") -> list[str]:
        """Phrases that name exactly this object without its `hide` (color, shape, word); the likely ones first."""
        thing = self.things[index]
        names = [] if hide in ("color", "shape") else [full_name(thing)] * 2
        if hide != "shape" and sum(t.shape == thing.shape for t in self.things) == 1:
            names.append(SHAPES[thing.shape])
        if hide != "color" and sum(t.color == thing.color for t in self.things) == 1:
            names.append(f"{COLORS[thing.color]} object")
        return names

    def fits(self, members: tuple[int, ...] | list[int]) -> bool:
        """True if a question may ask about these objects together."""
        return True

    def parts(self) -> np.ndarray:
        """Patches that show each object and those that show its label: bool [objects, 2, 576]."""
        seen = (coverage(self) >= ON_OBJECT).reshape(len(self.things), 1, GRID * GRID)
        return seen.repeat(2, axis=1)

    def cover(self) -> np.ndarray:
        return _coverage(self)

    def center(self, thing: Thing) -> tuple[int, int]:
        (top, left), (row, col) = self.offset, center_cell(thing)
        return top + row, left + col

    def draw(self) -> np.ndarray:
        return _render(self)


def sample_scene(
    rng: np.random.Generator,
    low: int,
    high: int,
    held_out: bool,
    word_share: float = 0.6,
    layouts: tuple[tuple[int, int], ...] = LAYOUTS,
) -> Scene:
    """Draw a scene of low..high objects (no two equal in both color and shape), in the wanted half of the split, on
    one of the `layouts` (rows and columns of cells)."""
    while True:
        rows, cols = layouts[rng.integers(len(layouts))]
        count = int(rng.integers(low, high + 1))
        cells = rng.permutation(rows * cols)[:count]
        # Few colors and shapes per scene: references must be resolved and absent pairs are plausible.
        palette = rng.permutation(len(COLORS))[: max(2, count)]
        kinds: set[tuple[int, int]] = set()
        while len(kinds) < count:
            kinds.add((int(palette[rng.integers(len(palette))]), int(rng.integers(len(SHAPES)))))
        words = rng.permutation(len(WORDS))
        things = []
        for i, (color, shape) in enumerate(sorted(kinds)):
            word = int(words[i]) if rng.random() < word_share else -1
            things.append(
                Thing(
                    color,
                    shape,
                    word,
                    int(cells[i]) // cols,
                    int(cells[i]) % cols,
                    int(JITTER[rng.integers(5)]),
                    int(JITTER[rng.integers(5)]),
                    int(SIZES[rng.integers(2)]),
                    int(rng.integers(-14, 15)),
                )
            )
        scene = Scene(tuple(things), rows, cols, int(rng.integers(1 << 31)))
        if scene.held_out() == held_out:
            return scene


def sample_wide(rng: np.random.Generator, low: int, high: int, held_out: bool, word_share: float = 0.6) -> Scene:
    """A scene on one of the wide layouts, in the wanted half of the split."""
    return sample_scene(rng, low, high, held_out, word_share, WIDE)


@cache
def shape_mask(shape: int, size: int, dy: int, dx: int) -> np.ndarray:
    """Pixels of a shape in its cell: bool [48, 48]."""
    y, x = np.mgrid[0:CELL, 0:CELL]
    y, x = 2 * (y - CELL // 2 - dy) + 1, 2 * (x - CELL // 2 - dx) + 1  # twice the distance to the center, odd numbers
    r = 2 * size
    name = SHAPES[shape]
    if name == "circle":
        return x * x + y * y <= r * r
    if name == "square":
        return np.maximum(abs(x), abs(y)) <= r - 4
    if name == "triangle":
        return (y <= r) & (2 * abs(x) <= y + r + 2)
    if name == "cross":
        return (np.minimum(abs(x), abs(y)) <= r * 2 // 5) & (np.maximum(abs(x), abs(y)) <= r)
    if name == "diamond":
        return abs(x) + abs(y) <= r
    # star: four points, two thin crossed rhombi (upright and diagonal) with a core
    upright = np.minimum(abs(x) * 3 + abs(y), abs(x) + abs(y) * 3) <= r
    diagonal = np.minimum(abs(x + y) * 3 + abs(x - y), abs(x + y) + abs(x - y) * 3) <= r * 3 // 2
    return upright | diagonal | (x * x + y * y <= r * r // 3)


@cache
def word_bitmap(word: int) -> np.ndarray:
    """Black letters on a white band: bool [9, 19], True where black."""
    band = np.zeros((9, 19), dtype=bool)
    for i, letter in enumerate(WORDS[word]):
        for j, bits in enumerate(GLYPHS[letter]):
            band[1 + j, 1 + 6 * i : 6 + 6 * i] = [bits >> (4 - k) & 1 for k in range(5)]
    return band


@cache
def _cell_cover(shape: int, size: int, dy: int, dx: int, word: bool) -> np.ndarray:
    """Share of the pixels of each patch of the cell that the object covers: float [6, 6]."""
    mask = shape_mask(shape, size, dy, dx).copy()
    if word:
        mask[CELL // 2 + dy - 4 : CELL // 2 + dy + 5, CELL // 2 + dx - 9 : CELL // 2 + dx + 10] = True
    return mask.reshape(6, PATCH, 6, PATCH).mean(axis=(1, 3))


def coverage(scene: Scene) -> np.ndarray:
    """Share of each patch of the padded square that each object covers: float [objects, 24, 24]."""
    return scene.cover()


def _coverage(scene: Scene) -> np.ndarray:
    out = np.zeros((len(scene.things), GRID, GRID))
    top, left = scene.offset
    for i, t in enumerate(scene.things):
        r, c = top + 6 * t.row, left + 6 * t.col
        out[i, r : r + 6, c : c + 6] = _cell_cover(t.shape, t.size, t.dy, t.dx, t.word >= 0)
    return out


def center_cell(thing: Thing) -> tuple[int, int]:
    """The patch of the picture that holds the center of the object: (row, column)."""
    return 6 * thing.row + (CELL // 2 + thing.dy) // PATCH, 6 * thing.col + (CELL // 2 + thing.dx) // PATCH


def center_patch(scene: Scene, thing: Thing) -> tuple[int, int]:
    """The patch of the padded square that holds the center of the object: (row, column)."""
    return scene.center(thing)


def background(texture: int, height: int, width: int) -> np.ndarray:
    """A structured texture of a few muted tones: uint8 [height, width, 3]."""
    rng = np.random.default_rng(texture)
    y, x = np.mgrid[0:height, 0:width]
    p, q = int(rng.integers(3, 13)), int(rng.integers(3, 13))
    y, x = y + int(rng.integers(64)), x + int(rng.integers(64))
    kind = int(rng.integers(8))
    index = (
        lambda: (x // p + y // q) % 2,
        lambda: (x // p) % 3,
        lambda: (y // q) % 3,
        lambda: ((x + y) // p) % 3,
        lambda: ((x - y) // q) % 2,
        lambda: ((x % (2 * p) < 2) | (y % (2 * q) < 2)).astype(np.int64),
        lambda: ((x % (2 * p)) // p) * ((y % (2 * q)) // q) + (y // (2 * q)) % 2,
        lambda: ((x + (y // p) % 2 * p) % (2 * p) < 1) * 2 | (y % p < 1) * 1,
    )[kind]()
    gray = int(rng.integers(60, 200))
    tones = gray + rng.integers(-28, 29, (4, 1)) + rng.integers(-12, 13, (4, 3))
    return np.clip(tones, 20, 235).astype(np.uint8)[index]


def render(scene: Scene) -> np.ndarray:
    """The picture: uint8 [48 rows, 48 cols, 3], or as its family has it."""
    return scene.draw()


def _render(scene: Scene) -> np.ndarray:
    image = background(scene.texture, CELL * scene.rows, CELL * scene.cols)
    for t in scene.things:
        cell = image[CELL * t.row : CELL * (t.row + 1), CELL * t.col : CELL * (t.col + 1)]
        cell[shape_mask(t.shape, t.size, t.dy, t.dx)] = np.clip(RGB[t.color] + t.shade, 0, 255)
        if t.word >= 0:
            band = word_bitmap(t.word)
            top, left = CELL // 2 + t.dy - 4, CELL // 2 + t.dx - 9
            cell[top : top + 9, left : left + 19] = np.where(band[..., None], 15, 245)
    return image


def pad_square(image: np.ndarray) -> np.ndarray:
    """Center the picture on a 192 x 192 square of the mean color, as LLaVA's `pad` preprocessing does: uint8
    [192, 192, 3]."""
    out = np.empty((IMAGE, IMAGE, 3), dtype=np.uint8)
    out[:] = [int(m * 255) for m in PIXEL_MEAN]
    top, left = (IMAGE - image.shape[0]) // 2, (IMAGE - image.shape[1]) // 2
    out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out
