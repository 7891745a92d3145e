"""Schedules: shares of the visual tokens kept in front of given layers, each chosen by a method.

``2:fastv:0.5;16:random:0.5`` keeps half of the tokens in front of layer 2 by the attention of the last token, and in
front of layer 16 half of those at random. Layer 0 is in front of the decoder. There is no ``target_tokens``: the shares
say what is kept. Every method that can choose a given number of tokens after any layer takes part, with its default
options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from llava.pruning.base import BEFORE_DECODER, LayerView, OptionError, PruningMethod, Rows, Selection


@dataclass(frozen=True)
class Stage:
    """One entry: in front of ``layer`` keep ``share`` of the tokens, chosen by ``method``."""

    layer: int
    method: PruningMethod
    share: float


@dataclass(frozen=True, kw_only=True)
class Schedule(PruningMethod):
    """Stages one after another; :func:`schedule` makes the class for a text."""

    name: ClassVar[str]
    entries: ClassVar[tuple[Stage, ...]] = ()

    @property
    def aim(self) -> int | None:
        return None

    @property
    def needs_cls(self) -> bool:
        return any(stage.method.needs_cls for stage in self.entries)

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        for stage in self.entries:
            if stage.layer >= num_layers:
                raise OptionError(f"{self.name}: layer {stage.layer} is not below the {num_layers} of the decoder")
            if stage.layer == 0 and stage.method.rows is not Rows.NONE:
                raise OptionError(f"{self.name}: {stage.method.name} needs attention, which layer 0 has not in front")
        return {stage.layer - 1: stage.method.rows for stage in self.entries}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        (stage,) = (stage for stage in self.entries if stage.layer - 1 == view.layer)
        return stage.method.choose(view, tuple(round(count * stage.share) for count in view.counts))


def schedule(text: str) -> type[Schedule]:
    """The class of a schedule ``LAYER:METHOD:SHARE;...`` with rising layers.

    Raises:
        OptionError: an entry that cannot be read, or a method that cannot choose a given number of tokens.
    """
    from llava.pruning.registry import get_method

    assert BEFORE_DECODER == -1  # "in front of layer 0" is "after layer -1"
    entries: list[Stage] = []
    for entry in text.split(";"):
        parts = [part.strip() for part in entry.split(":")]
        try:
            layer, name, share = int(parts[0]), parts[1], float(parts[2])
        except (ValueError, IndexError):
            layer, name, share = -1, "", 0.0
        if len(parts) != 3 or layer < 0 or not 0 < share <= 1:
            raise OptionError(f"schedule entry '{entry.strip()}' must be LAYER:METHOD:SHARE such as 2:fastv:0.5")
        if entries and layer <= entries[-1].layer:
            raise OptionError(f"schedule '{text}': layers must rise, got {layer} after {entries[-1].layer}")
        kind = get_method(name)
        if kind.choose is PruningMethod.choose:
            raise OptionError(f"schedule '{text}': {name} cannot choose a given number of tokens after a layer")
        entries.append(Stage(layer, kind(), share))
    return type("Schedule", (Schedule,), {"name": text, "entries": tuple(entries), "__doc__": f"Schedule {text}."})
