"""From a budget to the tokens of each layer, for methods with more than one stage (plain numbers, no tensors).

Two ways to count: *nominal* charges a layer with the visual tokens that leave it, *processed* with those that enter it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

import numpy as np

BUDGETS = ("nominal", "processed")
_STEPS = 50
_RATIO = 0.5
STAGES = 3
"""Cuts of PyramidDrop."""


def share_of(count: int, ratio: float) -> int:
    """A share of ``count`` tokens, rounded down, at least 1.

    The product is that of the decimal number as it was written: 0.29 of 100 is 29, where binary floats say 28.99...
    """
    return max(int(Decimal(str(float(ratio))) * count), 1)


def mean_tokens(entering: int, leaving: Sequence[int], kind: str) -> float:
    """Mean visual tokens per layer.

    Args:
        entering: tokens entering layer 0.
        leaving: tokens leaving each layer.
        kind: ``nominal`` or ``processed``.
    """
    counts = leaving if kind == "nominal" else [entering, *leaving[:-1]]
    return sum(counts) / len(leaving)


def one_cut(count: int, num_layers: int, layer: int, target: int) -> int:
    """Tokens that a single cut in front of ``layer`` leaves of ``count``, at least one, so that the layers process
    ``target`` in the mean.
    """
    left = (num_layers * target - layer * count) // (num_layers - layer)
    return min(max(left, 1), count)


def nearest_plan(plan: Callable[[float], list[int]], entering: int, target: int, kind: str) -> float:
    """The parameter in 0..1 at which a plan comes closest to a budget.

    Args:
        plan: tokens leaving each layer for a parameter; more tokens for a larger one (small dips do no harm).
        entering: tokens entering layer 0.
        target: wanted mean.
        kind: how it is counted.

    Returns:
        The best parameter seen in a bisection; where the target lies outside what the plan can reach, an end.
    """
    low, high = 0.0, 1.0
    errors = {}
    for parameter in (low, high):
        errors[parameter] = abs(mean_tokens(entering, plan(parameter), kind) - target)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        mean = mean_tokens(entering, plan(middle), kind)
        errors[middle] = abs(mean - target)
        if mean < target:
            low = middle
        else:
            high = middle
    return min(errors, key=lambda parameter: (errors[parameter], parameter))


def scaled_layers(layers: Sequence[int], published_depth: int, num_layers: int) -> tuple[int, ...]:
    """Layer indices of a published setting at another depth: same relative place, rising, each layer once.

    Indices count layers after which something happens, so layer l of D has ``l + 1`` layers done.
    """
    scaled: list[int] = []
    for layer in layers:
        wanted = max(round((layer + 1) * num_layers / published_depth) - 1, 0)
        scaled.append(max(wanted, scaled[-1] + 1) if scaled else wanted)
    return tuple(layer for layer in scaled if layer < num_layers)


def parse_layers(text: str) -> tuple[int, ...] | None:
    """``2/6/15`` as numbers; None if it is not a rising list of layer indices."""
    try:
        layers = tuple(int(part) for part in text.split("/"))
    except ValueError:
        return None
    return layers if layers[0] >= 0 and all(a < b for a, b in zip(layers, layers[1:], strict=False)) else None


def crop_quotas(sizes: Sequence[int], cap: int) -> list[int]:
    """Tokens that each crop of one image may keep so that the image keeps ``cap``.

    In proportion to the crops' sizes; what rounding down leaves goes to the largest remainders, ties to the earlier
    crop. An image within the cap keeps everything.
    """
    total = sum(sizes)
    if total <= cap:
        return list(sizes)
    quotas = [cap * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda crop: (-(cap * sizes[crop] % total), crop))
    for crop in by_remainder[: cap - sum(quotas)]:
        quotas[crop] += 1
    return quotas


def spaced_layers(spacing: int, num_layers: int) -> tuple[int, ...]:
    """PyramidDrop's layers, one behind each ``spacing`` layers."""
    return tuple(spacing * stage for stage in range(1, STAGES + 1) if spacing * stage < num_layers)


