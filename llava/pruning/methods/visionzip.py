"""VisionZip, "Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025, arXiv 2412.04467).

In front of the projector: *dominant* tokens are the CLS token and the patches with the highest CLS attention in the
selected layer; of the other patches, evenly spaced ones become *contextual* tokens, to which the mean of all patches
with the most similar key (cosine, keys averaged over heads) is added.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. 10 of 64
are contextual, as in the paper (192 = 162 + 30, 128 = 108 + 20, 64 = 54 + 10); the CLS token counts as dominant.
Crops and images share the budget in proportion to their patches (the paper gives each crop the same).

Deviations: the dominant patches come first, then CLS, then contextual tokens, as the paper orders them for several
crops; for one crop the published order has CLS first. On a bare decoder there is no CLS token: a patch takes its place,
and merging works on the input embeddings. Padding patches have no CLS attention. A budget of all patches keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import VisionReducer
from llava.pruning.selection import on_device, take, top_k
from llava.pruning.vision import CLS_ATTENTION, Reduction, TowerValue, VisionFact, VisionView, rest_of, unit_rows


@dataclass(frozen=True, kw_only=True)
class VisionZip(VisionReducer):
    """Dominant and contextual tokens.

    Attributes:
        contextual_ratio: share of the budget that goes to contextual tokens.
        keep_cls: whether the CLS token is one of the dominant tokens.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    contextual_ratio: float = 10 / 64
    keep_cls: bool = True

    name: ClassVar[str] = "visionzip"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("contextual_ratio", 0 <= self.contextual_ratio < 1, "must lie in 0..1, 1 excluded")

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {CLS_ATTENTION: VisionFact(TowerValue.CLS_ATTENTION), "keys": VisionFact(TowerValue.KEYS)}

    def reduce(self, view: VisionView) -> Reduction:
        tokens, (crops, patches) = view.tokens_NPC, view.tokens_NPC.shape[:2]
        contextual = round(view.target * self.contextual_ratio)
        with_cls = self.keep_cls and view.cls_NC is not None
        dominant = view.target - contextual - with_cls
        kept = top_k(view.facts[CLS_ATTENTION], [patches] * crops, [dominant] * crops)
        # The order of tokens that are none of the patches: CLS, then contextual ones.
        parts, sources, weights = [take(tokens, kept)], [kept], None
        if with_cls and view.cls_NC is not None:
            parts.append(view.cls_NC[:, None].to(tokens.dtype))
            sources.append(torch.zeros_like(kept[:, :1]) if dominant else kept.new_zeros(crops, 1))
        if contextual:
            merged, targets, members = contextual_tokens(tokens, view.facts["keys"], rest_of(patches, kept), contextual)
            parts.append(merged)
            sources.append(targets)

            def weights() -> Tensor:
                alone = unit_rows(torch.cat(sources[:-1], 1), patches)
                return torch.cat((alone, members() / members().sum(2, keepdim=True)), 1)

        origin = torch.cat((kept, kept.new_full((crops, view.target - dominant), -1)), dim=1)
        return Reduction(torch.cat(parts, 1), origin, torch.cat(sources, 1), weights=weights)


def contextual_tokens(
    tokens_NPC: Tensor, keys_NPD: Tensor, rest_NR: Tensor, count: int
) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """Merge the remaining patches into ``count`` of them.

    Returns:
        ``[N, count, C]`` and the patches ``[N, count]`` that they grew from: each is that patch plus the mean of the
        others that are most similar to it (ties: the first), if any. Last what gives ``[N, count, P]``, 1 for all
        patches that a token is made of, that one among them.
    """
    remaining = rest_NR.shape[1]
    step = max(1, remaining // count)
    # Their places are known to the host.
    places = range(0, step * count, step)
    targets = torch.arange(0, step * count, step, device=rest_NR.device)
    others = on_device([place for place in range(remaining) if place not in places], rest_NR.device).long()
    keys = torch.nn.functional.normalize(take(keys_NPD, rest_NR).float(), dim=2)
    nearest = (keys[:, others] @ keys[:, targets].transpose(1, 2)).argmax(2)
    members = (nearest[:, None, :] == torch.arange(count, device=nearest.device)[:, None]).float()
    means = members @ take(tokens_NPC, rest_NR[:, others]).float() / members.sum(2, keepdim=True).clamp_min(1)
    chosen = rest_NR[:, targets]

    def all_members() -> Tensor:
        own = unit_rows(chosen, tokens_NPC.shape[1])
        return own.scatter(2, rest_NR[:, None, others].expand(-1, count, -1), members)

    return (take(tokens_NPC, chosen).float() + means).to(tokens_NPC.dtype), chosen, all_members
