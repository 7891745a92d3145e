"""CDPruner, "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (NeurIPS
2025, arXiv 2506.10967).

In front of the decoder: the patches of a crop that a determinantal point process (DPP) conditioned on the question
finds most probable, picked greedily. Its kernel is the cosine of the projected features, times the relevance of both
patches to the question, which lies in 0..1 over all crops of a prompt. Raster order.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. Crops
and images share the budget in proportion to their patches (the paper gives each crop the same).

Relevance: the paper compares patch and question in CLIP's joint space (negative cosine, mean over pieces of 77 tokens).
LLaVA's checkpoints have neither CLIP's text encoder nor its projections. ``relevance=text``, the default, compares the
projected patch with the embeddings of the prompt's text instead (cosine, mean over the tokens behind the last image),
which is not what the published figures were measured with. ``relevance=clip`` takes the published quantity from whoever
gives it, as ``facts={"relevance": ...}`` with ``set_visual`` (see :func:`clip_relevance`); ``relevance=none`` leaves it
out.

Deviations: the published code normalizes over all prompts of a batch; crops that unpadding cuts to different sizes are
normalized apart. Where more patches are asked for than the features have dimensions, what is left has no volume, and
patches follow in raster order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import VisionReducer
from llava.pruning.selection import on_device
from llava.pruning.vision import Reduction, TowerValue, VisionFact, VisionView

_NONE_LEFT = 1e-5
"""Share of a patch's own volume below which float32 has nothing but rounding left of it."""
_LEAST = 1e-6


def clip_relevance(patches_NPE: Tensor, texts_ME: Tensor) -> Tensor:
    """Relevance of patches to a question as published, ``[N, P]``: the mean of the *negative* cosines.

    Args:
        patches_NPE: patches of the selected layer in CLIP's joint space.
        texts_ME: pieces of the question there.
    """
    patches, texts = (torch.nn.functional.normalize(side.float(), dim=-1) for side in (patches_NPE, texts_ME))
    return -(patches @ texts.T).mean(2)


def text_relevance(view: VisionView) -> Tensor:
    """Mean cosine of each projected patch and the prompt's text tokens, ``[N, P]``; 0 where there is no text."""
    patches, text = (torch.nn.functional.normalize(side.float(), dim=2) for side in (view.projected_NPD, view.text_NTD))
    lengths = on_device([max(length, 1) for length in view.text_lengths], patches.device)
    return (patches @ text.sum(1)[:, :, None])[:, :, 0] / lengths[:, None]


def normalized(relevance_NP: Tensor, prompts: tuple[int, ...]) -> Tensor:
    """To 0..1 over the crops of each prompt; 1 where all are equal."""
    index = on_device(prompts, relevance_NP.device)
    nothing = relevance_NP.new_full((max(prompts) + 1,), torch.inf)
    low = nothing.scatter_reduce(0, index, relevance_NP.amin(1), "amin")
    high = (-nothing).scatter_reduce(0, index, relevance_NP.amax(1), "amax")
    low, span = low[index, None], (high - low)[index, None]
    # The published code adds to the numerator alone.
    return torch.where(span > 0, (relevance_NP - low + _LEAST) / span, 1.0)


def dpp_order(patches_NPD: Tensor, picks: int) -> Tensor:
    """Greedy MAP inference of a DPP (Chen et al., NeurIPS 2018): patches as they are picked, ``[N, picks]``.

    Args:
        patches_NPD: their products are the kernel, of which only the rows of what is picked are computed.
        picks: how many.
    """
    crops, patches, _ = patches_NPD.shape
    row = torch.arange(crops, device=patches_NPD.device)
    # Squared volume that each patch adds to those picked, and rows of their Cholesky factor.
    volume = patches_NPD.square().sum(2)
    least = volume * _NONE_LEFT
    factor = patches_NPD.new_zeros(crops, picks, patches)
    order = torch.empty(crops, picks, dtype=torch.long, device=patches_NPD.device)
    for step in range(picks):
        best = volume.argmax(1)
        order[:, step] = best
        known = factor[:, :step]
        products = (patches_NPD @ patches_NPD[row, best][:, :, None])[:, :, 0]
        new = products - (known[row, :, best][:, None] @ known)[:, 0]
        own = volume[row, best][:, None]
        factor[:, step] = torch.where(own > 0, new / own.clamp_min(torch.finfo(own.dtype).tiny).sqrt(), 0.0)
        left = volume - factor[:, step].square()
        # What is picked stays at minus infinity.
        volume = torch.where(volume == -torch.inf, volume, torch.where(left > least, left, 0.0))
        volume = volume.scatter(1, best[:, None], -torch.inf)
    return order


@dataclass(frozen=True, kw_only=True)
class CDPruner(VisionReducer):
    """Diverse patches, given the question.

    Attributes:
        relevance: ``text``, ``clip`` or ``none``, see the module.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    relevance: str = "text"

    name: ClassVar[str] = "cdpruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("relevance", self.relevance in ("text", "clip", "none"), "must be 'text', 'clip' or 'none'")

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        return self.relevance == "text"

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {"relevance": VisionFact(TowerValue.CLIP_RELEVANCE)} if self.relevance == "clip" else {}

    def reduce(self, view: VisionView) -> Reduction:
        patches = torch.nn.functional.normalize(view.projected_NPD.float(), dim=2)
        if self.relevance != "none":
            given = view.facts["relevance"].float() if self.relevance == "clip" else text_relevance(view)
            patches = patches * normalized(given, view.prompts)[:, :, None]
        # A CPU has one crop in its caches.
        stacks = patches[:, None] if patches.device.type == "cpu" else [patches]
        order = torch.cat([dpp_order(stack, view.target) for stack in stacks])
        return Reduction.keep(view.tokens_NPC, order.sort(dim=1).values)
