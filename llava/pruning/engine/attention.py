"""Attention rows of a layer for its selection, beside the layer's own fused attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from llava import compat
from llava.pruning.engine.layer_inputs import LayerInputsOf
from llava.pruning.engine.sequence import Sequences, padding_mask
from llava.pruning.scores import attended, attention_rows, received_attention, rotate_rows
from llava.pruning.selection import counts_to_mask, on_device
from llava.pruning.types import LayerFact


class VisualAttention(NamedTuple):
    """Attention of query rows to the visual tokens.

    Attributes:
        rows_BHTV: float32 probabilities of each row's last tokens, not renormalized, zero in the padding.
        received_BV: what each visual token receives: mean over heads, then over the rows.
    """

    rows_BHTV: Tensor
    received_BV: Tensor


class RowScores:
    """Attention rows of the layers for which a method asks, from the very queries and keys that a layer attends with.

    They are computed inside the layer, in front of its own attention: there queries and keys are still in the
    processor's caches; behind the MLP its weights have driven them out. On a CPU, where attention takes a good part of
    a layer's time, the layer takes the outputs of these rows from the same probabilities and attends for the others.
    Facts of the layer that are made of the same tensors are taken here, too.
    """

    def __init__(
        self, layers: Iterable[Any], frames: LayerInputsOf, timer: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.frames, self.timer = frames, timer
        self._watch = compat.AttentionWatch([layer.self_attn for layer in layers], self._see)
        self._rows: tuple[int, ...] | None = None
        self._wanted: frozenset[LayerFact] = frozenset()
        self._found: VisualAttention | None = None
        self._facts: dict[LayerFact, Tensor] = {}

    def __enter__(self) -> RowScores:
        self._watch.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._watch.__exit__(*exc)

    def of_next(self, sequences: Sequences, rows: tuple[int, ...] | None, facts: Collection[LayerFact] = ()) -> None:
        """Say which rows the layer that runs next has to score, per batch row the last ``rows[i]``, and which facts
        are wanted of it; None: no rows.
        """
        self._sequences, self._rows, self._wanted = sequences, rows, _SEEN_HERE.intersection(facts)

    def take(self) -> VisualAttention | None:
        """What the layer that has just run found; None if no rows were asked for."""
        found, self._found = self._found, None
        if self._rows is not None and found is None:
            raise RuntimeError("the layer did not ask transformers for its attention function, so its rows are unknown")
        return found

    def take_facts(self) -> dict[LayerFact, Tensor]:
        """The facts that were wanted of the layer that has just run."""
        facts, self._facts = self._facts, {}
        if self._wanted - set(facts):
            raise RuntimeError("the layer did not ask transformers for its attention function, so it tells nothing")
        return facts

    def _see(self, attention: Any, query_BHND: Tensor, key_BGND: Tensor, value_BGND: Tensor) -> Tensor | None:
        if self._rows is None and not self._wanted:
            return None
        with self.timer():
            here = self._sequences
            if here.hidden_BNC.device != query_BHND.device:  # the layer lives on another one
                here = here.advance(here.hidden_BNC.to(query_BHND.device))
            if LayerFact.QUERIES in self._wanted:
                self._facts[LayerFact.QUERIES] = here.gather_visual(query_BHND.transpose(2, 3)).transpose(2, 3)
            if self._rows is None:
                return None
            most = max(self._rows)
            mask = self.frames.row_mask(here, most)
            probabilities = attention_rows(query_BHND[:, :, -most:], key_BGND, attention.scaling, mask)
            self._found = visual_attention(probabilities, here, self._rows)
            if LayerFact.TEXT_ATTENTION in self._wanted:
                self._facts[LayerFact.TEXT_ATTENTION] = text_attention(probabilities, self._rows)
        return attended(probabilities, value_BGND) if query_BHND.device.type == "cpu" else None


_SEEN_HERE = frozenset({LayerFact.QUERIES, LayerFact.TEXT_ATTENTION})


def next_layer_attention(
    layer: Any, sequences: Sequences, frames: LayerInputsOf, rows: tuple[int, ...]
) -> VisualAttention:
    """What the last ``rows[i]`` tokens of each batch row will attend to in ``layer``, which has not run yet.

    The layer will want the keys of those tokens that are left: ``sequences`` keep what was projected for it.
    """
    attention, here = layer.self_attn, sequences.hidden_BNC.device
    there = sequences.advance(sequences.hidden_BNC.to(compat.execution_device(layer.input_layernorm)))
    frame = frames.of(there)
    normed = layer.input_layernorm(there.hidden_BNC)
    # The decoders in support.NEXT_LAYER_DECODERS project this way, some with a norm over each head (Qwen3).
    most = max(rows)
    queries = _heads(attention, "q", attention.q_proj(normed[:, -most:]))
    queries = rotate_rows(queries, *(table[:, -most:] for table in frame.rotary))
    projected_BNF: Tensor = attention.k_proj(normed)
    if projected_BNF.device == here:
        sequences.keys_BNF = projected_BNF
    keys = rotate_rows(_heads(attention, "k", projected_BNF), *frame.rotary)
    probabilities = attention_rows(queries, keys, attention.scaling, frames.row_mask(there, most))
    found = visual_attention(probabilities, there, rows)
    return VisualAttention(*(values.to(here) for values in found))


@contextmanager
def projected_keys(layer: Any, keys_BNF: Tensor | None) -> Iterator[None]:
    """The layer takes these as what it would project keys to; None: it projects them itself."""
    if keys_BNF is None:
        yield
        return
    module, known = layer.self_attn.k_proj, keys_BNF
    own = vars(module).get("forward")
    module.forward = lambda *_: known
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _heads(attention: Any, name: str, projected_BNF: Tensor) -> Tensor:
    """Queries or keys in front of the rotary embedding, ``[B, heads, N, D]``."""
    projected = projected_BNF.reshape(*projected_BNF.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, f"{name}_norm", None)
    heads: Tensor = (projected if norm is None else norm(projected)).transpose(1, 2)
    return heads


def visual_attention(attention_BHTN: Tensor, sequences: Sequences, rows: tuple[int, ...]) -> VisualAttention:
    """Attention of each row's last ``rows[i]`` tokens to its visual tokens, from that of ``max(rows)`` to all."""
    most, device = max(rows), attention_BHTN.device
    attention = sequences.gather_visual(attention_BHTN)
    divisor = None
    if min(rows) < most:
        attention = attention * padding_mask(rows, most, device)[:, None, :, None]
        divisor = on_device(rows, device)
    if min(sequences.counts) < max(sequences.counts):
        attention = attention * counts_to_mask(sequences.counts, attention.shape[-1], device)[:, None, None, :]
    return VisualAttention(attention, received_attention(attention, divisor))


def text_attention(attention_BHTN: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Attention of each row's last ``rows[i]`` tokens to each other, ``[B, H, T, T]``, zero in the padding in front."""
    most = max(rows)
    attention = attention_BHTN[..., -most:]
    if min(rows) < most:
        real = padding_mask(rows, most, attention.device)
        attention = attention * (real[:, :, None] & real[:, None])[:, None]
    return attention
