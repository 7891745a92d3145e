"""Evenly spaced visual tokens, chosen before the decoder.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch

from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.types import BEFORE_DECODER, Rows, Selection


@dataclass(frozen=True, kw_only=True)
class Uniform(DecoderMethod):
    """Keep every ``N / target_tokens``-th visual token of the raster sequence (the middle of each of T equal parts)."""

    target_tokens: int | None = 64

    name: ClassVar[str] = "uniform"

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        return self.choose(view, tuple(map(min, self.targets(view), view.counts)))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        chosen = torch.full((len(keep), max(keep)), max(view.counts))
        for row, (kept, count) in enumerate(zip(keep, view.counts, strict=True)):
            # Integer arithmetic: (2i + 1) / 2 parts of length count / kept, rounded down, never repeats an index.
            chosen[row, :kept] = (2 * torch.arange(kept) + 1) * count // max(2 * kept, 1)
        return Selection(chosen.to(view.device), keep)
