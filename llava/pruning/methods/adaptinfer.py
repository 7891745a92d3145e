"""AdaptInfer, "Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance"
(arXiv 2508.06084).

After decoder layers 1, 10 and 20 of 32 the visual tokens that the text behind the picture attends to most stay, where
each text token counts as much as it matters to the text itself: per head its importance is its column of the attention
among the text, ``A + A^T - diag(A)``, summed up. A visual token's score is the sum over heads and text tokens of
importance times attention. Survivors are renumbered.

Budget: the published code lists how many tokens stay after each of the three layers at 128, 64, 48 and 32 of 576 tokens
(the list for 32 ends in none at all). Those lists are the *nominal* mean (tokens leaving the layers) within one token
on 32 layers, so that is what ``target_tokens`` means here. Other budgets, other token counts and other depths use lists
in between, in proportion, that meet the mean; ``layers`` are scaled with the depth unless given (the paper looks for
them in each model). The lists for the 40 layers of the 13B model are not used: which layers belong to them is not
public.

Deviations: the published code keeps at least one token less than there are, here a list may keep all; its recycling,
off by default, is left out; with ``smoothing`` below 1 the mean is that of the row's own text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.budget import PublishedLists
from llava.pruning.engine.view import LayerView
from llava.pruning.published_cuts import PublishedCuts
from llava.pruning.types import LayerFact, Selection

_PUBLISHED = PublishedLists(
    (1, 10, 20), 32, 576, {32: (40, 12, 0), 48: (80, 24, 2), 64: (133, 27, 3), 128: (290, 72, 18)}
)


def text_guided_score(
    text_BHTT: Tensor, attention_BHTV: Tensor, rows_B: Tensor | int, smoothing: float = 1.0
) -> Tensor:
    """Score of each visual token, float32 ``[B, V]``.

    Args:
        text_BHTT: attention of the text tokens to each other, zero in the padding.
        attention_BHTV: their attention to the visual tokens, zero in the padding.
        rows_B: text tokens per row.
        smoothing: share of the symmetric attention among the text that is not replaced by its mean.
    """
    # Column sums of the symmetric attention: sums of columns and of rows less what is counted twice.
    importance = text_BHTT.sum(2) + text_BHTT.sum(3) - text_BHTT.diagonal(dim1=2, dim2=3)
    if smoothing < 1:
        # The mean over heads and both axes, in each of the rows of a column.
        mean = importance.sum((1, 2)) / (importance.shape[1] * rows_B)
        importance = smoothing * importance + (1 - smoothing) * mean[:, None, None]
    return torch.einsum("bht,bhtv->bv", importance, attention_BHTV)


@dataclass(frozen=True, kw_only=True)
class AdaptInfer(PublishedCuts):
    """Three cuts by the attention of the text, weighted with attention among the text.

    Attributes:
        smoothing: how much of the attention among the text counts; the rest is replaced by its mean.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    smoothing: float = 1.0

    name: ClassVar[str] = "adaptinfer"
    shares_views: ClassVar[bool] = True
    published: ClassVar[PublishedLists] = _PUBLISHED
    at_every_depth: ClassVar[bool] = False
    facts: ClassVar[frozenset[LayerFact]] = frozenset({LayerFact.TEXT_ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("smoothing", 0 <= self.smoothing <= 1, "must lie in 0..1")

    def layer_facts(self, num_layers: int) -> Mapping[int, Collection[LayerFact]]:
        return dict.fromkeys(self.cut_layers(num_layers), self.facts)

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        if not hasattr(memory, "keep"):
            memory.keep = self.planned(view)
        stage = self.cut_layers(view.num_layers).index(view.layer)
        return self.choose(view, tuple(min(k[stage], n) for k, n in zip(memory.keep, view.counts, strict=True)))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        text = view.layer_fact(LayerFact.TEXT_ATTENTION)
        score = text_guided_score(text, view.attention_BHTV, view.query_rows_B, self.smoothing)
        return view.best(score, keep)
