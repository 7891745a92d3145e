"""SCOPE, "Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs" (NeurIPS 2025).

In front of the projector, greedily: every patch is covered as well as the chosen patch most like it (cosine of the
features in front of the projector, nothing at the start); the next patch is the one that adds most coverage, times its
CLS attention in the selected layer. Raster order.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Crops
and images share the budget in proportion to their patches.

Deviations: padding patches have no CLS attention and are chosen last; the ablation that adds the attention instead of
multiplying with it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.coverage import coverage_order
from llava.pruning.method import VisionReducer
from llava.pruning.vision import CLS_ATTENTION, Reduction, TowerValue, VisionFact, VisionView


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
        similarity = unit @ unit.transpose(1, 2)
        order = coverage_order(similarity, view.target, factor_NP=saliency, chosen_need_none=True)
        return Reduction.keep(view.tokens_NPC, order.sort(dim=1).values)
