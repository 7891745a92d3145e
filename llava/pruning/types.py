"""What methods and the engine say to each other: stages and attention rows, selections, errors."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

BEFORE_DECODER = -1
"""Stage number of a selection among the input embeddings, before decoder layer 0."""


class Rows(enum.Enum):
    """Which attention rows of a layer a method needs for its selection after that layer."""

    NONE = "none"
    TEXT = "text"  # every token behind the last visual token
    LAST = "last"  # the last token of the prompt
    NEXT_LAST = "next_last"  # the last token, as the next layer would attend: with that layer's norm and projections
    NEXT_TEXT = "next_text"  # every token behind the last visual token, as the next layer would attend


class LayerFact(enum.Enum):
    """What a layer can tell beside attention rows; see :meth:`~llava.pruning.engine.view.LayerView.layer_fact`.

    Shapes: B rows, V visual tokens, H query heads, D head width, T text rows, N tokens, C channels.
    """

    QUERIES = "queries of the visual tokens as the layer attends with them, [B, H, V, D]"
    TEXT_ATTENTION = "float32 probabilities of the rows of Rows.TEXT over the tokens of these rows, [B, H, T, T]"
    BLOCKS = "what goes into and comes out of attention and MLP, for all tokens: BlockStates of [B, N, C]"


class UnsupportedError(ValueError):
    """What was asked for cannot be pruned; the message names it and says what can be done."""

    is_user_error = True


class OptionError(ValueError):
    """An unknown method or option, or a value out of range: the mistake of whoever typed it, not of the program."""

    is_user_error = True


class OwnDefault(str):
    """The default of a method's option where that matters: the same text, given by somebody, is a plain ``str``."""

    __slots__ = ()


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
        weights: gives float ``[B, M, V]``, how much of each visual token is in each merged one. Asked only where more
            than hidden states travels with the tokens (deepstack features); None: all of the source.
    """

    keep_BK: Tensor
    keep: tuple[int, ...]
    merged_BMC: Tensor | None = None
    merged: tuple[int, ...] | None = None
    source_BM: Tensor | None = None
    weights: Callable[[], Tensor] | None = None
