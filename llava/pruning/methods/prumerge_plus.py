"""PruMerge+, "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (ICCV 2025,
arXiv 2403.15388).

In front of the projector. *Important* patches are the outliers (above Q3 + 1.5 IQR) of the CLS attention in the last
tower layer, taken as one wide head; evenly spaced patches complete them. To every kept patch the patches with the most
similar keys of that layer are added, weighted with their CLS attention; what is dropped makes one more token, the
weighted sum.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. The
published code has no fixed budget: the outliers' share of all patches (about 5%) decides, and the patches 0, s, 2s, ...
that are none join them, ``s = int(int(1 / share) / 3)``, the last patch left out (about 25% of all tokens). Here
outliers come first too, the strongest ones if the budget is smaller. If that s adds as many patches as the budget has
left, the choice is the published one; otherwise s is the largest stride that adds enough, and of what it adds every so
many are taken. ``spacing=rest`` spaces evenly over the patches that are left instead, at any budget. Crops and images
share the budget in proportion to their patches.

Deviations: raster order (published: by attention, then the added ones); padding patches have no CLS attention; with a
budget of one token there is no extra one. The quartiles interpolate linearly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import VisionReducer
from llava.pruning.selection import on_device, take, top_k
from llava.pruning.vision import Reduction, TowerValue, VisionFact, VisionView, unit_rows


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(VisionReducer):
    """Outliers and evenly spaced patches, merged with their neighbors in key space.

    Attributes:
        neighbors: patches that are added to each kept one.
        spacing: what completes the outliers: patches at a ``stride`` over the whole crop (published), or evenly spaced
            ones of the ``rest``.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    neighbors: int = 32
    spacing: str = "stride"

    name: ClassVar[str] = "prumerge_plus"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("neighbors", self.neighbors >= 0, "must be at least 0")
        self.require("spacing", self.spacing in ("stride", "rest"), "must be 'stride' or 'rest'")

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {
            "cls": VisionFact(TowerValue.WIDE_CLS_ATTENTION, -1),
            "keys": VisionFact(TowerValue.WIDE_KEYS, -1),
        }

    def reduce(self, view: VisionView) -> Reduction:
        tokens, attention = view.tokens_NPC.float(), view.facts["cls"]
        crops, patches, _ = tokens.shape
        extra = int(view.target > 1)
        kept = outliers_and_grid(attention, view.target - extra, self.spacing)
        keys = torch.nn.functional.normalize(view.facts["keys"].float(), dim=2)
        similar = take(keys, kept) @ keys.transpose(1, 2)
        # A patch is no neighbor of itself. Neighbors are added as one product: kept x patches weights.
        similar = similar.scatter(2, kept[:, :, None], -torch.inf)
        nearest = similar.argsort(dim=2, descending=True, stable=True)[:, :, : min(self.neighbors, patches - 1)]
        chosen = torch.zeros_like(similar).scatter_(2, nearest, 1)
        added = chosen * attention[:, None, :]
        merged = take(tokens, kept) + added @ tokens
        origin, source = kept, kept
        if extra:
            rest = attention.scatter(1, kept, 0)
            merged = torch.cat((merged, rest[:, None, :] @ tokens), 1)
            origin = torch.cat((origin, origin.new_full((crops, 1), -1)), 1)
            source = torch.cat((source, source.new_full((crops, 1), patches - 1)), 1)

        def weights() -> Tensor:
            made = added + unit_rows(kept, patches)
            if extra:
                # Without any attention on what is dropped the token is nothing: then all of it alike.
                made = torch.cat((made, rest[:, None] + (rest.sum(1) == 0)[:, None, None]), 1)
            return made / made.sum(2, keepdim=True)

        return Reduction(merged.to(view.tokens_NPC.dtype), origin, source, weights=weights)


def outliers_and_grid(attention_NP: Tensor, keep: int, spacing: str = "stride") -> Tensor:
    """Indices ``[N, keep]``: outliers first, the strongest if there are too many, then evenly spaced patches.

    Their number differs from crop to crop but is never read back: everything follows from ranks.
    """
    crops, patches = attention_NP.shape
    low, high = torch.quantile(attention_NP, on_device([0.25, 0.75], attention_NP.device), dim=1)
    found = (attention_NP > (high + 1.5 * (high - low))[:, None]).sum(1, keepdim=True)
    outliers = found.clamp_max(keep)
    rank = attention_NP.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    important = rank < outliers
    wanted = keep - outliers
    others = ~important & (at_a_stride(important, found, wanted) if spacing == "stride" else ~important)
    # The j-th of R candidates is chosen if j * u / R passes an integer there: u of them, evenly spaced.
    candidates = others.sum(1, keepdim=True).clamp_min(1)
    place = others.long().cumsum(1) - 1
    spaced = ((place + 1) * wanted // candidates > place * wanted // candidates) & others
    chosen = (important | spaced).float()
    return top_k(chosen, [patches] * crops, [keep] * crops)


def at_a_stride(important_NP: Tensor, found_N1: Tensor, wanted_N1: Tensor) -> Tensor:
    """Which patches stand at the published stride, or where it does not add as many as wanted at the largest one that
    adds enough: bool ``[N, P]``.

    Args:
        important_NP: patches that are chosen already; they do not count as added.
        found_N1: how many outliers there are, which gives the published stride.
        wanted_N1: how many patches are to be added.
    """
    patches, device = important_NP.shape[1], important_NP.device
    numbers = torch.arange(patches, device=device)
    # The last patch is never reached, as published; at a stride of 1 all the others are.
    multiples_SP = (numbers % (numbers + 1)[:, None] == 0) & (numbers < patches - 1)
    added_NS = (~important_NP).float() @ multiples_SP.float().T
    # By number of outliers, in the floats of the published code; without any there is no published stride.
    strides = [patches, *(max(int(int(1 / (outliers / patches)) / 3), 1) for outliers in range(1, patches + 1))]
    published_N1 = on_device(strides, device)[found_N1]
    exact = added_NS.gather(1, published_N1 - 1) == wanted_N1
    largest_N1 = ((added_NS >= wanted_N1) * (numbers + 1)).amax(1, keepdim=True).clamp_min(1)
    stride_N1 = torch.where(exact, published_N1, largest_N1)
    return (numbers % stride_N1 == 0) & (numbers < patches - 1)
