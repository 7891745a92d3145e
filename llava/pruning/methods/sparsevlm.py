"""SparseVLM, "Visual Token Sparsification for Efficient Vision-Language Model Inference" (ICML 2025, arXiv 2410.04417).

Version 1.5. Text tokens that relate to the picture are chosen once, among the input embeddings: those that receive
more than the average of a softmax over the text, averaged over the visual tokens ("raters"). After decoder layers 2, 6
and 15 the visual tokens that the raters attend to most stay; of the dropped ones the better 30% are merged into a few
tokens.

Budget: the paper lists how many tokens stay after each of the three layers at 192, 128, 96 and 64 of 576 tokens. Those
lists are the *nominal* mean (tokens leaving the layers, merged ones included) within one token on 32 layers, so that is
what ``target_tokens`` means here. Other budgets, other token counts and other depths use lists in between, in
proportion, that meet the mean. (The published code takes its lists at any depth: on the 40 layers of the 13B model that
for 192 tokens is 176 in the mean. The list for 96 came with version 2.0.) The layers are the published ones wherever
the decoder has them; in shallower ones they stand at the same relative depth, as they do everywhere with
``layers=scaled`` (3, 8 and 19 of 40). All tokens leave the layers in front of the first cut, which alone is ``2 N / L``
in the mean: a target of 160 of 2,880 tokens (LLaVA-1.6) cannot be met with the published layers on 32 (these two cost
180), and the run says so; ``layers=0/6/15`` begins earlier.

``debias_curve`` and ``debias_padding`` correct the attention of the first cut for place and padding, see
:mod:`llava.pruning.debiasing`; recycling stays with attention as it is.

Deviations: the number of tokens per layer is the fixed list of version 1.5, not the rank estimate of the paper; merging
is without noise unless ``noise_seed`` is given (docs/reproducing.md says where that matters); attention is summed in
float32; if no text token is above the average (a single one) all are raters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import ClassVar

import torch

from llava.pruning.budget import PublishedLists
from llava.pruning.debiasing import Debiased
from llava.pruning.engine.view import LayerView
from llava.pruning.published_cuts import PublishedCuts
from llava.pruning.recycling import keep_and_recycle, prune_step
from llava.pruning.scores import received_attention, text_raters
from llava.pruning.types import BEFORE_DECODER, Rows, Selection

_PUBLISHED = PublishedLists(
    (2, 6, 15), 32, 576, {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)}
)


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Debiased, PublishedCuts):
    """Pruning by text raters in three layers.

    Attributes:
        recycle_fraction: share of the dropped tokens that is merged; 0 switches recycling off.
        noise_seed: draw the noise of the published clustering with this seed (the published code has none); None: no
            noise.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    recycle_fraction: float = 0.3
    noise_seed: int | None = None

    name: ClassVar[str] = "sparsevlm"
    shares_views: ClassVar[bool] = True
    published: ClassVar[PublishedLists] = _PUBLISHED

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("recycle_fraction", 0 <= self.recycle_fraction <= 1, "must lie in 0..1")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE, **super().stages(num_layers)}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if view.layer == BEFORE_DECODER:
            memory.raters = text_raters(view.hidden_BVC, view.counts, view.text_BTC, view.query_rows)
            memory.keep = self.planned(view)
            return None
        stage = self.cut_layers(view.num_layers).index(view.layer)
        raters = memory.raters.to(view.device)  # chosen where the embeddings are
        scores = received_attention(view.attention_BHTV * raters[:, None, :, None], raters.sum(1))
        steps = [
            prune_step(count, min(keep[stage], count), self.recycle_fraction)
            for count, keep in zip(view.counts, memory.keep, strict=True)
        ]
        if stage == 0 and self.debiases:
            # What is chosen comes first; which of the others are recycled is decided by attention as it is.
            chosen = view.best(self.debiased(view, scores), tuple(step.keep for step in steps)).keep_BK
            scores = torch.nn.functional.pad(scores, (0, 1)).scatter(1, chosen, torch.inf)[:, :-1]
        return keep_and_recycle(view, scores, steps, memory, self.noise_seed)

    def keep_list(self, count: int, num_layers: int, layers: tuple[int, ...], target: int) -> tuple[int, ...]:
        if target >= count:
            return (count,) * len(layers)  # as many as there are: none is merged either
        return keep_list(count, num_layers, layers, target, self.budget_kind, self.recycle_fraction)


@lru_cache(maxsize=64)
def _left(recycle_fraction: float) -> Callable[[int, int], int]:
    """Tokens behind a cut, merged ones included: one function per fraction, so that plans are found again."""
    return lambda current, wanted: prune_step(current, wanted, recycle_fraction).total


def keep_list(
    count: int, num_layers: int, layers: tuple[int, ...], target: int, kind: str, recycle_fraction: float
) -> tuple[int, ...]:
    """Tokens to keep after each of ``layers``: the published list where there is one, else one in between."""
    return _PUBLISHED.keep(count, num_layers, layers, target, kind, _left(recycle_fraction))
