"""VisPruner, "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (ICCV 2025,
arXiv 2412.01818 v2).

In front of the projector, two parts: *important* patches by the CLS attention of the selected layer, and *diverse*
ones: of the remaining patches, in order of attention, every second one is compared with the others, and the eight that
are most like one of them (cosine of the features in front of the projector) go, until the rest of the budget is left.
Raster order.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Crops
and images share the budget in proportion to their patches.

Deviations: an odd number of remaining patches works (the published code fails there); padding patches have no CLS
attention; equal patches keep their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import VisionReducer
from llava.pruning.selection import take
from llava.pruning.vision import CLS_ATTENTION, Reduction, TowerValue, VisionFact, VisionView

_DROPPED = 8  # per round, as published


def diverse_order(similarity_NPP: Tensor, order_NR: Tensor, keep: int) -> Tensor:
    """The ``keep`` patches of ``order_NR`` that are left when the most similar ones have gone: ``[N, keep]``.

    Args:
        similarity_NPP: cosine of every pair of patches.
        order_NR: indices of patches, the most attended first.
        keep: how many stay; 0 for none.
    """
    if keep == 0:
        return order_NR[:, :0]
    left = order_NR
    while left.shape[1] > keep:
        first, second = left[:, ::2], left[:, 1::2]
        rows = take(similarity_NPP, first)
        likeness = rows.gather(2, second[:, None].expand(-1, first.shape[1], -1)).amax(2)
        ranked = first.gather(1, likeness.argsort(dim=1, descending=True, stable=True))
        left = torch.cat((ranked[:, min(_DROPPED, left.shape[1] - keep) :], second), dim=1)
    return left


@dataclass(frozen=True, kw_only=True)
class VisPruner(VisionReducer):
    """Important and diverse patches.

    Attributes:
        important_ratio: share of the budget for the patches with the highest CLS attention (rounded down).
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    important_ratio: float = 0.5

    name: ClassVar[str] = "vispruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("important_ratio", 0 <= self.important_ratio <= 1, "must lie in 0..1")

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {CLS_ATTENTION: VisionFact(TowerValue.CLS_ATTENTION)}

    def reduce(self, view: VisionView) -> Reduction:
        order = view.facts[CLS_ATTENTION].argsort(dim=1, descending=True, stable=True)
        count = int(view.target * self.important_ratio)
        unit = torch.nn.functional.normalize(view.tokens_NPC.float(), dim=2)
        # One product for all rounds: they only pick from it.
        diverse = diverse_order(unit @ unit.transpose(1, 2), order[:, count:], view.target - count)
        kept = torch.cat((order[:, :count], diverse), dim=1).sort(dim=1).values
        return Reduction.keep(view.tokens_NPC, kept)
