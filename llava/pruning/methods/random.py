"""Random visual tokens, chosen before the decoder: the floor that a method must clear.

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
from llava.pruning.selection import top_k
from llava.pruning.types import BEFORE_DECODER, Rows, Selection


@dataclass(frozen=True, kw_only=True)
class Random(DecoderMethod):
    """Keep ``target_tokens`` random visual tokens.

    Attributes:
        seed: together with the running number of the sample it fixes the choice, whatever the batch size or device.
    """

    target_tokens: int | None = 64
    seed: int = 0

    name: ClassVar[str] = "random"

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        return self.choose(view, tuple(map(min, self.targets(view), view.counts)))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        scores = torch.zeros(len(view.counts), max(view.counts))
        for row, (sample, count) in enumerate(zip(view.sample_ids, view.counts, strict=True)):
            # A CPU generator per sample: CUDA streams of random numbers differ between devices.
            stage = 7919 * (view.layer - BEFORE_DECODER)  # in a schedule every stage draws anew
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + sample + stage)
            scores[row, :count] = torch.rand(count, generator=generator)
        return Selection(top_k(scores.to(view.device), view.counts, keep), keep)
