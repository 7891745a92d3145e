"""Padding very long pictures to a square and scaling it, without the square.

PIL scales the rows of a picture first and then its columns, bicubically, with 8-bit values in between. Where a row or a
column of the padded square holds nothing but padding, scaling it is not needed; elsewhere the sums over padding are
known without adding it up. What is left is the work on the picture itself. The weights are computed as PIL computes
them, in double precision and then rounded to 22 binary digits, so the bytes are those of PIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_SUPPORT = 2.0  # of the bicubic kernel, in output pixels
_A = -0.5  # PIL's parameter of the kernel
_BITS = 22  # of PIL's weights for 8-bit values
_BLOCK_VALUES = 2**20  # values that are scaled at a time


def pad_and_scale(image: Image.Image, side: int, background_color: tuple[int, ...]) -> Image.Image:
    """The `side` x `side` picture that is an RGB `image`, padded to a centered square and scaled down bicubically."""
    width, height = image.size
    full = max(image.size)
    square = Image.new("RGB", (side, side), background_color)
    if width > height:
        rows = np.asarray(image.resize((side, height), Image.Resampling.BICUBIC))
        first, band = _scale_band(rows, (full - height) // 2, full, side, background_color)
        square.paste(Image.fromarray(band), (0, first))
    else:
        columns = np.asarray(image).transpose(1, 0, 2)
        first, band = _scale_band(columns, (full - width) // 2, full, side, background_color)
        if len(band):
            narrow = Image.fromarray(np.ascontiguousarray(band.transpose(1, 0, 2)))
            square.paste(narrow.resize((len(band), side), Image.Resampling.BICUBIC), (first, 0))
    return square


def _scale_band(
    band_NMC: np.ndarray, offset: int, full: int, side: int, background_color: tuple[int, ...]
) -> tuple[int, np.ndarray]:
    """Scales the first axis of uint8 values that are padded to `full` entries, `offset` of them in front.

    Returns the number of the first output that sees the band, and uint8 `[outputs, M, C]`.
    """
    length, count, channels = band_NMC.shape
    taps = []  # per output that sees the band: first entry of the band, weights, sum of the weights of padding
    for output in range(side):
        start, weights = _weights(output, full, side)
        begin, end = max(start, offset), min(start + len(weights), offset + length)
        if begin < end:
            own = weights[begin - start : end - start]
            taps.append((output, begin - offset, own, weights.sum() - own.sum()))
    scaled = np.empty((len(taps), count, channels), dtype=np.uint8)
    background = np.asarray(background_color, dtype=np.float64)
    step = max(_BLOCK_VALUES // (length * channels), 1)
    for at in range(0, count, step):
        values = band_NMC[:, at : at + step].reshape(length, -1).astype(np.float64)
        for row, (_, begin, own, padding) in enumerate(taps):
            # Whole numbers below 2^53: the sums are exact in any order.
            total = (own @ values[begin : begin + len(own)]).reshape(-1, channels) + padding * background
            scaled[row, at : at + step] = np.floor_divide(total + 2 ** (_BITS - 1), 2**_BITS).clip(0, 255)
    return (taps[0][0] if taps else 0), scaled


def _weights(output: int, full: int, side: int) -> tuple[int, Any]:
    """First input and weights, whole numbers as float64, of one output when `full` inputs become `side`."""
    scale = full / side
    support = _SUPPORT * max(scale, 1.0)
    center = (output + 0.5) * scale
    start, stop = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), full)
    x = np.abs((np.arange(start, stop) - center + 0.5) * (1.0 / max(scale, 1.0)))
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    kernel = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    kernel = kernel / np.cumsum(kernel)[-1]  # one after the other, as PIL adds them up
    return start, np.trunc(kernel * 2**_BITS + np.copysign(0.5, kernel))
