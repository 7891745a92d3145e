"""Recycling of dropped tokens, shared by SparseVLM and AutoPrune: the better part of them is merged, not lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from llava.pruning.draws import uniform_draws
from llava.pruning.engine.view import LayerView
from llava.pruning.selection import (
    counts_to_mask,
    density_peaks,
    descending_order,
    first_in_sequence_order,
    merge_all,
    merge_clusters,
    on_device,
)
from llava.pruning.types import Selection


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
    """What happens where ``keep`` of so many tokens stay.

    Args:
        visual_tokens: tokens entering the decision.
        keep: tokens to keep; clamped to 0..``visual_tokens``.
        recycle_fraction: share of the dropped tokens that is recycled; 0 switches recycling off.
    """
    keep = max(min(keep, visual_tokens), 0)
    return PruneStep(keep, *_recycled_and_merged(visual_tokens - keep, recycle_fraction))


def tokens_leaving(
    visual_tokens: int, keep: Iterable[int], recycle_fraction: float = 0.3, *, clamp: bool = True
) -> list[int]:
    """Visual tokens leaving each of several layers in a row, merged ones included: the one walk along a schedule.

    Args:
        visual_tokens: tokens entering the first of them.
        keep: tokens to keep after each.
        recycle_fraction: see :func:`prune_step`.
        clamp: what a run does: no layer keeps more than it has. Without it a layer gains the difference, as in the
            estimate of the published code (Python's ``int()`` and ``//`` of negative numbers as there).
    """
    counts = []
    for wanted in keep:
        if clamp:
            wanted = max(min(wanted, visual_tokens), 0)
        visual_tokens = wanted + _recycled_and_merged(visual_tokens - wanted, recycle_fraction)[1]
        counts.append(visual_tokens)
    return counts


def _recycled_and_merged(dropped: int, recycle_fraction: float) -> tuple[int, int]:
    """Of the dropped tokens ``int(0.3 d) + 1`` are merged into a tenth as many (at least one)."""
    if dropped == 0 or recycle_fraction == 0:
        return 0, 0
    recycled = int(recycle_fraction * dropped) + 1
    return recycled, min(recycled // 10 + 1, recycled)


def keep_and_recycle(
    view: LayerView,
    scores_BV: Tensor,
    steps: Sequence[PruneStep],
    memory: SimpleNamespace,
    noise_seed: int | None = None,
) -> Selection:
    """Keep the tokens with the highest scores; cluster the next ones (DPC-kNN) and append the cluster means.

    Args:
        view: the layer.
        scores_BV: a score per visual token.
        steps: per row how many are kept, how many recycled, and into how many tokens.
        memory: the method's; its report counts the multiply-adds of merging as ``merge_flops``.
        noise_seed: draw the noise of the published clustering, which parts tokens that tie for the highest density,
            see :func:`~llava.pruning.selection.density_peaks`; None: no noise.
    """
    keep = tuple(step.keep for step in steps)
    order_BV = descending_order(view.shared_out(scores_BV, keep), view.counts)
    kept = first_in_sequence_order(order_BV, keep)
    costs = memory.report.setdefault("merge_flops", [0] * len(steps))
    recycled = [step.recycled for step in steps]
    if max(recycled) == 0:
        return Selection(kept, keep)

    # The recycled tokens follow the kept ones in the order; they are merged from the layer's output.
    candidates = _behind(order_BV, keep, max(recycled))
    tokens = view.hidden_of(candidates)
    clusters = [step.merged for step in steps]
    if max(clusters) == 1:
        merged, source = merge_all(tokens, recycled), candidates[:, :1]
        assignment = torch.zeros_like(candidates)
    else:
        noise = None if noise_seed is None else uniform_draws(view, noise_seed, recycled)
        memory.effects |= set() if noise_seed is None else {"noise_seed"}
        peaks = density_peaks(tokens, clusters, recycled, noise)
        assignment = peaks.assignment_BM
        merged = merge_clusters(tokens, assignment, max(clusters), recycled)
        source = candidates.gather(1, peaks.centers_BK)
    if min(clusters) < max(clusters):
        source = source.masked_fill(~counts_to_mask(clusters, max(clusters), view.device), order_BV.shape[1])
    for row, step in enumerate(steps):
        compared = step.recycled if step.merged > 1 else 0  # a single cluster is not searched for
        costs[row] += (compared + step.merged) * step.recycled * tokens.shape[2]

    device = view.device  # asked later, when the hidden states of the view should be gone

    def weights() -> Tensor:
        # The cluster means of unit vectors.
        members = counts_to_mask(recycled, candidates.shape[1], device)[:, :, None]
        unit = torch.nn.functional.one_hot(candidates.clamp_max(order_BV.shape[1] - 1), order_BV.shape[1]).float()
        return merge_clusters(unit * members, assignment, max(clusters), recycled)

    return Selection(kept, keep, merged, tuple(clusters), source, weights)


def _behind(order_BV: Tensor, keep: tuple[int, ...], width: int) -> Tensor:
    """``width`` entries of each order behind the first ``keep[i]``, ``[B, width]``; past the end the last one again."""
    if min(keep) == max(keep):
        return order_BV[:, keep[0] : keep[0] + width]
    ranks = on_device(keep, order_BV.device)[:, None] + torch.arange(width, device=order_BV.device)
    return order_BV.gather(1, ranks.clamp_max(order_BV.shape[1] - 1))
