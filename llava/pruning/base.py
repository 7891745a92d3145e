"""What a pruning method is: what it declares, what it is shown, what it returns.

A method is a frozen dataclass of options. It never sees a module, a cache, a rotary embedding or a prompt: the engine
shows it a :class:`LayerView` after each layer it asked for and carries out the :class:`Selection` it returns.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.pruning.budget import BUDGETS
from llava.pruning.selection import on_device
from llava.pruning.sequence import Sequences
from llava.pruning.vision import CLS_ATTENTION, Reduction, TowerMerge, TowerView, VisionFact, VisionView

BEFORE_DECODER = -1
"""Stage number of a selection among the input embeddings, before decoder layer 0."""


class Rows(enum.Enum):
    """Which attention rows of a layer a method needs for its selection after that layer."""

    NONE = "none"
    TEXT = "text"  # every token behind the last visual token
    LAST = "last"  # the last token of the prompt
    NEXT_LAST = "next_last"  # the last token, as the next layer would attend: with that layer's norm and projections


class UnsupportedError(ValueError):
    """What was asked for cannot be pruned; the message names it and says what can be done."""

    is_user_error = True


class OptionError(ValueError):
    """An unknown method or option, or a value out of range: the mistake of whoever typed it, not of the program."""

    is_user_error = True


@dataclass(frozen=True)
class Selection:
    """Visual tokens to keep, and vectors to append to them.

    Attributes:
        keep_BK: ascending indices into the row's current visual tokens; entries behind ``keep[i]`` have the value V
            (the padded number of visual tokens), as :func:`~llava.pruning.selection.top_k` returns them.
        keep: kept tokens per row.
        merged_BMC: merged tokens, appended behind the last visual token of the row; None if there are none.
        merged: merged tokens per row.
        source_BM: for every merged token the index of the visual token whose position it takes in position mode
            ``original``.
    """

    keep_BK: Tensor
    keep: tuple[int, ...]
    merged_BMC: Tensor | None = None
    merged: tuple[int, ...] | None = None
    source_BM: Tensor | None = None


@dataclass(frozen=True)
class SampleIds:
    """Running number of each row's sample, and whether that number depends on which of several threads came first."""

    ids: tuple[int, ...]
    by_chance: bool = False


@dataclass
class LayerView:
    """What a method sees after a layer (or, at ``BEFORE_DECODER``, of the input embeddings).

    Tensors that only some methods want are computed when first asked for. Visual tokens come in sequence order, padded
    at the end to the longest row; merged tokens are ordinary ones.

    Attributes:
        layer: index of the layer just run, or ``BEFORE_DECODER``.
        num_layers: layers of the decoder.
        counts: visual tokens per row, before this selection.
        query_rows: attention rows per batch row (at least 1).
        attention_BHTV: float32 probabilities of the declared rows over the visual tokens, not renormalized, zero in
            the padding; None if no rows were declared.
        relevance_BV: attention that each visual token receives: mean over heads, then over the declared rows. float32.
        samples: running number of each sample; methods use :attr:`sample_ids`.
        sequences: the engine's state; methods use the properties below instead.
        initial_facts: what the vision tower said, by name and original visual index, ``[B, N, ...]``.
    """

    layer: int
    num_layers: int
    counts: tuple[int, ...]
    query_rows: tuple[int, ...]
    attention_BHTV: Tensor | None
    relevance_BV: Tensor | None
    samples: SampleIds
    sequences: Sequences
    initial_facts: Mapping[str, Tensor]

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """Running number of each sample within the run, the same whatever the batch size.

        Raises:
            UnsupportedError: several threads share the run, so that the numbers would depend on who came first.
        """
        if self.samples.by_chance:
            raise UnsupportedError(
                "several threads share one pruning run, and this method draws by the running number of the sample: "
                "give set_visual(sample_ids=...), or attach the run in one thread at a time"
            )
        return self.samples.ids

    @cached_property
    def hidden_BVC(self) -> Tensor:
        """Hidden states of the visual tokens leaving the layer, ``[B, V, C]``; gathered when first asked for."""
        return self.sequences.visual_hidden()

    def hidden_of(self, index_BK: Tensor) -> Tensor:
        """Hidden states of some visual tokens only, ``[B, K, C]``; indices ``[B, K]`` below V."""
        return self.sequences.hidden_of(index_BK)

    @cached_property
    def query_rows_B(self) -> Tensor | int:
        """``query_rows`` for arithmetic with tensors ``[B]``: one number if all are equal."""
        if min(self.query_rows) == max(self.query_rows):
            return self.query_rows[0]
        return on_device(self.query_rows, self.device)

    @cached_property
    def text_BTC(self) -> Tensor:
        """Hidden states of the text rows, ``[B, T, C]``, where row i is valid in its *last* ``query_rows[i]`` places.

        Only in a stage with ``Rows.TEXT`` or ``Rows.NONE``: with ``Rows.LAST`` it is the last token alone.
        """
        return self.sequences.hidden_BNC[:, -max(self.query_rows) :]

    @cached_property
    def cls_attention_BV(self) -> Tensor:
        """CLS attention of the current visual tokens, float32 ``[B, V]``; 0 for merged tokens."""
        return self.vision_fact(CLS_ATTENTION)

    def vision_fact(self, name: str) -> Tensor:
        """A declared fact of the vision tower for the current visual tokens, ``[B, V, ...]``; 0 for merged tokens."""
        origins = self.sequences.visual_origins()
        values = self.initial_facts[name].to(origins.device)  # given where the embeddings are
        shape = (*origins.shape, *[1] * (values.ndim - 2))
        index = origins.clamp_min(0).view(shape).expand(*origins.shape, *values.shape[2:])
        return values.gather(1, index).masked_fill((origins < 0).view(shape), 0)

    @property
    def device(self) -> torch.device:
        return self.sequences.hidden_BNC.device


