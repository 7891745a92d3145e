"""Random visual tokens, chosen before the decoder: the floor that a method must clear.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from llava.pruning.draws import uniform_draws
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
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
    shares_views: ClassVar[bool] = True

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        return self.choose(view, tuple(map(min, self.targets(view), view.counts)))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        return view.best(uniform_draws(view, self.seed, view.counts), keep)
