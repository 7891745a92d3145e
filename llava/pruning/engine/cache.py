"""What decoding must remember of a pruned prefill: how long each layer's cache is and where its next token stands.

The keys and values themselves stay in transformers' cache; this record travels with it as an attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llava import compat
from llava.pruning.engine.sequence import padding_mask
from llava.pruning.selection import on_device

_ATTRIBUTE = "pruning_record"
_SPARE = 256
"""Columns of a table of masks beyond those that are needed now."""
_ALIGNED = 64
"""Rows of such a table start at multiples of it: fused kernels copy masks whose rows start at odd places."""


@dataclass(frozen=True)
class CacheRecord:
    """Lengths after the prefill, per layer.

    Attributes:
        widths: cached tokens per layer, padding included.
        lengths: per layer, real tokens of each row.
        next_positions_LB: rotary position of the first new token, per layer and row.
        tables: masks of single new tokens that were made already, see :meth:`_one_token_masks`.
    """

    widths: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    next_positions_LB: Tensor
    tables: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def attach_to(self, cache: Any, width: int) -> None:
        """Let the record travel with the cache of a prompt of ``width`` tokens, padding included."""
        setattr(cache, _ATTRIBUTE, self)
        if self.widths[0] != width:
            compat.answer_length(cache, width - self.widths[0])

    @staticmethod
    def of(cache: Any) -> CacheRecord | None:
        """The record of a cache that was filled by a pruned prefill, else None."""
        return getattr(cache, _ATTRIBUTE, None)

    def repeats(self, batch: int) -> int:
        """How many consecutive rows of a batch share one row of this record (beams, several return sequences).

        Beam search only exchanges rows that come from the same prompt, and those have equal lengths, so the record
        needs no reordering.
        """
        rows = len(self.lengths[0])
        if batch % rows:
            raise ValueError(f"the pruned cache was filled with {rows} rows and cannot serve a batch of {batch}")
        return batch // rows

    def positions(self, decoded: int, new_tokens: int, batch: int, device: torch.device) -> Tensor:
        """Rotary positions of new tokens, ``[L, B, new_tokens]``, after ``decoded`` earlier ones."""
        first, repeats = self.next_positions_LB.to(device), self.repeats(batch)
        if repeats > 1:
            first = first.repeat_interleave(repeats, dim=1)
        if new_tokens == 1:
            return first[:, :, None] + decoded
        return first[:, :, None] + torch.arange(decoded, decoded + new_tokens, device=device)

    @cached_property
    def starts(self) -> tuple[tuple[int, ...] | None, ...]:
        """Per layer, the padding in front of each row; None where no row is padded. It never changes."""
        return tuple(
            None if min(lengths) == width else tuple(width - length for length in lengths)
            for width, lengths in zip(self.widths, self.lengths, strict=True)
        )

    def masks(
        self, config: Any, hidden_BQC: Tensor, cache: Any, decoded: int
    ) -> Callable[[int, Tensor], Tensor | None]:
        """What new tokens may look at: a function from a layer and its hidden states to the mask.

        Masks have the form that the attention implementation of ``config`` expects. To be asked before the layer's
        cache grows; layers of one width and the same padding share a mask.
        """
        batch, new_tokens = hidden_BQC.shape[:2]
        made: dict[tuple[Any, ...], Tensor | None] = {}

        def make(layer: int, hidden: Tensor) -> Tensor | None:
            starts, keys = self.starts[layer], self.widths[layer] + decoded + new_tokens
            if new_tokens == 1:
                if starts is None:
                    return None  # it may look at every token
                # The type of what attention computes with, whatever the embeddings have.
                dtype = compat.cached_keys(cache, layer).dtype
                table = self._one_token_masks(config, batch, decoded, dtype, hidden.device)
                if table is not None:
                    return table[self._padded[starts]][..., :keys]
            padding = None
            if starts is not None:
                padding = padding_mask(tuple(keys - start for start in starts), keys, hidden.device)
                padding = padding.repeat_interleave(self.repeats(batch), dim=0)
            return compat.causal_mask(config, hidden, padding, cache, layer)

        def mask(layer: int, hidden: Tensor) -> Tensor | None:
            key = self.widths[layer], self.starts[layer]
            if key not in made:
                made[key] = make(layer, hidden)
            return made[key]

        return mask

    @cached_property
    def _padded(self) -> dict[tuple[int, ...], int]:
        """Row in the table of masks, for every padding there is."""
        return {starts: row for row, starts in enumerate(dict.fromkeys(s for s in self.starts if s is not None))}

    def _one_token_masks(
        self, config: Any, batch: int, decoded: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Masks ``[paddings, B, .., columns]`` of one new token per row. None: of a form that is not known here.

        Padding stays in front, so the mask of a step is the one of the step before with a column more: one table
        serves all layers and many steps, and the masks are parts of it.
        """
        key, columns = (batch, dtype, device), max(self.widths) + decoded + 1
        known = key in self.tables
        table = self.tables[key] if known else None
        if not known or (table is not None and table.shape[-1] < columns):
            columns = -(-(columns + _SPARE) // _ALIGNED) * _ALIGNED
            repeats = self.repeats(batch)
            starts = on_device([[start for start in row for _ in range(repeats)] for row in self._padded], device)
            real = torch.arange(columns, device=device) >= starts[:, :, None]
            table = self.tables[key] = compat.one_token_masks(config, real, dtype)
        return table
