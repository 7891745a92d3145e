"""DivPrune, "Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025, arXiv 2503.02175).

Before the decoder, choose the visual tokens that are most unlike each other: start with the token whose nearest
neighbor is farthest (cosine distance of the projected features), then always add the one whose distance to the chosen
set is largest. Raster order, contiguous positions. Neither text nor attention is looked at.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target (the
paper gives a ratio of the visual tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from llava.pruning.diversity import max_min_order
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.selection import first_in_sequence_order, on_device
from llava.pruning.types import BEFORE_DECODER, Rows, Selection


@dataclass(frozen=True, kw_only=True)
class DivPrune(DecoderMethod):
    """Keep the ``target_tokens`` most diverse visual tokens."""

    target_tokens: int | None = 64
    positions: str = "compact"

    name: ClassVar[str] = "divprune"
    shares_views: ClassVar[bool] = True
    capturable: ClassVar[bool] = True

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        return self.choose(view, tuple(map(min, self.targets(view), view.counts)))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        room = None
        if view.views is not None:
            room = view.views.view_BV, view.views.quotas(on_device(keep, view.device))
        order = max_min_order(view.hidden_BVC, view.counts, max(keep), room)
        return Selection(first_in_sequence_order(order, keep, width=max(view.counts)), keep)
