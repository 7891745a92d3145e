"""SCOPE, "Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs" (NeurIPS 2025).

In front of the projector, greedily: every patch is covered as well as the chosen patch most like it (cosine of the
features in front of the projector, nothing at the start); the next patch is the one that adds most coverage, times its
CLS attention in the selected layer. Raster order.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Crops
and images share the budget in proportion to their patches.

Deviations: padding patches have no CLS attention and are chosen last; the ablation that adds the attention instead of
multiplying with it is left out. A step looks at every pair of patches, as its definition wants, so the cost is the
number of kept tokens times the square of the patches (64 of 576: 21 million additions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import VisionReducer
from llava.pruning.vision import CLS_ATTENTION, Reduction, TowerValue, VisionFact, VisionView


def coverage_order(similarity_NPP: Tensor, saliency_NP: Tensor, picks: int) -> Tensor:
    """Patches in the order in which they are chosen, ``[N, picks]``.

    Args:
        similarity_NPP: how well each patch (last axis) is covered by another.
        saliency_NP: what the added coverage of a patch is multiplied with.
        picks: how many.
    """
    crops, patches = saliency_NP.shape
    covered = similarity_NPP.new_zeros(crops, patches)
    chosen = torch.zeros(crops, patches, dtype=torch.bool, device=similarity_NPP.device)
    order = torch.empty(crops, picks, dtype=torch.long, device=similarity_NPP.device)
    row = torch.arange(crops, device=similarity_NPP.device)
    for step in range(picks):
        added = (similarity_NPP - covered[:, None]).clamp_min(0)
        # A patch that is chosen needs no cover.
        gain = added.masked_fill(chosen[:, None], 0.0).sum(2) * saliency_NP
        best = gain.masked_fill(chosen, float("-inf")).argmax(1)
        order[:, step] = best
        chosen[row, best] = True
        covered = torch.maximum(covered, similarity_NPP[row, best])
    return order


@dataclass(frozen=True, kw_only=True)
class Scope(VisionReducer):
    """Coverage weighted with saliency.

    Attributes:
        alpha: exponent of the CLS attention.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    alpha: float = 1.0

    name: ClassVar[str] = "scope"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("alpha", self.alpha >= 0, "must not be negative")

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {CLS_ATTENTION: VisionFact(TowerValue.CLS_ATTENTION)}

    def reduce(self, view: VisionView) -> Reduction:
        unit = torch.nn.functional.normalize(view.tokens_NPC.float(), dim=2)
        saliency = view.facts[CLS_ATTENTION].float() ** self.alpha
        order = coverage_order(unit @ unit.transpose(1, 2), saliency, view.target)
        return Reduction.keep(view.tokens_NPC, order.sort(dim=1).values)