@lru_cache(maxsize=1024)
def plan_stages(count: int, num_layers: int, target: int, layers: tuple[int, ...] | None) -> Mapping[int, int]:
    """Tokens to keep in front of each stage's layer so that the processed mean meets ``target``.

    Args:
        count: tokens in front of the first stage.
        num_layers: layers of the decoder.
        target: wanted mean.
        layers: layers in front of which tokens are dropped; None: PyramidDrop's, moved to the front for small targets.
    """

    def leaving(layers: tuple[int, ...], keep: list[int]) -> list[int]:
        wanted, current, counts = dict(zip(layers, keep, strict=True)), count, []
        for layer in range(num_layers):
            current = wanted.get(layer + 1, current)
            counts.append(current)
        return counts

    def shares(layers: tuple[int, ...], ratio: float) -> list[int]:
        return [max(round(count * ratio**stage), 1) for stage in range(1, len(layers) + 1)]

    def mean(layers: tuple[int, ...], keep: list[int]) -> float:
        return mean_tokens(count, leaving(layers, keep), "processed")

    if layers is None:
        spacing = max(num_layers // (STAGES + 1), 1)
        while (
            spacing > 1
            and mean(spaced_layers(spacing, num_layers), shares(spaced_layers(spacing, num_layers), _RATIO)) > target
        ):
            spacing -= 1
        layers = spaced_layers(spacing, num_layers)
    ratio = nearest_plan(lambda r: leaving(layers, shares(layers, r)), count, target, "processed")
    keep = shares(layers, ratio)
    missing = target - mean(layers, keep)
    keep[-1] = min(max(keep[-1] + round(missing * num_layers / (num_layers - layers[-1])), 1), keep[-2:][0])
    return dict(zip(layers, keep, strict=True))


def _wanted(current: int, wanted: int) -> int:
    return min(current, wanted)


@dataclass(frozen=True)
class PublishedLists:
    """Budgets for which a paper lists the tokens that stay after each of three layers.

    Attributes:
        layers: layers after which tokens are dropped.
        depth: layers of the published decoder.
        tokens: visual tokens of the published prompts.
        lists: tokens that stay after each of the layers, by budget.
    """

    layers: tuple[int, int, int]
    depth: int
    tokens: int
    lists: Mapping[int, tuple[int, int, int]]

    def __hash__(self) -> int:
        return hash((self.layers, self.depth, self.tokens, *self.lists.items()))

    def scaled(self, num_layers: int) -> tuple[int, ...]:
        """The layers at another depth."""
        return scaled_layers(self.layers, self.depth, num_layers)

    @lru_cache(maxsize=1024)  # noqa: B019  a handful of lists, which live as long as the program
    def keep(
        self,
        count: int,
        num_layers: int,
        layers: tuple[int, ...],
        target: int,
        kind: str,
        left: Callable[[int, int], int] = _wanted,
    ) -> tuple[int, ...]:
        """Tokens to keep after each of ``layers``: the published list where there is one, else one in between.

        Args:
            count: tokens in front of the first cut.
            num_layers: layers of the decoder.
            layers: layers after which tokens are dropped.
            target: wanted mean.
            kind: how it is counted; the lists count as ``nominal``.
            left: tokens behind a cut of so many to so many; more than wanted where dropped tokens are merged.
        """
        published = (self.tokens, self.depth, self.layers, "nominal")
        if (count, num_layers, layers, kind) == published and target in self.lists:
            return self.lists[target]
        # A path through the published lists, from one token each to all tokens; its parameter is solved for the mean.
        lists = [self.lists[budget] for budget in sorted(self.lists)]
        knots = np.array([(1, 1, 1), *lists, (self.tokens,) * 3], dtype=float) / self.tokens * count
        stages = np.linspace(0, 2, len(layers)) if len(layers) != 3 else np.arange(3)

        def keep(parameter: float) -> list[int]:
            place = parameter * (len(knots) - 1)
            row = [np.interp(place, np.arange(len(knots)), knots[:, stage]) for stage in range(3)]
            return [max(1, min(round(np.interp(stage, np.arange(3), row)), count)) for stage in stages]

        def plan(parameter: float) -> list[int]:
            wanted, leaving, current = dict(zip(layers, keep(parameter), strict=True)), [], count
            for layer in range(num_layers):
                if layer in wanted:
                    current = left(current, wanted[layer])
                leaving.append(current)
            return leaving

        return tuple(keep(nearest_plan(plan, count, target, kind)))
