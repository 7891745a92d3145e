"""HoloV, "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention" (NeurIPS 2025,
arXiv 2510.02912).

In front of the decoder: the patches of a crop, in raster order, are cut into ``chunks`` pieces (strips of a picture,
not squares). A chunk's score is the mean over its patches of the CLS attention in the selected layer, plus ``alpha``
times the variance of the patch's cosines with the others of the chunk (projected features; the variance is scaled to
the attention's size). Chunks get shares of the budget in proportion to their scores, and inside a chunk the most
attended patches stay.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Crops
and images share the budget in proportion to their patches; the published code makes one sequence of all crops first.

Deviations: where a chunk's share is larger than the chunk, the published code fills up with zero tokens; here the most
attended of the other patches stay. Raster order; the published code leaves patches of a chunk in order of attention.
Padding patches have no CLS attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import VisionReducer
from llava.pruning.selection import on_device
from llava.pruning.vision import CLS_ATTENTION, Reduction, TowerValue, VisionFact, VisionView

_EPS = 1e-6
_ATTENTION = 1000  # what the published code multiplies the attention with


def chunk_sizes(patches: int, chunks: int) -> list[int]:
    """Patches of each chunk: equal, the first ones one more where that does not come out even; none is empty."""
    chunks = min(chunks, patches)
    return [patches // chunks + (chunk < patches % chunks) for chunk in range(chunks)]


def chunk_scores(tokens_NGSC: Tensor, attention_NGS: Tensor, alpha: float) -> Tensor:
    """Scores ``[N, G]`` of chunks of S patches each."""
    size = tokens_NGSC.shape[2]
    if size == 1:
        return attention_NGS[:, :, 0]
    unit = tokens_NGSC / (tokens_NGSC.norm(dim=3, keepdim=True) + _EPS)
    likeness = (unit @ unit.transpose(2, 3)).masked_fill(torch.eye(size, dtype=torch.bool, device=unit.device), 0.0)
    # As published, the patch's likeness to itself counts as 0 in the sum of squares, but not in the number.
    mean = likeness.sum(3, keepdim=True) / (size - 1)
    variance = (likeness - mean).square().sum(3) / (size - 1)
    attention = attention_NGS * _ATTENTION
    scale = attention.abs().mean(2, keepdim=True) / (variance.abs().mean(2, keepdim=True) + _EPS)
    scores: Tensor = (attention + alpha * variance * scale).mean(2)
    return scores


def chunk_quotas(scores_NG: Tensor, target: int) -> Tensor:
    """Shares of the budget ``[N, G]``: rounded down, what that leaves goes one by one to the highest scores."""
    total = scores_NG.sum(1, keepdim=True)
    weights = torch.where(total > 0, scores_NG / total, 1 / scores_NG.shape[1])
    quotas = (weights * target).floor().long()
    rank = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return quotas + (rank < target - quotas.sum(1, keepdim=True)).long()


@dataclass(frozen=True, kw_only=True)
class HoloV(VisionReducer):
    """The most attended patches of every part of the picture.

    Attributes:
        chunks: pieces that a crop is cut into.
        alpha: weight of the variance.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    chunks: int = 16
    alpha: float = 0.09

    name: ClassVar[str] = "holov"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("chunks", self.chunks >= 1, "must be at least 1")
        self.require("alpha", self.alpha >= 0, "must not be negative")

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {CLS_ATTENTION: VisionFact(TowerValue.CLS_ATTENTION)}

    def reduce(self, view: VisionView) -> Reduction:
        attention = view.facts[CLS_ATTENTION].float()
        by_share = self.by_share(view.projected_NPD.float(), attention, view.target)
        # What chunks that are too small leave over goes to the most attended of the rest.
        order = attention.argsort(dim=1, descending=True, stable=True)
        first = by_share.gather(1, order).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        kept = order.gather(1, first)[:, : view.target]
        return Reduction.keep(view.tokens_NPC, kept.sort(dim=1).values)

    def by_share(self, tokens_NPD: Tensor, attention_NP: Tensor, target: int) -> Tensor:
        """Which patches their chunks keep, bool ``[N, P]``: ``target`` or fewer."""
        patches, device = attention_NP.shape[1], attention_NP.device
        sizes = chunk_sizes(patches, self.chunks)
        # At most two sizes of chunks: the larger ones come first.
        scores, start = [], 0
        for size in sorted(set(sizes), reverse=True):
            end = start + size * sizes.count(size)
            pieces = (len(tokens_NPD), -1, size)
            tokens = tokens_NPD[:, start:end].reshape(*pieces, tokens_NPD.shape[2])
            scores.append(chunk_scores(tokens, attention_NP[:, start:end].reshape(pieces), self.alpha))
            start = end
        quotas = chunk_quotas(torch.cat(scores, 1), target)
        # Patches chunk by chunk, the most attended first, and their ranks there.
        chunk = on_device([own for own, size in enumerate(sizes) for _ in range(size)], device)
        rank = on_device([place for size in sizes for place in range(size)], device)
        order = attention_NP.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, chunk[order].argsort(dim=1, stable=True))
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, rank < quotas[:, chunk])
