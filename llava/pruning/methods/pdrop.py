"""PyramidDrop, "Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction" (CVPR 2025,
arXiv 2410.17247).

In front of decoder layers 8, 16 and 24 (of 32) a share of the visual tokens stays: those that the last token of the
prompt is about to attend to in that layer, computed from the layer's own norm and projections for this one row.

Budget: the paper gives layers and ratios (0.5, 0.25, 0.125 of the visual tokens: 270 of 576 in the mean), which is the
*processed* mean; that is what ``target_tokens`` means. Ratios are powers of one number. Down to 0.5 that number is
solved for the budget; for smaller budgets the stages first move forward (every 7, 6, ... layers instead of every
8), then the number falls below 0.5; the last stage takes up the rounding. This rule is ours: the settings behind the
literature's figures at 192, 128 and 64 tokens are not published. ``ratio`` and ``layers`` replace the rule.

``debias_curve`` and ``debias_padding`` correct the attention of the first cut for place and padding, see
:mod:`llava.pruning.debiasing`.

Deviations: several images of a prompt compete for the tokens of one budget instead of having a share each; the last
token is that of the prompt (in training the paper uses the last token of each instruction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from llava.pruning.budget import STAGES, parse_layers, plan_stages, spaced_layers
from llava.pruning.debiasing import Debiased
from llava.pruning.engine.view import LayerView
from llava.pruning.types import Rows, Selection


@dataclass(frozen=True, kw_only=True)
class PDrop(Debiased):
    """Pruning in stages by the attention of the last token.

    Attributes:
        layers: layers in front of which tokens are dropped, such as ``8/16/24``; None: from the budget.
        ratio: share that each stage leaves of what the one before left; replaces ``target_tokens``.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    layers: str | None = None
    ratio: float | None = None

    name: ClassVar[str] = "pdrop"
    shares_views: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    published_budget: ClassVar[str] = "processed"
    instead_of_target: ClassVar[str | None] = "ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = self.layers is None or (parse_layers(self.layers) or (0,))[0] >= 1
        self.require("layers", rising, "must be rising layer indices from 1 such as 8/16/24")
        self.require("ratio", self.ratio is None or 0 < self.ratio <= 1, "must lie in 0..1, 0 excluded")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        if self.layers is not None:
            layers = parse_layers(self.layers) or ()
            self.require("layers", layers[-1] < num_layers, f"must be below the decoder's {num_layers} layers")
            return dict.fromkeys([layer - 1 for layer in layers], Rows.NEXT_LAST)
        # Which of these it will be depends on the number of visual tokens; with ``ratio`` the published ones.
        most = max(num_layers // (STAGES + 1), 1)
        spacings = range(1, most + 1) if self.ratio is None else (most,)
        wanted = {spacing * stage for spacing in spacings for stage in range(1, STAGES + 1)}
        return dict.fromkeys(sorted(layer - 1 for layer in wanted if layer < num_layers), Rows.NEXT_LAST)

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if not hasattr(memory, "plans"):
            rows = zip(view.counts, view.prompt_counts, strict=True)
            memory.plans = [self._plan(count, had, view.num_layers) for count, had in rows]
        keep = tuple(
            min(plan.get(view.layer + 1, count), count) for plan, count in zip(memory.plans, view.counts, strict=True)
        )
        if keep == view.counts:
            return None
        first = not hasattr(memory, "has_dropped")
        memory.has_dropped = True
        scores = self.debiased(view, view.relevance_BV) if first else view.relevance_BV
        return view.best(scores, keep)

    def _plan(self, count: int, prompt_count: int, num_layers: int) -> Mapping[int, int]:
        layers = None if self.layers is None else parse_layers(self.layers)
        if self.ratio is not None:
            layers = layers or spaced_layers(num_layers // (STAGES + 1) or 1, num_layers)
            return {layer: max(int(count * self.ratio**stage), 1) for stage, layer in enumerate(layers, 1)}
        return plan_stages(count, num_layers, self.target_of(prompt_count), layers)
