"""What decoding must remember of a pruned prefill: how long each layer's cache is and where its next token stands.

The keys and values themselves stay in transformers' cache; this record travels with it as an attribute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.pruning.sequence import padding_mask

_ATTRIBUTE = "pruning_record"


@dataclass(frozen=True)
class CacheRecord:
    """Lengths after the prefill, per layer.

    Attributes:
        widths: cached tokens per layer, padding included.
        lengths: per layer, real tokens of each row.
        next_positions_LB: rotary position of the first new token, per layer and row.
    """

    widths: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    next_positions_LB: Tensor

    def attach_to(self, cache) -> None:
        setattr(cache, _ATTRIBUTE, self)

    @staticmethod
    def of(cache) -> CacheRecord | None:
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
        first = self.next_positions_LB.to(device).repeat_interleave(self.repeats(batch), dim=1)
        return first[:, :, None] + torch.arange(decoded, decoded + new_tokens, device=device)

    def padding_mask(
        self, layer: int, decoded: int, new_tokens: int, batch: int, device: torch.device
    ) -> Tensor | None:
        """Bool ``[B, keys]`` over the cache of one layer and the new tokens; None if no row is padded."""
        lengths, width = self.lengths[layer], self.widths[layer]
        if min(lengths) == width:
            return None
        grown = tuple(length + decoded + new_tokens for length in lengths)
        return padding_mask(grown, width + decoded + new_tokens, device).repeat_interleave(self.repeats(batch), dim=0)
