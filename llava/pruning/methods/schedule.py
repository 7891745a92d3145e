"""Schedules: shares of the visual tokens kept in front of given layers, each chosen by a method.

``2:fastv:0.5;16:random:0.5`` keeps half of the tokens in front of layer 2 by the attention of the last token, and in
front of layer 16 half of those at random. Layer 0 is in front of the decoder. There is no ``target_tokens``: the shares
say what is kept. Every method that can choose a given number of tokens after any layer takes part, with its default
options.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod, PruningMethod
from llava.pruning.types import BEFORE_DECODER, LayerFact, OptionError, Rows, Selection


@dataclass(frozen=True)
class Stage:
    """One entry: in front of ``layer`` keep ``share`` of the tokens, chosen by ``method``."""

    layer: int
    method: DecoderMethod
    share: float


@dataclass(frozen=True, kw_only=True)
class Schedule(DecoderMethod):
    """Stages one after another; :class:`ScheduleSpec` reads it from a text.

    Attributes:
        text: as it was given.
        entries: the stages.
    """

    text: str = ""
    entries: tuple[Stage, ...] = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.text

    def settings(self) -> dict[str, Any]:
        """Without the stages: the name says them."""
        return {key: value for key, value in super().settings().items() if key not in ("text", "entries")}

    def aim_of(self, count: int) -> int | None:
        return None

    @property
    def counts_alike(self) -> bool:
        return True  # there is no budget

    @property
    def shares_views(self) -> bool:  # type: ignore[override]
        return all(stage.method.shares_views for stage in self.entries)

    @property
    def needs_cls(self) -> bool:  # type: ignore[override]
        return any(stage.method.needs_cls for stage in self.entries)

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        for stage in self.entries:
            if stage.layer >= num_layers:
                raise OptionError(f"{self.name}: layer {stage.layer} is not below the {num_layers} of the decoder")
            method = stage.method
            if stage.layer == 0 and (method.rows is not Rows.NONE or method.facts or method.reads_keys):
                needed = "facts of a layer" if method.rows is Rows.NONE else "attention"
                raise OptionError(f"{self.name}: {method.name} needs {needed}, and there is none in front of layer 0")
        return {stage.layer - 1: stage.method.rows for stage in self.entries}

    def layer_facts(self, num_layers: int) -> Mapping[int, Collection[LayerFact]]:
        return {stage.layer - 1: stage.method.facts for stage in self.entries}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        (stage,) = (stage for stage in self.entries if stage.layer - 1 == view.layer)
        return stage.method.choose(view, tuple(round(count * stage.share) for count in view.counts))


@dataclass(frozen=True)
class ScheduleSpec:
    """The stages of a schedule, read and checked; used like the class of a method."""

    name: str
    entries: tuple[Stage, ...]
    __name__ = "Schedule"

    @classmethod
    def read(cls, text: str, kind_of: Callable[[str], type[PruningMethod]]) -> ScheduleSpec:
        """Read ``LAYER:METHOD:SHARE;...`` with rising layers.

        Args:
            text: the schedule.
            kind_of: the class of a method's name.

        Raises:
            OptionError: an entry that cannot be read, or a method that cannot choose a given number of tokens.
        """
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
            kind = kind_of(name)
            if not issubclass(kind, DecoderMethod) or kind.choose is DecoderMethod.choose:
                raise OptionError(f"schedule '{text}': {name} cannot choose a given number of tokens after a layer")
            entries.append(Stage(layer, kind(), share))
        return cls(text, tuple(entries))

    def __call__(self, **options: Any) -> Schedule:
        return self.from_options(options)

    def options(self) -> dict[str, Any]:
        """Options of all methods; a schedule has no others."""
        return PruningMethod.options()

    def from_options(self, options: Mapping[str, Any]) -> Schedule:
        """The schedule with options of all methods.

        Raises:
            OptionError: unknown option, or a value of the wrong kind.
        """
        unknown = [key for key in options if key not in self.options()]
        if unknown:
            raise OptionError(
                f"method '{self.name}' has no option '{unknown[0]}'; valid options: {', '.join(self.options())}"
            )
        return Schedule.from_options({**options, "text": self.name, "entries": self.entries})
