"""Recycling of dropped tokens, shared by SparseVLM and AutoPrune: the better part of them is merged, not lost."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from llava.pruning.base import LayerView, Selection
from llava.pruning.retention import PruneStep
from llava.pruning.selection import (
    counts_to_mask,
    density_peaks,
    descending_order,
    first_in_sequence_order,
    merge_all,
    merge_clusters,
    on_device,
)


def keep_and_recycle(
    view: LayerView, scores_BV: Tensor, steps: Sequence[PruneStep], memory: SimpleNamespace
) -> Selection:
    """Keep the tokens with the highest scores; cluster the next ones (DPC-kNN) and append the cluster means.

    Args:
        view: the layer.
        scores_BV: a score per visual token.
        steps: per row how many are kept, how many recycled, and into how many tokens.
        memory: the method's; its report counts the multiply-adds of merging as ``merge_flops``.
    """
    order_BV = descending_order(scores_BV, view.counts)
    keep = tuple(step.keep for step in steps)
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
    else:
        peaks = density_peaks(tokens, clusters, recycled)
        merged = merge_clusters(tokens, peaks.assignment_BM, max(clusters), recycled)
        source = candidates.gather(1, peaks.centers_BK)
    if min(clusters) < max(clusters):
        source = source.masked_fill(~counts_to_mask(clusters, max(clusters), view.device), order_BV.shape[1])
    for row, step in enumerate(steps):
        compared = step.recycled if step.merged > 1 else 0  # a single cluster is not searched for
        costs[row] += (compared + step.merged) * step.recycled * tokens.shape[2]
    return Selection(kept, keep, merged, tuple(clusters), source)


def _behind(order_BV: Tensor, keep: tuple[int, ...], width: int) -> Tensor:
    """``width`` entries of each order behind the first ``keep[i]``, ``[B, width]``; past the end the last one again."""
    if len(keep) == 1:
        return order_BV[:, keep[0] : keep[0] + width]
    ranks = on_device(keep, order_BV.device)[:, None] + torch.arange(width, device=order_BV.device)
    return order_BV.gather(1, ranks.clamp_max(order_BV.shape[1] - 1))
