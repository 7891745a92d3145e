"""From a budget to the tokens of each layer, for methods with more than one stage (plain numbers, no tensors).

Two ways to count: *nominal* charges a layer with the visual tokens that leave it, *processed* with those that enter it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

BUDGETS = ("nominal", "processed")
_STEPS = 50


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
