"""The retention curve of AutoPrune and its projection onto a token budget (paper section 3; plain numbers, no tensors).

Mutual information gives the slope of a logistic curve over the layers; one common scale makes the tokens that the curve
keeps add up to the budget. Everything here runs on the host, once per sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llava.pruning.recycling import tokens_leaving
from llava.pruning.types import OptionError

FloatArray = NDArray[np.float64]

# The published bisection: interval, iterations and the tolerance that means an exact hit (totals are integers).
_MAX_SCALE = 20.0
_MAX_STEPS = 200
_EXACT = 0.01
_PUBLISHED_DEPTH = 32


def dynamic_slope(mutual_information: float, k0: float = 0.4, gamma: float = 0.2) -> float:
    """Slope of the logistic curve, ``max(k0 - gamma * MI, 0)``: the closer text and image are coupled, the flatter.

    Information that is not finite counts as none: such a sample is lost, but its schedule is still made of numbers, so
    that the samples beside it go on and the fault is reported where the answer is read.
    """
    if not math.isfinite(mutual_information):
        return max(k0, 0.0)
    return max(k0 - gamma * mutual_information, 0.0)


@functools.lru_cache(maxsize=4096)
def planned_counts(
    num_layers: int,
    slope: float,
    x0: float,
    amplitude: float,
    relative: bool,
    curve: str,
    coarse_tokens: int,
    target_tokens: int,
    recycle_fraction: float,
    first: int,
    entering: int | None,
) -> tuple[int, ...]:
    """:func:`keep_counts` of the :func:`retention_curve` with this slope.

    Remembered, because the device waits while the host plans, and where slopes are rounded they come again.
    """
    shares = retention_curve(num_layers, slope, x0, amplitude, relative=relative, curve=curve)
    return tuple(keep_counts(shares, coarse_tokens, target_tokens, recycle_fraction, first=first, entering=entering))


Curve = Callable[[int, float, float, float], FloatArray]
"""Unscaled shares of visual tokens kept after layers ``1 .. num_layers - 1``, float64 ``[num_layers - 1]``, of
``(num_layers, slope, x0, amplitude)``: only their proportions matter, the budget scales them.
"""
CURVES: dict[str, Curve] = {}
"""Curves by the name that AutoPrune's option ``curve`` takes."""


def add_curve(name: str) -> Callable[[Curve], Curve]:
    """Decorator that makes a function a curve of AutoPrune; another one of that name is replaced."""

    def add(curve: Curve) -> Curve:
        CURVES[name] = curve
        planned_counts.cache_clear()
        return curve

    return add


@add_curve("logistic")
def logistic(num_layers: int, slope: float, x0: float, amplitude: float) -> FloatArray:
    """The published curve. The inflection lies at ``x0 + slope``, not at ``x0``, as in the published code."""
    layers = np.arange(1, num_layers, dtype=np.float64)
    with np.errstate(over="ignore"):  # a very steep curve overflows to a share of exactly 0
        shares: FloatArray = amplitude / (1.0 + np.exp(slope * (layers - (x0 + slope))))
    return shares


def retention_curve(
    num_layers: int,
    slope: float,
    x0: float = 14.9,
    amplitude: float = 0.75,
    *,
    relative: bool = False,
    curve: str = "logistic",
) -> FloatArray:
    """Unscaled share of visual tokens kept after layers ``1 .. num_layers - 1``, float64 ``[num_layers - 1]``.

    ``x0`` counts layers absolutely, or with ``relative`` on a scale of 32 layers.

    Raises:
        OptionError: no curve has that name.
        ValueError: the curve gives shares of another number, negative or not finite.
    """
    if curve not in CURVES:
        raise OptionError(f"curve must be one of {', '.join(sorted(CURVES))}, got {curve!r}")
    if relative:
        x0 = x0 * num_layers / _PUBLISHED_DEPTH
    shares = np.asarray(CURVES[curve](num_layers, slope, x0, amplitude), dtype=np.float64)
    if shares.shape != (num_layers - 1,) or not np.isfinite(shares).all() or (shares < 0).any():
        raise ValueError(f"curve {curve!r} must give {num_layers - 1} finite shares of at least 0")
    return shares


