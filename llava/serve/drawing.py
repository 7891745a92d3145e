"""Survivors drawn into the picture, for the web demo; the report draws the same in the browser.

Pale: dropped patches. Hatched: padding. Outlined: patches that were merged into one token.
"""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from llava.eval.reports.look.traces import Group, Looked

WIDTH = 480
_PALE = 0.82
_PADDING, _HATCH, _TOKENS = (201, 205, 210), (139, 146, 154), (76, 120, 201)


def survivors(image: Image.Image | None, looked: Looked, layer: int) -> list[Image.Image]:
    """One picture per raster after `layer` (-1: before the decoder). image: the question's picture, of any size."""
    if looked.depth is None or not looked.visual:
        return [] if image is None else [_scaled(image)]
    if looked.rasters is None or image is None:
        side = int(np.ceil(np.sqrt(looked.visual)))
        rows = -(-looked.visual // side)
        raster: dict[str, Any] = {"grid": [rows, side], "box": [0, 0, 1, 1], "tiles": [1, 1], "first": 0}
        return [_draw(Image.new("RGB", (side * 20, rows * 20), _TOKENS), looked, raster, layer)]
    return [_draw(image, looked, raster, layer) for raster in looked.rasters]


def words(looked: Looked, layer: int) -> str:
    """How many patches and merged tokens are left."""
    if layer < 0 or not looked.counts:
        return f"all {looked.visual} visual tokens"
    layer = min(layer, len(looked.counts) - 1)
    left = looked.counts[layer]
    patches = left if looked.depth is None else int((looked.depth > layer).sum())
    return f"{patches} patches" + (f" + {left - patches} merged" if left > patches else "") + f" after layer {layer}"


def as_html(pictures: Iterable[Image.Image], text: str) -> str:
    """Pictures inside the page, so that none becomes a file; the text is what a screen reader says."""
    parts = [f'<img alt="{escape(text)}" src="{_data_uri(picture)}" style="width:100%">' for picture in pictures]
    return f"<figure style='margin:0'>{''.join(parts)}<figcaption>{escape(text)}</figcaption></figure>"


def _data_uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _scaled(image: Image.Image) -> Image.Image:
    return image.resize((WIDTH, max(round(WIDTH * image.height / image.width), 1)))


def _draw(image: Image.Image, looked: Looked, raster: Mapping[str, Any], layer: int) -> Image.Image:
    (rows, columns), (left, top, right, bottom) = raster["grid"], raster["box"]
    aspect = (right - left) * image.width / ((bottom - top) * image.height)
    width, height = WIDTH, min(max(round(WIDTH / aspect), 16), 4 * WIDTH)
    canvas = _hatching(width, height)
    x0, x1 = (round((edge - left) / (right - left) * width) for edge in (0, 1))
    y0, y1 = (round((edge - top) / (bottom - top) * height) for edge in (0, 1))
    canvas.paste(image.resize((max(x1 - x0, 1), max(y1 - y0, 1))), (x0, y0))
    xs, ys = _edges(width, columns), _edges(height, rows)
    if layer >= 0 and looked.depth is not None:
        first = raster["first"]
        gone = (looked.depth[first : first + rows * columns] <= layer).reshape(rows, columns)
        mask = np.repeat(np.repeat(gone, np.diff(ys), 0), np.diff(xs), 1)
        pixels = np.asarray(canvas, dtype=np.float32)
        pixels = np.where(mask[..., None], pixels * (1 - _PALE) + 255 * _PALE, pixels)
        canvas = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for number, group in enumerate(looked.groups or ()):
        if group.first <= layer <= group.last:
            _outline(pen, group, raster, xs, ys, _color(number))
    return canvas


def _edges(size: int, count: int) -> np.ndarray:
    return np.linspace(0, size, count + 1).round().astype(int)


def _hatching(width: int, height: int, step: int = 14) -> Image.Image:
    canvas = Image.new("RGB", (width, height), _PADDING)
    pen = ImageDraw.Draw(canvas)
    for start in range(-height, width, step):
        pen.line((start, height, start + height, 0), fill=_HATCH, width=2)
    return canvas


def _color(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb((number * 137 % 360) / 360, 0.38, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _outline(
    pen: ImageDraw.ImageDraw, group: Group, raster: Mapping[str, Any], xs: np.ndarray, ys: np.ndarray, color: Any
) -> None:
    """The border of a set of cells: every side that no other member shares."""
    rows, columns = raster["grid"]
    within = {token - raster["first"] for token in group.members if 0 <= token - raster["first"] < rows * columns}
    sides = []
    for place in within:
        row, column = divmod(place, columns)
        x0, x1, y0, y1 = xs[column], xs[column + 1] - 1, ys[row], ys[row + 1] - 1
        neighbors = (
            (row > 0, place - columns, (x0, y0, x1, y0)),
            (row < rows - 1, place + columns, (x0, y1, x1, y1)),
            (column > 0, place - 1, (x0, y0, x0, y1)),
            (column < columns - 1, place + 1, (x1, y0, x1, y1)),
        )
        sides += [line for there, other, line in neighbors if not (there and other in within)]
    for fill, width in (((255, 255, 255), 4), (color, 2)):
        for line in sides:
            pen.line([int(edge) for edge in line], fill=fill, width=width)
