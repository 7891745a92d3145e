"""The retention curve of AutoPrune and its projection onto a token budget (paper section 3; plain numbers, no tensors).

Mutual information gives the slope of a logistic curve over the layers; one common scale makes the tokens that the curve
keeps add up to the budget. Everything here runs on the host, once per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# The published bisection: interval, iterations and the tolerance that means an exact hit (totals are integers).
_MAX_SCALE = 20.0
_MAX_STEPS = 200
_EXACT = 0.01
_PUBLISHED_DEPTH = 32


@dataclass(frozen=True)
class PruneStep:
    """What one layer does with its visual tokens: how many stay, how many are recycled, into how many merged tokens."""

    keep: int
    recycled: int
    merged: int

    @property
    def total(self) -> int:
        """Visual tokens leaving the layer."""
        return self.keep + self.merged


def prune_step(visual_tokens: int, keep: int, recycle_fraction: float = 0.3) -> PruneStep:
    """Recycling rule: of the dropped tokens ``int(0.3 d) + 1`` are merged into a tenth as many (at least one).

    Args:
        visual_tokens: tokens entering the decision.
        keep: tokens to keep; clamped to 0..``visual_tokens``.
        recycle_fraction: share of the dropped tokens that is recycled; 0 switches recycling off.
    """
    keep = max(min(keep, visual_tokens), 0)
    dropped = visual_tokens - keep
    if dropped == 0 or recycle_fraction == 0:
        return PruneStep(keep, 0, 0)
    recycled = int(recycle_fraction * dropped) + 1
    return PruneStep(keep, recycled, min(recycled // 10 + 1, recycled))


def dynamic_slope(mutual_information: float, k0: float = 0.4, gamma: float = 0.2) -> float:
    """Slope of the logistic curve, ``max(k0 - gamma * MI, 0)``: the closer text and image are coupled, the flatter.

    Information that is not finite counts as none: such a sample is lost, but its schedule is still made of numbers, so
    that the samples beside it go on and the fault is reported where the answer is read.
    """
    if not math.isfinite(mutual_information):
        return max(k0, 0.0)
    return max(k0 - gamma * mutual_information, 0.0)


def retention_curve(
    num_layers: int, slope: float, x0: float = 14.9, amplitude: float = 0.75, *, relative: bool = False
) -> np.ndarray:
    """Unscaled share of visual tokens kept after layers ``1 .. num_layers - 1``, float64 ``[num_layers - 1]``.

    The inflection lies at ``x0 + slope``, not at ``x0``, as in the published code. ``x0`` counts layers absolutely, or
    with ``relative`` on a scale of 32 layers.
    """
    if relative:
        x0 = x0 * num_layers / _PUBLISHED_DEPTH
    layers = np.arange(1, num_layers, dtype=np.float64)
    with np.errstate(over="ignore"):  # a very steep curve overflows to a share of exactly 0
        return amplitude / (1.0 + np.exp(slope * (layers - (x0 + slope))))


def fit_to_budget(
    curve: np.ndarray,
    coarse_tokens: int,
    target_tokens: int,
    recycle_fraction: float = 0.3,
    *,
    held: int = 1,
    entering: int | None = None,
) -> np.ndarray:
    """Scale a retention curve so that the tokens of all layers add up to ``num_layers * target_tokens``.

    The total charges every layer, the first included, with the tokens that *leave* it (the nominal count of the paper)
    or, if ``entering`` is given, with those that enter it (the processed count).

    Args:
        curve: shares after the last layers, by default after layers 1..L-1.
        coarse_tokens: visual tokens after layer 0.
        target_tokens: wanted mean per layer.
        recycle_fraction: see :func:`prune_step`.
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

    shares = curve.tolist()
    low, high = 0.0, _MAX_SCALE
    best_scale, best_error = 1.0, math.inf
    for _ in range(_MAX_STEPS):
        scale = (low + high) / 2
        total = charged + _total_tokens(shares, scale, coarse_tokens, recycle_fraction, last)
        error = abs(total - target_total)
        if error < best_error:
            best_scale, best_error = scale, error
            if error < _EXACT:
                break
        if scale in (low, high):  # the interval cannot shrink any further, the remaining steps would repeat this one
            break
        if total < target_total:
            low = scale
        else:
            high = scale
    return best_scale * curve


def _total_tokens(shares: list[float], scale: float, coarse_tokens: int, recycle_fraction: float, last: int) -> int:
    """Tokens leaving the layers of the curve; the last layer counts ``last`` times."""
    current, total = coarse_tokens, 0
    for share in shares:
        keep = math.ceil((coarse_tokens - 1) * min(1.0, scale * share))
        dropped = current - keep
        # Not prune_step: merged tokens can make `keep` exceed `current`, and the published estimate goes on with the
        # negative difference (Python's int() and // as there), where the real run clamps.
        if dropped == 0 or recycle_fraction == 0:
            current = keep
        else:
            recycled = int(recycle_fraction * dropped) + 1
            current = keep + min(recycled // 10 + 1, recycled)
        total += current
    return total - (1 - last) * current


def tokens_to_keep(coarse_tokens: int, share: float) -> int:
    """Tokens a layer keeps at a scaled share: ``ceil((coarse_tokens - 1) * share)``.

    The base is one less than the tokens after layer 0, so even a share of 1 drops one token; and the product is in
    float32 while :func:`fit_to_budget` plans in float64, so on a flat curve the two can differ by one token. Both are
    the published behavior.
    """
    return math.ceil(np.float32(coarse_tokens - 1) * np.float32(share))


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
    curve: np.ndarray,
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
        recycle_fraction: see :func:`prune_step`.
        first: the first layer that follows the curve, at least 1.
        entering: see :func:`fit_to_budget`.
    """
    shares = fit_to_budget(
        curve[first - 1 :], coarse_tokens, target_tokens, recycle_fraction, held=first, entering=entering
    )
    return [coarse_tokens] * first + [tokens_to_keep(coarse_tokens, share) for share in shares]


def retention_schedule(
    num_layers: int,
    visual_tokens: int,
    target_tokens: int,
    slope: float,
    x0: float = 14.9,
    amplitude: float = 0.75,
    coarse_factor: float = 2.5,
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
    counts = [coarse]
    for keep in keep_counts(retention_curve(num_layers, slope, x0, amplitude), coarse, target_tokens)[1:]:
        counts.append(prune_step(counts[-1], keep).total)
    return counts
