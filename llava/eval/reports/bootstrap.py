"""95% confidence intervals by bootstrap over questions.

Works on arrays of per-question values. All settings are resampled together, so differences and ratios between them are
paired.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
MAX_RESAMPLES = 1_000_000
LEVEL = 95.0
_BLOCK = 4_000_000  # counts drawn at a time, which bounds the memory


@dataclass(frozen=True)
class Estimate:
    """A figure and the bounds of its interval, all in the unit of the figure."""

    value: float
    low: float
    high: float


def resampled_means(values: np.ndarray, resamples: int, seed: int, name: str = "") -> np.ndarray:
    """Column means ``[R, C]`` of ``values`` ``[n, C]`` over ``resamples`` samples of n rows drawn with replacement.

    ``name`` (of a benchmark) makes draws of different benchmarks independent; which others there are has no influence.
    """
    n = len(values)
    if n == 0:
        raise ValueError("nothing to resample: no row")
    draw = np.random.default_rng([seed, zlib.crc32(name.encode("utf-8", "surrogatepass"))])
    even = np.full(n, 1.0 / n)
    means = []
    for start in range(0, resamples, max(1, _BLOCK // n)):
        size = min(max(1, _BLOCK // n), resamples - start)
        means.append(draw.multinomial(n, even, size=size) @ values / n)
    return np.concatenate(means)


def estimates(values: np.ndarray, samples: np.ndarray, level: float = LEVEL) -> list[Estimate]:
    """``values`` ``[C]`` with the percentile interval of their resampled counterparts ``[R, C]``."""
    tail = (100.0 - level) / 2
    low, high = np.nanpercentile(samples, [tail, 100.0 - tail], axis=0)
    return [Estimate(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]


def retained(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """Percent of the first column that each column retains, averaged over benchmarks.

    means: benchmark -> ``[..., C]``; a benchmark whose first column is 0 is left out, as in the paper's tables a ratio
    to nothing has no meaning (NaN if that leaves none).
    """
    ratios = []
    for mean in means.values():
        mean = np.asarray(mean, dtype=np.float64)
        dense = mean[..., :1]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(np.where(dense > 0, 100.0 * mean / dense, np.nan))
    stacked = np.stack(ratios)
    there = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        return np.where(there, stacked, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)
