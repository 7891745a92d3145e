"""ToMe, "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461), in the vision tower of LLaVA.

In every layer of the tower, between attention and MLP: tokens alternate between two sets; every token of the first is
linked to the most similar of the second (cosine of the keys, mean over heads), and the strongest links are merged into
means weighted by size. CLS is never merged. Attention is proportional: the logarithm of the size is added to its
logits, so a merged token counts for all its patches.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Every
layer merges the same number, as in the paper, the smallest with which the tower ends at the budget, and the last ones
what is left to merge: from 576 tokens to 192 in 23 layers, 17 in each and 10 in the last. A layer can at most halve the
tokens; where halving in every layer is not enough (towers of few layers), the last one merges in several rounds. Crops
and images share the budget in proportion to their patches.

Deviations: ToMe was published for classification, where nothing reads the
order of the tokens; here each token leaves at the place of the patch that its set-B token started from.
``inside=false`` merges once behind the tower instead (in rounds that halve at most, by the keys of the selected layer),
which also works on a bare decoder. Inside the tower unpadding (LLaVA-1.6) does not take place: patches outside of the
picture are merged like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import TowerMerger, VisionReducer
from llava.pruning.selection import take
from llava.pruning.vision import (
    Reduction,
    TowerMerge,
    TowerValue,
    TowerView,
    VisionFact,
    VisionView,
    merge_tokens,
)


@dataclass(frozen=True, kw_only=True)
class ToMe(TowerMerger, VisionReducer):
    """Merge similar tokens.

    Attributes:
        inside: merge in the layers of the tower; otherwise behind it.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    inside: bool = True

    name: ClassVar[str] = "tome"

    @property
    def merges_in_tower(self) -> bool:  # type: ignore[override]
        return self.inside

    @property
    def reduces_vision(self) -> bool:  # type: ignore[override]
        return not self.inside

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {} if self.inside else {"keys": VisionFact(TowerValue.KEYS)}

    def merge(self, view: TowerView) -> TowerMerge | None:
        patches, memory = view.keys_NTC.shape[1] - view.has_cls, view.memory
        if not hasattr(memory, "each"):
            memory.each = merges_per_layer(patches, view.target, view.layers - view.layer)
        last = view.layer == view.layers - 1
        count = min(patches if last else memory.each, patches // 2, max(patches - view.target, 0))
        return bipartite_merge(view.keys_NTC, count, view.has_cls) if count else None

    def reduce(self, view: VisionView) -> Reduction:
        tokens, keys = view.tokens_NPC, view.facts["keys"]
        sizes = torch.ones(tokens.shape[:2], device=tokens.device)
        place = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        merges = []
        while tokens.shape[1] > view.target:
            count = min(tokens.shape[1] // 2, tokens.shape[1] - view.target)
            merge = bipartite_merge(keys, count, has_cls=False)
            keys = merge_tokens(keys, sizes, merge)[0]
            tokens, sizes = merge_tokens(tokens, sizes, merge)
            place = place.gather(1, merge.leader_NK)
            merges.append(merge)
        order = place.argsort(dim=1)
        place, sizes = place.gather(1, order), sizes.gather(1, order)

        def weights() -> Tensor:
            made = torch.eye(view.tokens_NPC.shape[1], device=tokens.device).expand(len(tokens), -1, -1)
            counts = torch.ones(made.shape[:2], device=tokens.device)
            for merge in merges:
                made, counts = merge_tokens(made, counts, merge)
            return take(made, order)

        return Reduction(take(tokens, order), place.masked_fill(sizes > 1, -1), place, in_place=True, weights=weights)


def merges_per_layer(patches: int, target: int, layers: int) -> int:
    """Tokens to merge in each of ``layers`` layers so that the last one ends at ``target``: the smallest number that
    does, or as many as there are where none does.
    """

    def left(each: int) -> int:
        tokens = patches
        for _ in range(layers):
            tokens -= min(each, tokens // 2)
        return tokens

    low, high = 0, patches
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= target else (middle + 1, high)
    return low


def bipartite_merge(keys_NTC: Tensor, count: int, has_cls: bool) -> TowerMerge:
    """Merge ``count`` tokens at even places into the most similar ones at odd places.

    The new sequence has the remaining even tokens in their order, then the odd ones. Equal links: the first.
    """
    crops, tokens, _ = keys_NTC.shape
    keys = torch.nn.functional.normalize(keys_NTC.float(), dim=2)
    link = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    if has_cls:
        link[:, 0] = -torch.inf
    strength, partner = link.max(2)
    even, odd = link.shape[1:]
    merged = torch.zeros(crops, even, dtype=torch.bool, device=keys.device)
    merged.scatter_(1, strength.argsort(dim=1, descending=True, stable=True)[:, :count], True)
    staying = even - count
    own_place = (~merged).long().cumsum(1) - 1
    slot = torch.empty(crops, tokens, dtype=torch.long, device=keys.device)
    slot[:, ::2] = torch.where(merged, staying + partner, own_place)
    slot[:, 1::2] = staying + torch.arange(odd, device=keys.device)
    evens = merged.to(torch.uint8).argsort(dim=1, stable=True)[:, :staying] * 2
    odds = torch.arange(1, tokens, 2, device=keys.device).expand(crops, -1)
    return TowerMerge(slot, torch.cat((evens, odds), 1))
