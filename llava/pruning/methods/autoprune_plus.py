"""AutoPrune+: a first cut in front of the decoder and a curve that falls where the text has read the picture.

Not a published method: it is this repository's own, made of ideas of several papers and of what its ablations of
AutoPrune showed (docs/autoprune_plus.md has what was tried and what each part is worth).

1. *In front of layer 0*, so that no layer is paid in full, greedily: first the token with the highest weight, then
   always the one whose weight times its distance to the nearest chosen token (one minus the cosine) is largest. Max-min
   distance is DivPrune's idea, weights in it are ZOO-Prune's. The weight is relevance to the question (conditioning
   diversity on the question is CDPruner's idea) to the power ``relevance``, times CLS attention (FasterVLM) to the
   power ``saliency``. Relevance of a token: take the mean of the prompt's visual tokens from it, divide by the root of
   the length of what is left, and take the largest product with a text token behind the last image (of length 1); then
   0..1 over the prompt. The mean is what all patches share, and so tells none from another.
2. *Between the layers* the tokens that enter layer ``l`` follow AutoPrune's logistic curve, ``1 / (1 + exp(slope * (l
   - x0)))``, with layers counted on a scale of 32 at any depth. The published slope is flat or nearly so; this one is
   steep: where the text has read the picture, visual tokens have said what they know (Information Horizon), and what is
   saved behind that layer is spent in front of the first. Which tokens stay on the way down is decided by ranks of the
   order of the first cut and of the attention of the text (mean over heads and rows), averaged by ``text_weight``.

Budget: ``target_tokens`` is the *processed* mean, whatever ``budget`` says. The height of the curve is what meets it,
never more than there are tokens: larger budgets move ``x0`` back until all tokens stay in all layers. What rounding
leaves over is given to the layers behind the bend, a token each. At least one token stays.

Unlike AutoPrune it measures no mutual information (the best curve of each question, known afterwards, gained
little over the steepest) and recycles nothing. On Q-Formers and resamplers, whose tokens are no patches, ``saliency``
is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.pruning.diversity import weighted_order
from llava.pruning.engine.notices import say
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod, PruningMethod
from llava.pruning.selection import counts_to_mask, descending_order, last_places, on_device
from llava.pruning.types import BEFORE_DECODER, Rows, Selection

_DEPTH = 32
_TINY = 1e-12
_STEPS = 60
_LARGEST = 700.0  # what `math.exp` can do


@lru_cache(maxsize=4096)
def entering_counts(visual_tokens: int, num_layers: int, target: int, x0: float, slope: float) -> tuple[int, ...]:
    """Visual tokens that enter each layer, falling, with a mean of ``target`` or as little below as can be.

    Args:
        visual_tokens: tokens of the prompt.
        num_layers: layers of the decoder.
        target: wanted mean.
        x0: where the curve bends, on a scale of 32 layers.
        slope: how steeply, on that scale.
    """
    if target >= visual_tokens:
        return (visual_tokens,) * num_layers
    goal = target * num_layers

    def counts(height: int, bend: float) -> list[int]:
        powers = [min(slope * (layer * _DEPTH / num_layers - bend), _LARGEST) for layer in range(num_layers)]
        # Relative to the first layer, whose count is the height.
        return [max(round(height * (1 + math.exp(powers[0])) / (1 + math.exp(power))), 1) for power in powers]

    if sum(counts(visual_tokens, x0)) > goal:
        low, high = 1, visual_tokens  # the most that fits, and the least that does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(counts(middle, x0)) <= goal else (low, middle)
        plan = counts(low, x0)
    else:
        near, far = x0, x0 + 2.0 * _DEPTH
        for _ in range(_STEPS):
            between = (near + far) / 2
            near, far = (between, far) if sum(counts(visual_tokens, between)) <= goal else (near, between)
        plan = counts(visual_tokens, near)
    return tuple(_filled(plan, goal - sum(plan)))


def _filled(plan: list[int], rest: int) -> list[int]:
    """The plan with ``rest`` more tokens, one a layer, from the first layer behind a drop on; it still falls."""
    room = True
    while rest > 0 and room:
        room = False
        for layer in range(1, len(plan)):
            if rest > 0 and plan[layer] < plan[layer - 1]:
                plan[layer], rest, room = plan[layer] + 1, rest - 1, True
    return plan


def question_relevance(tokens_BVC: Tensor, real_BV: Tensor | None, text_BTC: Tensor, real_BT: Tensor | None) -> Tensor:
    """Relevance of visual tokens to the text, 0..1 in each row, ``[B, V]``.

    Args:
        tokens_BVC: visual tokens as they enter the decoder.
        real_BV: False for padding; None if there is none.
        text_BTC: embeddings of the text.
        real_BT: False for padding; None if there is none.
    """
    tokens = tokens_BVC.float()
    if real_BV is None:
        mean = tokens.mean(1, keepdim=True)
    else:
        mean = (tokens * real_BV[:, :, None]).sum(1, keepdim=True) / real_BV.sum(1).clamp_min(1)[:, None, None]
    own = tokens - mean
    own = own / own.norm(dim=2, keepdim=True).clamp_min(_TINY).sqrt()
    products = own @ normalize(text_BTC.float(), dim=2).transpose(1, 2)
    if real_BT is not None:
        products = products.masked_fill(~real_BT[:, None, :], -torch.inf)
    return _zero_to_one(products.amax(2), real_BV)


def _zero_to_one(values_BV: Tensor, real_BV: Tensor | None) -> Tensor:
    """Rows between their smallest and their largest real value; 1 where all are equal."""
    lowest = values_BV if real_BV is None else values_BV.masked_fill(~real_BV, torch.inf)
    highest = values_BV if real_BV is None else values_BV.masked_fill(~real_BV, -torch.inf)
    low, span = lowest.amin(1, keepdim=True), highest.amax(1, keepdim=True) - lowest.amin(1, keepdim=True)
    return torch.where(span > 0, (values_BV - low) / span.clamp_min(_TINY), 1.0)


@dataclass(frozen=True, kw_only=True)
class AutoPrunePlus(DecoderMethod):
    """Relevant, salient and diverse tokens up to where the text has read them, hardly any behind.

    Attributes:
        relevance: exponent of the relevance to the question in the first cut; 0 leaves it out.
        saliency: exponent of the CLS attention in the first cut; 0 leaves it out and needs no CLS attention.
        x0: layer in front of which the curve bends, on a scale of 32 layers at any depth.
        slope: steepness of the curve on that scale; 0: as many tokens in all layers.
        text_weight: share of the attention of the text in the ranking between layers; the rest is the first cut's.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    relevance: float = 2.0
    saliency: float = 0.5
    x0: float = 14.5
    slope: float = 8.0
    text_weight: float = 0.5

    name: ClassVar[str] = "autoprune_plus"
    published_budget: ClassVar[str] = "processed"
    shares_views: ClassVar[bool] = True
    capturable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("relevance", "saliency", "x0", "slope"):
            self.require(option, getattr(self, option) >= 0, "must be at least 0")
        self.require("text_weight", 0 <= self.text_weight <= 1, "must lie in 0..1")

    @property
    def needs_cls(self) -> bool:  # type: ignore[override]
        return self.saliency > 0

    def without_patches(self) -> PruningMethod:
        if not self.needs_cls:
            return super().without_patches()
        say(
            self.name,
            "saliency=0, because the image adapter of this model mixes the patches that CLS attention is about",
        )
        return replace(self, saliency=0.0).without_patches()

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        between = Rows.TEXT if self.text_weight else Rows.NONE
        return {BEFORE_DECODER: Rows.NONE, **dict.fromkeys(range(num_layers - 1), between)}

    def passes(self, layer: int, counts: tuple[int, ...], memory: SimpleNamespace) -> bool:
        if layer == BEFORE_DECODER:
            return False
        return all(plan[layer + 1] >= count for plan, count in zip(memory.plans, counts, strict=True))

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if view.layer == BEFORE_DECODER:
            rows = zip(view.counts, self.targets(view), strict=True)
            memory.plans = [
                entering_counts(count, view.num_layers, target, self.x0, self.slope) for count, target in rows
            ]
        plans = zip(memory.plans, view.counts, strict=True)
        keep = tuple(min(plan[view.layer + 1], count) for plan, count in plans)
        if view.layer == BEFORE_DECODER:
            scores = self._first_cut(view, keep)
            memory.carried = {"first_cut": scores}
        else:
            scores = self._ranking(view, memory)
        return None if keep == view.counts else view.best(scores, keep)

    def _first_cut(self, view: LayerView, keep: tuple[int, ...]) -> Tensor:
        """Above 1 for the chosen tokens, higher the earlier they were; the weights (0..1) of the others."""
        counts, width = view.counts, max(view.counts)
        real_BV = None if min(counts) == width else counts_to_mask(counts, width, view.device)
        weight = torch.ones(len(counts), width, device=view.device)
        if self.relevance:
            rows = max(view.query_rows)
            real_BT = None if min(view.query_rows) == rows else last_places(view.query_rows, rows, view.device)
            weight = question_relevance(view.hidden_BVC, real_BV, view.text_BTC, real_BT) ** self.relevance
        if self.saliency:
            attention = view.cls_attention_BV
            weight = weight * (attention / attention.amax(1, keepdim=True).clamp_min(_TINY)) ** self.saliency
        if keep == counts:
            return weight
        order = weighted_order(view.hidden_BVC, weight, real_BV, max(keep))
        places = torch.arange(max(keep) + 1, 1, -1, device=view.device, dtype=weight.dtype).expand(len(counts), -1)
        # The largest: a row that runs out of tokens picks some twice.
        scores = weight.scatter_reduce(1, order, places, "amax")
        whole = [kept == count for kept, count in zip(keep, counts, strict=True)]
        return torch.where(on_device(whole, view.device)[:, None], weight, scores) if any(whole) else scores

    def _ranking(self, view: LayerView, memory: SimpleNamespace) -> Tensor:
        first: Tensor = memory.carried["first_cut"]
        if not self.text_weight:
            return first
        attended, before = (descending_order(scores, view.counts).argsort(1) for scores in (view.relevance_BV, first))
        return -(self.text_weight * attended + (1 - self.text_weight) * before)
