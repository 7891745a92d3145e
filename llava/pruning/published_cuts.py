"""Methods that drop tokens after three layers, as many as their papers list: SparseVLM in both versions, AdaptInfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from llava.pruning.budget import PublishedLists, parse_layers
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.types import Rows


@dataclass(frozen=True, kw_only=True)
class PublishedCuts(DecoderMethod):
    """Cuts after a few layers, by the lists of a paper.

    Attributes:
        layers: layers after which tokens are dropped, such as ``2/6/15``; ``scaled``: the published ones at the same
            relative depth; None: the published ones where the decoder has them (and the method keeps them at every
            depth), otherwise scaled.
    """

    layers: str | None = None

    rows: ClassVar[Rows] = Rows.TEXT
    published: ClassVar[PublishedLists]
    at_every_depth: ClassVar[bool] = True  # whether the published code cuts at the same layers in any decoder

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = self.layers in (None, "scaled") or parse_layers(self.layers or "") is not None
        example = "/".join(map(str, self.published.layers))
        self.require("layers", rising, f"must be rising layer indices such as {example}, or 'scaled'")

    def cut_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers after which tokens are dropped."""
        if self.layers is None and self.at_every_depth and self.published.layers[-1] < num_layers:
            return self.published.layers
        if self.layers in (None, "scaled"):
            return self.published.scaled(num_layers)
        layers = parse_layers(self.layers or "") or ()
        self.require("layers", layers[-1] < num_layers, f"must be below the decoder's {num_layers} layers")
        return layers

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return dict.fromkeys(self.cut_layers(num_layers), self.rows)

    def planned(self, view: LayerView) -> list[tuple[int, ...]]:
        """Per row the tokens to keep after each of the layers; in front of the first cut."""
        layers = self.cut_layers(view.num_layers)
        return [
            self.keep_list(count, view.num_layers, layers, target)
            for count, target in zip(view.counts, self.targets(view), strict=True)
        ]

    def keep_list(self, count: int, num_layers: int, layers: tuple[int, ...], target: int) -> tuple[int, ...]:
        """Tokens to keep after each of the layers of one row."""
        return self.published.keep(count, num_layers, layers, target, self.budget_kind)
