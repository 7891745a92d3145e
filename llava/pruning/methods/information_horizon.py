"""Random choice behind the information horizon (arXiv 2512.07580).

Deep in the decoder, the paper finds, visual tokens have handed over what they know: no criterion beats chance there. So
a method that works early is followed by one random cut in front of layer 20 of 32. This is that cut, to be composed:
``--method divprune+information_horizon --method-args divprune.target_tokens=96,target_tokens=64``.

Budget: ``target_tokens`` is the *processed* mean, counted over all layers, whatever happened before: what the layers in
front of the cut have left of it is shared by those behind. DivPrune with 284 tokens leaves 38 for a mean of 192, with
96 tokens 10 for 64, as in the paper's scripts. Alone the method can only meet budgets above ``layer / L`` of all
tokens; at least one token stays.

``layer`` is scaled with the depth unless given; the horizon of stronger models and of tasks like OCR lies deeper.
Deviation: the published figures are means of three repeats; give other values of ``seed``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from llava.pruning.budget import scaled_layers
from llava.pruning.engine.view import LayerView
from llava.pruning.methods.random import Random
from llava.pruning.types import Rows, Selection

_LAYER, _DEPTH = 20, 32


@dataclass(frozen=True, kw_only=True)
class InformationHorizon(Random):
    """Random tokens in the deep layers.

    Attributes:
        layer: layer in front of which tokens are dropped; None: 20 of 32.
    """

    layer: int | None = None

    name: ClassVar[str] = "information_horizon"
    published_budget: ClassVar[str] = "processed"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("layer", self.layer is None or self.layer >= 1, "must be at least 1")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        if self.layer is not None:
            self.require("layer", self.layer < num_layers, f"must be below the decoder's {num_layers} layers")
            return {self.layer - 1: Rows.NONE}
        return dict.fromkeys(scaled_layers((_LAYER - 1,), _DEPTH, num_layers), Rows.NONE)

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        layers_left = view.num_layers - view.layer - 1
        keep = []
        for row, (count, target) in enumerate(zip(view.counts, self.targets(view), strict=True)):
            spent = sum(layer[row] for layer in view.entered)
            # Behind the last layer there is nobody to save anything for.
            left = (view.num_layers * target - spent) // layers_left if layers_left else count
            keep.append(min(max(left, 1), count))
        return self.choose(view, tuple(keep))
