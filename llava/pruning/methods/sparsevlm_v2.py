"""SparseVLM+, version 2.0 of SparseVLM (ICML 2025, arXiv 2410.04417; published as code).

Text raters and layers are those of :mod:`~llava.pruning.methods.sparsevlm`. The attention of the raters is first
divided by what rotary embedding alone would make of it, the logit of an all-ones query and key at the two positions;
then only the heads with the most of this corrected attention between raters and picture are averaged. Nothing is
merged, and survivors keep their positions.

Budget: the published code lists how many tokens stay after each of the three layers at 192, 128, 96 and 64 of 576
tokens. Those lists are the *nominal* mean (tokens leaving the layers) within one token on 32 layers, so that is what
``target_tokens`` means here. Other budgets, other token counts and other depths use lists in between, in proportion,
that meet the mean. As in version 1.5 the layers are the published ones wherever the decoder has them, and those in
front of the first cut bound the budget from below.

The divisor depends on the distance of the two positions alone. With the heads of real models (128 wide) it is positive
at the length of any prompt here; where heads are narrow it comes near 0 and changes its sign, as in the published code.

Deviations: the published code keeps at least one token less than there are, here a list may keep all; decoders with
fewer heads than ``heads`` use all; if no text token is above the average all are raters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.budget import PublishedLists
from llava.pruning.engine.view import LayerView
from llava.pruning.published_cuts import PublishedCuts
from llava.pruning.scores import text_raters
from llava.pruning.selection import take
from llava.pruning.types import BEFORE_DECODER, Rows, Selection

_PUBLISHED = PublishedLists(
    (2, 6, 15), 32, 576, {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)}
)


def rotary_bias(text: tuple[Tensor, Tensor], visual: tuple[Tensor, Tensor]) -> Tensor:
    """Logits of all-ones queries and keys, float32 ``[B, T, V]``.

    Args:
        text: cosines and sines of the text tokens, ``[B, T, D]``.
        visual: those of the visual tokens, ``[B, V, D]``.
    """
    # Of each pair of dimensions, rotated by a and b, the product is 2 cos(a - b) = 2 (cos a cos b + sin a sin b), and
    # each angle stands in the tables twice.
    products = (own.float() @ other.float().transpose(1, 2) for own, other in zip(text, visual, strict=True))
    bias: Tensor = sum(products, torch.zeros((), device=text[0].device)) / text[0].shape[2] ** 0.5
    return bias


def corrected_score(attention_BHTV: Tensor, bias_BTV: Tensor, raters_BT: Tensor, heads: int) -> Tensor:
    """Mean corrected attention of the raters in their best heads, float32 ``[B, V]``.

    Args:
        attention_BHTV: attention of the text tokens, zero in the padding.
        bias_BTV: what it is divided by.
        raters_BT: True for raters.
        heads: how many heads count.
    """
    corrected = attention_BHTV * raters_BT[:, None, :, None] / bias_BTV[:, None]
    # Padding divides zero by anything.
    corrected = corrected.masked_fill(attention_BHTV == 0, 0.0)
    count = min(heads, corrected.shape[1])
    best_BK = corrected.sum((2, 3)).sort(dim=1, descending=True, stable=True).indices[:, :count]
    by_head_BHV = corrected.sum(2)
    chosen = take(by_head_BHV, best_BK)
    return chosen.sum(1) / (count * raters_BT.sum(1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class SparseVLMPlus(PublishedCuts):
    """Pruning by text raters in three layers, corrected for rotary embedding.

    Attributes:
        heads: how many heads count in each layer.
    """

    target_tokens: int | None = 64
    heads: int = 14

    name: ClassVar[str] = "sparsevlm_v2"
    shares_views: ClassVar[bool] = True
    published: ClassVar[PublishedLists] = _PUBLISHED

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("heads", self.heads >= 1, "must be at least 1")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE, **super().stages(num_layers)}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if view.layer == BEFORE_DECODER:
            memory.raters = text_raters(view.hidden_BVC, view.counts, view.text_BTC, view.query_rows)
            memory.keep = self.planned(view)
            return None
        stage = self.cut_layers(view.num_layers).index(view.layer)
        keep = tuple(min(own[stage], count) for own, count in zip(memory.keep, view.counts, strict=True))
        bias = rotary_bias(view.rotary_of_text, view.rotary_of_visual)
        score = corrected_score(view.attention_BHTV, bias, memory.raters.to(view.device), self.heads)
        return view.best(score, keep)
