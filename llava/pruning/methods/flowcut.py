"""FlowCut, "Rethinking Redundancy via Information Flow for Efficient Vision-Language Models" (NeurIPS 2025, arXiv
2505.19536), inside the vision tower.

Every layer scores the patches: attention of CLS plus the softmax of the products of CLS's value and theirs (heads
averaged, both divided by their sums), times the L1 norm of the patch's value. Old scores count as much as the new one.
After every second layer some patches are dropped, the more, the fewer layers are left and the less even the attention
of CLS is: ``(n - T) / sqrt(left) * (1 - (entropy / ln n)^2)`` of n. After the last but one layer T are left.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Crops
and images share the budget in proportion to their patches (the paper gives each crop the same).

Deviations: the published code drops equally many patches of all pictures of a batch, the largest number that one of
them wants; here every picture has its own. As they differ, patches that are dropped are hidden from attention until the
last cut, and the tower is not faster for it. The second stage for LLaVA-1.6, inside the decoder, is left out. In towers
of one layer the cut is behind it. Inside the tower unpadding (LLaVA-1.6) does not take place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import TowerMerger
from llava.pruning.scores import attention_rows
from llava.pruning.vision import TowerHide, TowerKeep, TowerView


def flow_scores(attention_NP: Tensor, semantic_NP: Tensor, value_NPD: Tensor) -> Tensor:
    """Scores of one layer: relation of the patches to CLS by attention and by values, times the size of their values.

    Args:
        attention_NP: attention of CLS, mean over heads.
        semantic_NP: softmax of the products of values, mean over heads.
        value_NPD: values, mean over heads.
    """
    relation = sum_to_one(attention_NP) + sum_to_one(semantic_NP)
    scores: Tensor = relation * value_NPD.float().abs().sum(2)
    return scores


def sum_to_one(values_NP: Tensor) -> Tensor:
    """Rows divided by their sums."""
    return values_NP / values_NP.sum(1, keepdim=True)


def to_drop(attention_NP: Tensor, counts_N: Tensor, target: int, layers_left: int) -> Tensor:
    """How many patches to drop, ``[N]`` int64.

    Args:
        attention_NP: attention of CLS, 0 for patches that are gone.
        counts_N: patches that are there.
        target: patches that shall be left in the end.
        layers_left: at least 1.
    """
    shares = sum_to_one(attention_NP)
    entropy = -torch.xlogy(shares, shares).sum(1)
    even = entropy / counts_N.clamp_min(2).log()  # of a single patch nothing can be dropped
    dropped: Tensor = (counts_N - target) / layers_left**0.5 * (1 - even.square())
    return dropped.round().long().clamp_min(0)


@dataclass(frozen=True, kw_only=True)
class FlowCut(TowerMerger):
    """Drop patches layer by layer, by the flow of information to CLS."""

    target_tokens: int | None = 64
    positions: str = "compact"

    name: ClassVar[str] = "flowcut"

    def merge(self, view: TowerView) -> TowerHide | TowerKeep | None:
        if view.sizes_NT.shape[1] - 1 <= view.target:
            return None
        # 1. Scores of the patches that are there.
        there = view.sizes_NT > 0
        mask = there[:, None, None] if hasattr(view.memory, "hides") else None
        attention = attention_rows(view.query_NHTD[:, :, :1], view.key_NHTD, view.scaling, mask).mean(1)[:, 0, 1:]
        semantic = attention_rows(view.value_NHTD[:, :, :1], view.value_NHTD, 1.0, mask).mean(1)[:, 0, 1:]
        score = flow_scores(attention, semantic, view.value_NHTD.float().mean(1)[:, 1:])
        counts = there[:, 1:].sum(1)
        before = getattr(view.memory, "score", None)
        if before is not None:
            # A picture that is down to its budget already is done.
            score = torch.where(counts[:, None] > view.target, (before + score) / 2, before)
        view.memory.score = score
        # 2. How many stay after this layer.
        left = view.layers - 2 - view.layer
        if left > 0 and left % 2:
            return None
        order = score.masked_fill(~there[:, 1:], -torch.inf).argsort(dim=1, descending=True, stable=True)
        if left <= 0:
            kept = order[:, : view.target].sort(dim=1).values + 1
            return TowerKeep(torch.cat((torch.zeros_like(kept[:, :1]), kept), dim=1))
        keep = (counts - to_drop(attention, counts, view.target, left)).clamp_min(view.target)
        rank = torch.arange(order.shape[1], device=order.device)
        view.memory.hides = True
        hide = torch.zeros_like(there)
        hide[:, 1:] = torch.zeros_like(hide[:, 1:]).scatter(1, order, rank >= keep[:, None])
        return TowerHide(hide)
