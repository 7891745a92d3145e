"""A budget for every picture of a prompt: how a selection is shared out among its views.

Text attention favors pictures near the question and can empty whole views. With shares every view keeps its part of
each selection, ``floor(share * kept)`` tokens, the best of its own. What rounding leaves over goes to the best of all,
and so does what a view cannot fill. Merged tokens show no single view: they compete with all, and what they do not take
is shared out.

Shapes: B batch rows, V visual tokens (padded), G views.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.pruning.selection import descending_order, on_device
from llava.pruning.types import OptionError, UnsupportedError

JOINT, EQUAL = "joint", "equal"
_PARTS = 1_000_000
"""Shares are whole numbers of so many parts: quotas are exact on every device."""

ViewBudget = str | tuple[float, ...]
"""``joint``, ``equal``, or a share per view."""


def read_view_budget(value: Any) -> ViewBudget:
    """The option of a method: ``joint``, ``equal``, shares, or a file of shares (a JSON list, or numbers).

    Raises:
        OptionError: it is none of them, or shares are negative or all 0.
    """
    if value in (JOINT, EQUAL):
        return str(value)
    shares = _read(value) if isinstance(value, str) else value
    try:
        numbers = tuple(float(share) for share in shares)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(0 <= share < float("inf") for share in numbers) or sum(numbers) <= 0:
        raise OptionError(
            f"view_budget must be {JOINT}, {EQUAL} or a file with a number of at least 0 per view, got {value!r}"
        )
    return numbers


@lru_cache(maxsize=64)
def _read(path: str) -> tuple[Any, ...]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise OptionError(
            f"view_budget: {JOINT}, {EQUAL} or a file of shares; {path} cannot be read ({reason})"
        ) from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = re.split(r"[\s,]+", text.strip())
    return tuple(found) if isinstance(found, list) else (found,)


def parts_of(budget: ViewBudget, views: int) -> list[int]:
    """Whole numbers in proportion to the shares of ``views`` views.

    Raises:
        UnsupportedError: shares were given for another number of views.
    """
    if budget == EQUAL:
        return [1] * views
    if len(budget) != views:
        raise UnsupportedError(f"view_budget has {len(budget)} shares, and a prompt has {views} images")
    whole = sum(float(share) for share in budget)
    return [round(_PARTS * float(share) / whole) for share in budget]


@dataclass(frozen=True)
class Views:
    """Of each visual token the view it is part of, ``[B, V]`` (G for padding and merged tokens), and the parts of each
    view, ``[B, G + 1]`` (0 for the last).
    """

    view_BV: Tensor
    parts_BG: Tensor

    @classmethod
    def of(cls, budget: ViewBudget, sizes: Sequence[Sequence[int]], origins_BV: Tensor) -> Views:
        """sizes: per row the visual tokens that each view had in the prompt; origins: -1 for merged tokens."""
        parts = [parts_of(budget, len(row)) if row else [] for row in sizes]
        most, width = max(map(len, sizes)), max(map(sum, sizes))
        labels = [[view for view, size in enumerate(row) for _ in range(size)] for row in sizes]
        # One view more than any row has: it takes the padding and merged tokens, and has no part.
        device = origins_BV.device
        labels_BN = on_device([row + [most] * (width + 1 - len(row)) for row in labels], device)
        parts_BG = on_device([row + [0] * (most + 1 - len(row)) for row in parts], device)
        origins = torch.where(origins_BV < 0, width, origins_BV.clamp_max(width))
        return cls(labels_BN.gather(1, origins), parts_BG)

    def quotas(self, kept_B: Tensor) -> Tensor:
        """Tokens that each view keeps of so many per row, rounded down: ``[B, G + 1]``."""
        return kept_B[:, None] * self.parts_BG // self.parts_BG.sum(1, keepdim=True).clamp_min(1)

    def ranked(self, scores_BV: Tensor, counts: Sequence[int], keep: Sequence[int]) -> Tensor:
        """Scores with which the ``keep[i]`` best are the best of each view, as many as its quota says."""
        order_BV = descending_order(scores_BV, counts)
        place_BV = order_BV.argsort(dim=1)
        keep_B = on_device(list(keep), scores_BV.device)
        merged_BV = (self.view_BV == self.parts_BG.shape[1] - 1) & (place_BV < keep_B[:, None])
        quotas_BG = self.quotas(keep_B - merged_BV.sum(1))
        return first_of_groups(order_BV, self.view_BV, quotas_BG, merged_BV)


def first_of_groups(order_BV: Tensor, group_BV: Tensor, quotas_BG: Tensor, also_BV: Tensor | None = None) -> Tensor:
    """Scores that put the first tokens of every group, in an order, in front of all others: float ``[B, V]``.

    Args:
        order_BV: indices of the tokens, best first.
        group_BV: the group of each token.
        quotas_BG: how many of a group come first.
        also_BV: tokens that come first whatever their group, True; they do not count in it.
    """
    sorted_BV = group_BV.gather(1, order_BV)
    groups = torch.arange(quotas_BG.shape[1], device=order_BV.device)
    # Rank within the group: tokens of the same group that come earlier in the order.
    ranks_BGV = (sorted_BV[:, None, :] == groups[:, None]).long().cumsum(2) - 1
    place_BV = order_BV.argsort(dim=1)
    rank_BV = ranks_BGV.gather(1, sorted_BV[:, None, :])[:, 0].gather(1, place_BV)
    first_BV = rank_BV < quotas_BG.gather(1, group_BV)
    if also_BV is not None:
        first_BV = first_BV | also_BV
    return (first_BV * order_BV.shape[1] - place_BV).float()
