"""What a prefill is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from llava.pruning.engine.layout import VisualLayout
    from llava.pruning.engine.view import SampleIds
    from llava.pruning.vision import ReducedRow


@dataclass(frozen=True)
class Prompt:
    """Input of a prefill.

    Attributes:
        hidden_BNC: embeddings, left padded.
        lengths: real tokens per row.
        positions_BN: rotary positions, ``[1 or B, N]`` or ``[B, N, axes]``; None numbers the tokens of each row from 0.
        layout: where the visual tokens are.
        facts: what the vision tower said, by name, per original visual index ``[B, N, ...]``, padded at the end.
        samples: running number of each sample within the run.
        reduced: per row what a reduction in front of the decoder left behind; None if there was none.
        added_BNF: what the first layers add to their outputs, side by side ``[B, N, layers * C]`` (deepstack).
        index_BN: number of each token in the sequence that the decoder was given; to be followed through the layers.
        width: length of that sequence; default: that of ``hidden_BNC``.
        members: note of merged tokens which ones they are made of.
    """

    hidden_BNC: Tensor
    lengths: tuple[int, ...]
    positions_BN: Tensor | None
    layout: VisualLayout
    facts: Mapping[str, Tensor]
    samples: SampleIds
    reduced: Sequence[ReducedRow] | None = None
    added_BNF: Tensor | None = None
    index_BN: Tensor | None = None
    width: int | None = None
    members: bool = False