def fit_to_budget(
    curve: FloatArray,
    coarse_tokens: int,
    target_tokens: int,
    recycle_fraction: float = 0.3,
    *,
    held: int = 1,
    entering: int | None = None,
) -> FloatArray:
    """Scale a retention curve so that the tokens of all layers add up to ``num_layers * target_tokens``.

    The total charges every layer, the first included, with the tokens that *leave* it (the nominal count of the paper)
    or, if ``entering`` is given, with those that enter it (the processed count).

    Args:
        curve: shares after the last layers, by default after layers 1..L-1.
        coarse_tokens: visual tokens after layer 0.
        target_tokens: wanted mean per layer.
        recycle_fraction: see :func:`~llava.pruning.recycling.prune_step`.
        held: layers in front of those of the curve; ``coarse_tokens`` leave each of them.
        entering: visual tokens entering layer 0, if the processed mean shall meet the target.

    Returns:
        Scaled shares, float64, as many as in ``curve``; they are not clipped and may exceed 1. The scale stays within
        [0, 20], so a steep curve with a large target can end below the budget, as in the published code.
    """
    target_total = (len(curve) + held) * target_tokens
    charged = held * coarse_tokens if entering is None else entering + held * coarse_tokens
    last = 1 if entering is None else 0
    # An early exit of the published code: it estimates the total without recycling and without layer 0, so it fires
    # only by coincidence (a handful of tokens), but it decides the result when it does.
    unscaled = (np.float32(coarse_tokens) * curve.astype(np.float32)).astype(np.int64)
    if len(unscaled) == 0:
        return curve
    if held == 1 and entering is None and abs(int(unscaled.sum()) + int(unscaled[-1]) - target_total) < 1:
        return curve

    def planned(scale: float) -> list[int]:
        """The published estimate of what layers keep: in float64."""
        keep: list[int] = np.ceil((coarse_tokens - 1) * np.minimum(1.0, scale * curve)).astype(np.int64).tolist()
        return keep

    low, high = 0.0, _MAX_SCALE
    lowest, highest = planned(low), planned(high)
    best_scale, best_error = 1.0, math.inf
    for _ in range(_MAX_STEPS):
        scale = (low + high) / 2
        keep = planned(scale)
        # Not clamped where merged tokens make a layer's count exceed the one before.
        counts = tokens_leaving(coarse_tokens, keep, recycle_fraction, clamp=False)
        total = charged + sum(counts) - (1 - last) * counts[-1]
        error = abs(total - target_total)
        if error < best_error:
            best_scale, best_error = scale, error
            if error < _EXACT:
                break
        if scale in (low, high):  # the interval cannot shrink any further, the remaining steps would repeat this one
            break
        if total < target_total:
            low, lowest = scale, keep
        else:
            high, highest = scale, keep
        # Whatever lies between two scales at which all layers keep the same has been tried: at one of them, or it is
        # one of the ends, from which nothing leads away.
        if lowest == highest:
            break
    return best_scale * curve


def tokens_to_keep(coarse_tokens: int, share: float) -> int:
    """Tokens a layer keeps at a scaled share: ``ceil((coarse_tokens - 1) * share)``.

    The base is one less than the tokens after layer 0, so even a share of 1 drops one token; and the product is in
    float32 while :func:`fit_to_budget` plans in float64, so on a flat curve the two can differ by one token. Both are
    the published behavior.
    """
    return _all_to_keep(coarse_tokens, np.array([share]))[0]


def _all_to_keep(coarse_tokens: int, shares: FloatArray) -> list[int]:
    kept: list[int] = np.ceil(np.float32(coarse_tokens - 1) * shares.astype(np.float32)).astype(np.int64).tolist()
    return kept


def coarse_token_count(
    visual_tokens: int, target_tokens: float, coarse_factor: float = 2.5, charged_layers: int | None = None
) -> int:
    """Visual tokens kept after layer 0, ``min(int(2.5 * target), visual_tokens)``.

    With ``charged_layers`` (all layers of the decoder) the target is a processed mean, of which layer 0, working on all
    tokens, takes ``visual_tokens / charged_layers`` away (at least 1 is left).
    """
    if charged_layers is not None:
        target_tokens = max(target_tokens - visual_tokens / charged_layers, 1)
    return min(int(coarse_factor * target_tokens), visual_tokens)


def keep_counts(
    curve: FloatArray,
    coarse_tokens: int,
    target_tokens: int,
    recycle_fraction: float = 0.3,
    *,
    first: int = 1,
    entering: int | None = None,
) -> list[int]:
    """Tokens to keep after every layer, merged ones not included.

    The base of all counts is ``coarse_tokens``, whatever was merged since (published). Layers in front of ``first``
    keep all of them.

    Args:
        curve: unscaled shares after layers 1..L-1, see :func:`retention_curve`.
        coarse_tokens: visual tokens after layer 0.
        target_tokens: wanted mean per layer.
        recycle_fraction: see :func:`~llava.pruning.recycling.prune_step`.
        first: the first layer that follows the curve, at least 1.
        entering: see :func:`fit_to_budget`.
    """
    shares = fit_to_budget(
        curve[first - 1 :], coarse_tokens, target_tokens, recycle_fraction, held=first, entering=entering
    )
    return [coarse_tokens] * first + _all_to_keep(coarse_tokens, shares)


def retention_schedule(
    num_layers: int,
    visual_tokens: int,
    target_tokens: int,
    slope: float,
    x0: float = 14.9,
    amplitude: float = 0.75,
    coarse_factor: float = 2.5,
    curve: str = "logistic",
) -> list[int]:
    """Visual tokens after each decoder layer ``0 .. num_layers - 1`` for a given slope, merged tokens included.

    Args:
        num_layers: decoder layers, at least 1.
        visual_tokens: visual tokens entering the decoder.
        target_tokens: budget, mean visual tokens per layer (nominal).
        slope: steepness of the logistic curve, see :func:`dynamic_slope`.
        x0: inflection in layers.
        amplitude: height of the unscaled curve.
        coarse_factor: multiple of the target kept after layer 0.
        curve: name of the curve, see :data:`CURVES`.

    Returns:
        ``num_layers`` counts, exactly those of a run with this slope.

    Raises:
        ValueError: ``num_layers`` or ``target_tokens`` below 1, or ``visual_tokens`` negative.
    """
    if num_layers < 1 or target_tokens < 1 or visual_tokens < 0:
        raise ValueError(
            "num_layers and target_tokens must be at least 1 and visual_tokens at least 0, got "
            f"{num_layers}, {target_tokens}, {visual_tokens}"
        )
    coarse = coarse_token_count(visual_tokens, target_tokens, coarse_factor)
    shares = retention_curve(num_layers, slope, x0, amplitude, curve=curve)
    return [coarse, *tokens_leaving(coarse, keep_counts(shares, coarse, target_tokens)[1:])]
