"""Recycling of dropped tokens, shared by SparseVLM and AutoPrune: the better part of them is merged, not lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.pruning.base import LayerView, Selection
from llava.pruning.retention import PruneStep
from llava.pruning.selection import (
    counts_to_mask,
    density_peaks,
    first_in_sequence_order,
    merge_clusters,
    on_device,
)


def keep_and_recycle(view: LayerView, order_BV: Tensor, steps: Sequence[PruneStep]) -> tuple[Selection, list[int]]:
    """Keep the first tokens of an order; cluster the next ones (DPC-kNN) and append the cluster means.

    Args:
        view: the layer.
        order_BV: visual tokens by falling score.
        steps: per row how many are kept, how many recycled, and into how many tokens.

    Returns:
        The selection, and the multiply-adds of merging per row.
    """
    keep = tuple(step.keep for step in steps)
    kept = first_in_sequence_order(order_BV, keep)
    recycled = [step.recycled for step in steps]
    if max(recycled) == 0:
        return Selection(kept, keep), [0] * len(steps)

    # The recycled tokens follow the kept ones in the order; they are merged from the layer's output.
    candidates = _behind(order_BV, keep, max(recycled))
    tokens = view.hidden_of(candidates)
    clusters = [step.merged for step in steps]
    peaks = density_peaks(tokens, clusters, recycled)
    merged = merge_clusters(tokens, peaks.assignment_BM, max(clusters), recycled)
    source = candidates.gather(1, peaks.centers_BK)
    if min(clusters) < max(clusters):
        source = source.masked_fill(~counts_to_mask(clusters, max(clusters), view.device), order_BV.shape[1])
    flops = [(step.recycled + step.merged) * step.recycled * tokens.shape[2] for step in steps]
    return Selection(kept, keep, merged, tuple(clusters), source), flops


def _behind(order_BV: Tensor, keep: tuple[int, ...], width: int) -> Tensor:
    """``width`` entries of each order behind the first ``keep[i]``, ``[B, width]``; past the end the last one again."""
    if len(keep) == 1:
        return order_BV[:, keep[0] : keep[0] + width]
    ranks = on_device(keep, order_BV.device)[:, None] + torch.arange(width, device=order_BV.device)
    return order_BV.gather(1, ranks.clamp_max(order_BV.shape[1] - 1))