@dataclass(frozen=True, kw_only=True)
class PruningMethod:
    """Base of all methods. Fields are the options: Python keyword = ``--method-args`` key.

    Attributes:
        target_tokens: budget, the mean number of visual tokens per decoder layer; None means no budget.
        positions: ``compact`` renumbers the survivors 0, 1, 2, ... in every layer; ``original`` keeps their positions.
        budget: which mean meets the target. ``nominal``: as the method's paper counts it (for most the tokens leaving
            the layers, for some those entering, see the method). ``processed``: the tokens that the layers compute on,
            for every method, so that methods can be compared at equal cost.
        visual_token_num: before anything else keep at most this many visual tokens of each image, those with the
            highest CLS attention; an image of several crops keeps of each crop in proportion to its size.
    """

    target_tokens: int | None = None
    positions: str = "original"
    visual_token_num: int | None = None
    budget: str = "nominal"

    name: ClassVar[str]
    needs_cls: ClassVar[bool] = False
    published_budget: ClassVar[str] = "nominal"  # what the paper's budget counts
    instead_of_target: ClassVar[str | None] = None  # an option that replaces `target_tokens` where it is given
    rows: ClassVar[Rows] = Rows.NONE  # attention rows that `choose` looks at
    reduces_vision: ClassVar[bool] = False  # whether `reduce` takes part
    merges_in_tower: ClassVar[bool] = False  # whether `merge` takes part

    def __post_init__(self) -> None:
        for option in ("target_tokens", "visual_token_num"):
            value = getattr(self, option)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{option} must be an integer of at least 1, got {value!r}")
        if self.positions not in ("compact", "original"):
            raise OptionError(f"positions must be 'compact' or 'original', got {self.positions!r}")
        if self.budget not in BUDGETS:
            raise OptionError(f"budget must be 'nominal' or 'processed', got {self.budget!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            self.require(field.name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")
        # What works in front of the decoder can do with the cap alone.
        free = type(self).target_tokens is None or self.reduces_vision or self.merges_in_tower
        if self.target_tokens is None and self._replacement is None and not free:
            options = " or ".join(filter(None, ("target_tokens", self.instead_of_target)))
            raise OptionError(f"{self.name} needs {options}")

    def require(self, option: str, valid: bool, wish: str) -> None:
        """Raise an :class:`OptionError` that names the option, what is wished of it, and its value."""
        if not valid:
            raise OptionError(f"{option} {wish}, got {getattr(self, option)!r}")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        """Layers after which the method selects (or ``BEFORE_DECODER``), with the attention rows it needs there."""
        return {}

    def select(self, view: LayerView, memory: types.SimpleNamespace) -> Selection | None:
        """Choose among ``view``'s visual tokens; None leaves them all.

        ``memory`` is new in every prefill and lives until its end: whatever the method has to remember from one layer
        to the next. What it leaves there under ``report`` (name -> one value per row) goes into the trace.
        """
        raise NotImplementedError

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        """Keep that many tokens per row, whatever the layer: what makes a method usable in a schedule (optional)."""
        raise NotImplementedError

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        """What the vision tower has to say about each patch, by names of the method's choice; nothing else is computed.

        ``needs_cls`` is short for the one fact ``cls_attention`` of the layer whose output is used.
        """
        return {}

    def reduce(self, view: VisionView) -> Reduction:
        """Reduce crops to ``view.target`` tokens each, in front of the projector (if ``reduces_vision``)."""
        raise NotImplementedError

    def merge(self, view: TowerView) -> TowerMerge | None:
        """Merge tokens inside a layer of the vision tower, between attention and MLP (if ``merges_in_tower``).

        In the last layer it is asked again, with the merged tokens, until it returns None.
        """
        raise NotImplementedError

    @property
    def budget_kind(self) -> str:
        """Which mean is to meet ``target_tokens``: ``nominal`` or ``processed``."""
        return "processed" if self.budget == "processed" else self.published_budget

    @property
    def aim(self) -> int | None:
        """The mean that the method tries to meet; None if other options decide how much is kept."""
        return self.target_tokens if self._replacement is None else None

    @property
    def _replacement(self) -> Any:
        return None if self.instead_of_target is None else getattr(self, self.instead_of_target)

    @property
    def parts(self) -> tuple[PruningMethod, ...]:
        """The methods that act one after another: one, except in a composition."""
        return (self,)

    def attach(self, model: nn.Module):
        """Context manager (a ``PruningRun``) that prunes inside ``model`` and afterwards leaves it as it was."""
        from llava.pruning.run import PruningRun  # methods know nothing of modules; only this shortcut does

        return PruningRun(self, model)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names with their defaults."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> PruningMethod:
        """Build the method from option values; strings (command line) are converted to the type of the field.

        Raises:
            OptionError: unknown option (the message lists the valid ones), or a value of the wrong kind.
        """
        hints = typing.get_type_hints(cls)
        known = cls.options()
        values = {}
        for key, value in options.items():
            if key not in known:
                raise OptionError(f"method '{cls.name}' has no option '{key}'; valid options: {', '.join(known)}")
            values[key] = _convert(value, hints[key], key) if isinstance(value, str) else value
        return cls(**values)


def _convert(text: str, hint: Any, option: str) -> Any:
    kinds: Sequence[type] = typing.get_args(hint) or (hint,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    wanted = " or ".join(kind.__name__ for kind in kinds if kind is not types.NoneType)
    raise OptionError(f"option '{option}' must be of type {wanted}, got '{text}'")
