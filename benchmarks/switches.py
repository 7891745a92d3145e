"""Candidates for a faster selection, off by default: each changes the engine from outside, for as long as it is on.

`benchmarks.gpu_check` times each of them, alone and with CUDA graphs; what pays moves into the engine, the rest goes.

- ``half``: the logits of scored rows in the type of the model, the softmax in float32. May choose other tokens.
- ``compiled``: attention rows by `torch.compile`.
- ``side``: attention rows on a stream of their own, beside the layer's own attention and MLP. They are needed behind
  the layer only, so nothing has to be late for it.
- ``fused``: scoring, selecting and moving in one Triton launch (benchmarks/fused.py); ``fused2``: moving in a second
  one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.parts import replaced
from llava.pruning import recycling
from llava.pruning.engine import attention
from llava.pruning.engine.attention import RowScores, VisualAttention, visual_attention
from llava.pruning.engine.sequence import Sequences
from llava.pruning.methods.autoprune import method as autoprune
from llava.pruning.recycling import PruneStep
from llava.pruning.scores import attention_rows
from llava.pruning.types import Selection

_WIDEST = 1024
"""Visual tokens that one program of the fused kernel can order."""


@contextmanager
def switched_on(names: Sequence[str]) -> Iterator[None]:
    """Candidates by name, together."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(SWITCHES[name]())
        yield


def half() -> Any:
    return replaced(attention, "attention_rows", _half_rows)


def _half_rows(query_BHTD: Tensor, key_BGND: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    batch, heads, rows, width = query_BHTD.shape
    groups, keys = key_BGND.shape[1], key_BGND.shape[2]
    stacked = (query_BHTD * scaling).reshape(batch, groups, heads // groups * rows, width)
    logits = (stacked @ key_BGND.transpose(2, 3)).view(batch, heads, rows, keys)
    if mask is not None:
        masked = logits[..., keys - mask.shape[-1] :]
        lowest = torch.finfo(logits.dtype).min
        masked.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else masked.masked_fill_(mask < 0, lowest)
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def compiled() -> Any:
    return replaced(attention, "attention_rows", _compiled_rows())


@functools.cache
def _compiled_rows() -> Callable[..., Tensor]:
    return torch.compile(attention_rows, dynamic=True)


@contextmanager
def side() -> Iterator[None]:
    """Without a CUDA device nothing changes."""
    if not torch.cuda.is_available():
        yield
        return
    stream, see, take = _side_stream(), RowScores._see, RowScores.take

    def seen(self: RowScores, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for tensor in (query, key):
                tensor.record_stream(stream)
            return see(self, module, query, key, value)

    def taken(self: RowScores) -> VisualAttention | None:
        torch.cuda.current_stream().wait_stream(stream)
        found = take(self)
        for tensor in found or ():
            tensor.record_stream(torch.cuda.current_stream())
        return found

    with replaced(RowScores, "_see", seen), replaced(RowScores, "take", taken):
        yield


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@dataclass
class _Late:
    """Attention rows that have not been computed: queries and keys of a layer."""

    query_BHTD: Tensor
    key_BGND: Tensor
    scaling: float
    rows: tuple[int, ...]
    scores: RowScores


@dataclass(frozen=True)
class _Moved(Selection):
    """A selection whose tokens stand where they belong already, ``[B, N, C]``."""

    hidden_BNC: Tensor | None = None


@contextmanager
def fused(move: bool = True) -> Iterator[None]:
    """AutoPrune's layers behind the decision; only where all rows are alike, and at most one token is merged."""
    from benchmarks.fused import score_select_move  # needs Triton

    see, sliced = RowScores._see, Sequences._sliced

    def seen(self: RowScores, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        here, rows = self._sequences, self._rows
        if rows is None or module.layer_idx < 2 or here.block is None or max(here.counts) > _WIDEST:
            return see(self, module, query, key, value)
        self._found = VisualAttention(_Late(query[:, :, -max(rows) :], key, module.scaling, rows, self), None)  # type: ignore[arg-type]
        return None

    def keep_and_recycle(view: Any, scores: Any, steps: Sequence[PruneStep], memory: SimpleNamespace) -> Selection:
        late = view.attention_BHTV
        if not isinstance(late, _Late):
            return recycling.keep_and_recycle(view, scores, steps, memory)
        here, step = view.sequences, steps[0]
        if len(set(steps)) > 1 or step.merged > 1:
            mask = late.scores.frames.row_mask(here, max(late.rows))
            rows = attention.attention_rows(late.query_BHTD, late.key_BGND, late.scaling, mask)
            found = visual_attention(rows, here, late.rows)
            return recycling.keep_and_recycle(view, found.received_BV, steps, memory)
        hidden, ids = score_select_move(
            late.query_BHTD,
            late.key_BGND,
            late.scaling,
            here.hidden_BNC,
            here.block.start,
            max(here.counts),
            step.keep,
            step.recycled,
            move=move,
        )
        costs = memory.report.setdefault("merge_flops", [0] * len(steps))
        for row in range(len(steps)):
            costs[row] += step.merged * step.recycled * hidden.shape[2]
        keep, merged = (step.keep,) * len(steps), (step.merged,) * len(steps)
        return _Moved(ids[:, : step.keep], keep, merged=merged, hidden_BNC=hidden)

    def moved(self: Sequences, selection: Selection, merged: Any, counts: Any, lengths: tuple[int, ...]) -> Sequences:
        if not isinstance(selection, _Moved):
            return sliced(self, selection, merged, counts, lengths)
        positions = self.positions_BN[:, : max(lengths)]
        return replace(self, hidden_BNC=selection.hidden_BNC, lengths=lengths, positions_BN=positions, counts=counts)

    with (
        replaced(RowScores, "_see", seen),
        replaced(Sequences, "_sliced", moved),
        replaced(autoprune, "keep_and_recycle", keep_and_recycle),
    ):
        yield


SWITCHES: dict[str, Callable[[], Any]] = {
    "half": half,
    "compiled": compiled,
    "side": side,
    "fused": fused,
    "fused2": functools.partial(fused, move=False),
}
