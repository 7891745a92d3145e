"""HiPrune, "Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models"
(arXiv 2508.00553).

In front of the projector, by the attention that patches *receive* in the vision tower (mean over heads and over all
tokens): *anchors* are the best in a middle layer, *buffers* their four neighbors, *registers* the best of the selected
(deep) layer among the rest. Raster order.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Anchors
are ``round(target * alpha / 5)``. Crops and images share the budget in proportion to their patches.

As published, neighbors are index +-1 and +-width, clamped to the crop: a neighbor at the border of a row may lie in the
next row. Deviations: the middle layer is layer 9 of 24, scaled to other depths; padding patches receive no attention;
patches that the prompt leaves out (unpadded crops) are no buffers; should anchors and buffers exceed the budget (a
large ``alpha``), anchors go first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.method import VisionReducer
from llava.pruning.selection import on_device, top_k
from llava.pruning.vision import Reduction, TowerValue, VisionFact, VisionView

_MIDDLE, _DEPTH = 9, 24


@dataclass(frozen=True, kw_only=True)
class HiPrune(VisionReducer):
    """Anchors, buffers and registers.

    Attributes:
        alpha: share of the budget for anchors and buffers together.
        object_layer: layer of the tower that ranks the anchors, counted from 1; None: 9 of 24.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    alpha: float = 0.1
    object_layer: int | None = None

    name: ClassVar[str] = "hiprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("alpha", 0 <= self.alpha <= 1, "must lie in 0..1")
        self.require("object_layer", self.object_layer is None or self.object_layer >= 1, "must be at least 1")

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        layer = self.object_layer or max(round(tower_layers * _MIDDLE / _DEPTH), 1)
        return {
            "object": VisionFact(TowerValue.RECEIVED_ATTENTION, layer - 1),
            "deep": VisionFact(TowerValue.RECEIVED_ATTENTION),
        }

    def reduce(self, view: VisionView) -> Reduction:
        crops, patches = view.patches_NP.shape
        counts = [patches] * crops
        width, height = view.grid
        whole = width * height
        anchors = top_k(view.facts["object"], counts, [round(view.target * self.alpha / 5)] * crops)
        # Neighbors count the raster of the whole crop; the view may lack some of its patches.
        places = view.patches_NP.gather(1, anchors)
        raster = view.is_raster(self.name, "neighbors are those before and behind")
        offsets = on_device([1, -1, width, -width] if raster and height > 1 else [1, -1], places.device)
        neighbors = (places[:, :, None] + offsets).clamp(0, whole - 1).flatten(1)
        is_buffer = torch.zeros(crops, whole, dtype=torch.bool, device=places.device).scatter_(1, neighbors, True)
        # 2: anchors, 1: buffers, 0: the rest, for which (and for equals) the deep layer decides.
        rank = is_buffer.gather(1, view.patches_NP).long().scatter_(1, anchors, 2)
        deep = view.facts["deep"].argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        score = rank * (patches + 1) - deep
        return Reduction.keep(view.tokens_NPC, top_k(score.double(), counts, [view.target] * crops))
