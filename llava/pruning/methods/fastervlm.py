"""FasterVLM, "[CLS] Attention is All You Need for Training-Free Visual Token Pruning" (arXiv 2412.01818 v1).

Before the decoder, keep the visual tokens with the highest CLS attention of the vision tower's selected layer (mean
over heads), in raster order. Positions are contiguous.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target.

Deviation: for several crops the paper keeps a share per crop; here the tokens of a sample compete with each other.
Patches that are padding have no CLS attention (they are masked), which the published code does not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.selection import top_k
from llava.pruning.types import BEFORE_DECODER, Rows, Selection


@dataclass(frozen=True, kw_only=True)
class FasterVLM(DecoderMethod):
    """Keep the ``target_tokens`` visual tokens with the highest CLS attention."""

    target_tokens: int | None = 64
    positions: str = "compact"

    name: ClassVar[str] = "fastervlm"
    capturable: ClassVar[bool] = True
    needs_cls: ClassVar[bool] = True

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        return self.choose(view, tuple(map(min, self.targets(view), view.counts)))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        return Selection(top_k(view.cls_attention_BV, view.counts, keep), keep)
