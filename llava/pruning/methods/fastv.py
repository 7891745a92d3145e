"""FastV, "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024, arXiv 2403.06764).

After decoder layer ``layer - 1`` the visual tokens that the last prompt token attends to least (mean over heads) are
dropped, once. Survivors keep their positions.

Budget: the paper gives a layer and a ratio. ``target_tokens`` is turned into the count that makes the *processed* mean
meet it, ``(L * T - layer * N) / (L - layer)``, since the layers in front work on all N tokens; where that is below one
token (shallow decoders, small targets, 160 of the 2,880 tokens of LLaVA-1.6 on 32 layers) one token is kept, the mean
stays above the target, and the run says so. ``ratio`` overrides it.

``debias_curve`` and ``debias_padding`` correct the attention for place and padding, see :mod:`llava.pruning.debiasing`.

Deviation: the published in-place code prunes again at every decoding step; here, as in its later port with a cache, the
prefill decides once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from llava.pruning.budget import one_cut
from llava.pruning.debiasing import Debiased
from llava.pruning.engine.view import LayerView
from llava.pruning.types import Rows, Selection


@dataclass(frozen=True, kw_only=True)
class FastV(Debiased):
    """One cut by the attention of the last token.

    Attributes:
        layer: layers that see all visual tokens (K in the paper).
        ratio: fraction of the visual tokens to drop (R in the paper); replaces ``target_tokens``.
    """

    target_tokens: int | None = 64
    layer: int = 2
    ratio: float | None = None

    name: ClassVar[str] = "fastv"
    shares_views: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    published_budget: ClassVar[str] = "processed"
    instead_of_target: ClassVar[str | None] = "ratio"
    rows: ClassVar[Rows] = Rows.LAST

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("layer", self.layer >= 1, "must be at least 1")
        self.require("ratio", self.ratio is None or 0 <= self.ratio < 1, "must lie in 0..1, 1 excluded")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        self.require("layer", self.layer < num_layers, f"must be below the decoder's {num_layers} layers")
        return {self.layer - 1: self.rows}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        rows = zip(view.counts, view.prompt_counts, strict=True)
        keep = tuple(self._keep(count, had, view.num_layers) for count, had in rows)
        return self.choose(view, self.without_padding(view, keep))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        return view.best(self.debiased(view, view.relevance_BV), keep)

    def _keep(self, count: int, prompt_count: int, num_layers: int) -> int:
        if self.ratio is not None:
            return round(count * (1 - self.ratio))
        return one_cut(count, num_layers, self.layer, self.target_of(prompt_count))
