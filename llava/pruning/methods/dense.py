"""No pruning: the baseline that everything is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.types import Rows, Selection


@dataclass(frozen=True, kw_only=True)
class Dense(DecoderMethod):
    """The unmodified model, traced. ``visual_token_num`` still caps the visual tokens if it is given."""

    name: ClassVar[str] = "dense"

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        return None
