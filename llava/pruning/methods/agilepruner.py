"""AgilePruner, attention and diversity balanced by the effective rank (ICLR 2026, arXiv 2603.01236).

In front of the projector: patches are walked in the order of the CLS attention of the selected layer. A patch that is
still there is kept, and those whose cosine distance to it (features in front of the projector) is below a threshold go.
The threshold grows with the patch's rank, ``rank * 0.01``, times the *effective rank* of the picture's features over
that of an average picture, up to a limit: the more complex a picture, the more diverse what is kept. Raster order.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Crops
and images share the budget in proportion to their patches.

No code is public; this is built from the project page. What it does not say, and what is done here:

- the effective rank of an average picture: ``average_rank`` has to be given to make thresholds adaptive (the mean of
  :func:`effective_rank` over pictures of the model's tower); without it every picture counts as average;
- the limit of the threshold: 0.3, our guess (``most``);
- ranks count from 1, over all patches; singular values are normalized to their sum, features are not centered;
- a walk that ends before the budget is met is filled up with the patches of the highest attention.

Padding patches have no CLS attention: they come last. On a GPU the host waits for the eigenvalues behind the effective
rank, and only for them.
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


def effective_rank(tokens_NPC: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values, normalized to their sum: float64 ``[N]``, 1 to min(P, C)."""
    rows = tokens_NPC.double()
    if rows.shape[1] > rows.shape[2]:
        rows = rows.transpose(1, 2)
    # Singular values are the roots of the smaller Gram matrix's eigenvalues.
    values = torch.linalg.eigvalsh(rows @ rows.transpose(1, 2)).clamp_min(0).sqrt()
    shares = values / values.sum(1, keepdim=True)
    rank: Tensor = torch.special.entr(shares).sum(1).exp()
    return rank


def diverse_walk(distance_NPP: Tensor, order_NP: Tensor, thresholds_NP: Tensor, picks: int) -> Tensor:
    """Patches as they are kept, ``[N, picks]``, and behind them those that went, in the order of the walk.

    Args:
        distance_NPP: distance of every pair of patches.
        order_NP: the walk.
        thresholds_NP: by place in the walk, how near patches must be to go.
        picks: how many; above 0.
    """
    crops, patches = order_NP.shape
    # Everything in the order of the walk: the next patch is the first that is left.
    distance = take(distance_NPP, order_NP)
    distance = distance.gather(2, order_NP[:, None].expand(-1, patches, -1))
    row = torch.arange(crops, device=order_NP.device)
    left = torch.ones(crops, patches, dtype=torch.bool, device=order_NP.device)
    kept = torch.zeros_like(left)
    for _ in range(picks):
        # Where nothing is left, the first that went.
        best = torch.where(kept, 0, 1 + left.to(torch.uint8)).argmax(1)
        kept[row, best] = True
        left = left & ~kept & (distance[row, best] >= thresholds_NP.gather(1, best[:, None]))
    places = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :picks]
    return order_NP.gather(1, places)


@dataclass(frozen=True, kw_only=True)
class AgilePruner(VisionReducer):
    """Attention first, as diverse as the picture is complex.

    Attributes:
        step: growth of the threshold from rank to rank.
        most: limit of the threshold.
        average_rank: effective rank of an average picture; None: thresholds are the same for all pictures.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    step: float = 0.01
    most: float = 0.3
    average_rank: float | None = None

    name: ClassVar[str] = "agilepruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("step", self.step >= 0, "must not be negative")
        self.require("most", self.most >= 0, "must not be negative")
        self.require("average_rank", self.average_rank is None or self.average_rank > 0, "must be above 0")

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {CLS_ATTENTION: VisionFact(TowerValue.CLS_ATTENTION)}

    def reduce(self, view: VisionView) -> Reduction:
        crops, patches = view.tokens_NPC.shape[:2]
        order = view.facts[CLS_ATTENTION].argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(1, patches + 1, device=order.device).expand(crops, -1)
        complexity = 1.0 if self.average_rank is None else effective_rank(view.tokens_NPC)[:, None] / self.average_rank
        thresholds = (ranks * self.step * complexity).clamp_max(self.most)
        unit = torch.nn.functional.normalize(view.tokens_NPC.float(), dim=2)
        kept = diverse_walk(1 - unit @ unit.transpose(1, 2), order, thresholds.float(), view.target)
        return Reduction.keep(view.tokens_NPC, kept.sort(dim=1).values)
