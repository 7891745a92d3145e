"""ZOO-Prune, "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models" (CVPR 2026).

In front of the decoder: a patch is sensitive if the projector's output changes much when the patch is moved a little in
random directions (mean norm of central differences). Patches are chosen greedily, the most sensitive first, then always
the one whose sensitivity (0..1 over the crop) times its distance to the nearest chosen patch (one minus the cosine of
projected features) is largest. Raster order.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target (the
paper gives a ratio of the visual tokens). Crops and images share the budget in proportion to their patches.

The probe asks the projector for all patches of a crop twice per direction, in the projector's own type, as published.

Deviations: for LLaVA-1.6 the published code probes a projector of low rank, here it is the projector itself. Directions
are drawn by a seed of their own and are the same for all pictures. Where the projector is out of sight (a bare decoder,
models of transformers) or is linear, all patches are equally sensitive, and only their distances count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.diversity import weighted_order
from llava.pruning.engine.notices import say
from llava.pruning.method import VisionReducer
from llava.pruning.vision import Reduction, VisionView


def sensitivity(tokens_NPC: Tensor, project: Callable[[Tensor], Tensor], directions_MC: Tensor, step: float) -> Tensor:
    """How much the projected patches change, ``[N, P]``, float32.

    Args:
        tokens_NPC: patches.
        project: the projector.
        directions_MC: of any length; they are normalized here.
        step: how far the patches are moved, to both sides.
    """
    total = tokens_NPC.new_zeros(tokens_NPC.shape[:2], dtype=torch.float32)
    # One after another: side by side they would need as many times the memory of the projected features.
    for direction in torch.nn.functional.normalize(directions_MC.float(), dim=1) * step:
        moved = project(tokens_NPC.float() + direction).float() - project(tokens_NPC.float() - direction).float()
        total += moved.norm(dim=2)
    return total / (2 * step * len(directions_MC))


def zero_to_one(values_NP: Tensor) -> Tensor:
    """Rows between their smallest and their largest value; 1 where all are equal."""
    low, high = values_NP.aminmax(dim=1, keepdim=True)
    # Differences that float32 makes of equal values are none.
    equal = high - low <= high.abs() * 1e-5
    return torch.where(equal, 1.0, (values_NP - low) / (high - low))


@dataclass(frozen=True, kw_only=True)
class ZOOPrune(VisionReducer):
    """Sensitive patches that are unlike each other.

    Attributes:
        directions: random directions of the probe (m in the paper).
        step: how far patches are moved (h in the paper).
        seed: of the directions.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    directions: int = 64
    step: float = 0.01
    seed: int = 0

    name: ClassVar[str] = "zooprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("directions", self.directions >= 1, "must be at least 1")
        self.require("step", self.step > 0, "must be above 0")

    def reduce(self, view: VisionView) -> Reduction:
        if view.project is None:
            say(self.name, "the projector is out of sight here, so all patches are taken as equally sensitive")
            weight = torch.ones(view.tokens_NPC.shape[:2], device=view.tokens_NPC.device)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(self.directions, view.tokens_NPC.shape[2], generator=generator)
            drawn = drawn.to(view.tokens_NPC.device, non_blocking=True)
            weight = zero_to_one(sensitivity(view.tokens_NPC, view.project, drawn, self.step))
        order = weighted_order(view.projected_NPD, weight, None, view.target)
        return Reduction.keep(view.tokens_NPC, order.sort(dim=1).values)
