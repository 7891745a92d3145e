"""The padded batch inside a pruned prefill, and how a selection changes it.

Rows are padded on the left, so that the last token of every row stays at the end. All lengths are host integers; the
device only ever sees gathers.

Shapes: B batch rows, N tokens (padded), V visual tokens (padded), C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.pruning.selection import counts_to_mask, on_device

if TYPE_CHECKING:
    from llava.pruning.base import Selection
    from llava.pruning.layout import VisualLayout

MERGED = -1
"""Origin of a token that was merged out of several."""
_TEXT = -2
_PADDING = -3


@dataclass
class Sequences:
    """State of a batch between two layers of the prefill.

    Attributes:
        hidden_BNC: hidden states, left padded.
        lengths: tokens per row, padding excluded.
        origin_BN: original visual index of each token, ``MERGED``, or a negative code for text and padding.
        positions_BN: rotary positions, ``[1, N]`` where they are the same in every row.
        counts: visual tokens per row.
        compact: renumber the positions after each selection.
        tails: tokens behind the last visual token of each row, if the visual tokens of every row stand side by side
            (dropping and merging keeps them so): then their places are known to the host. Otherwise None.
        scattered_BV: the places of the visual tokens where ``tails`` is None, see :attr:`slots_BV`.
    """

    hidden_BNC: Tensor
    lengths: tuple[int, ...]
    origin_BN: Tensor
    positions_BN: Tensor
    counts: tuple[int, ...]
    compact: bool
    tails: tuple[int, ...] | None
    scattered_BV: Tensor | None

    @classmethod
    def start(
        cls,
        hidden_BNC: Tensor,
        layout: VisualLayout,
        lengths: tuple[int, ...],
        positions_BN: Tensor | None,
        compact: bool,
        origins: list[Tensor] | None = None,
    ) -> Sequences:
        """State before layer 0. Structure tokens are kept like text; so is the last token of a row, visual or not,
        because its output predicts the next token.

        A prompt that ends in an image therefore treats the last patch as its text; there is no other row that could
        say what the patches are asked for.
        """
        batch, width = hidden_BNC.shape[:2]
        device = hidden_BNC.device
        origin = [[_TEXT] * width for _ in range(batch)]
        slots: list[list[int]] = []
        for row, (spans, length, end) in enumerate(zip(layout.spans, lengths, layout.text_starts, strict=True)):
            origin[row][: width - length] = [_PADDING] * (width - length)
            where = [slot for first, last in spans for slot in range(first, min(last, width - 1))]
            if spans and (spans[0][0] < width - length or end > width):
                raise ValueError(
                    f"row {row}: visual spans {list(spans)} lie outside its tokens {width - length}..{width - 1}; the "
                    "layout must be set for each prompt, padding must be on the left, and the prompt must be given to "
                    "the decoder in one piece (chunked prefill cannot be pruned)"
                )
            for index, slot in enumerate(where):
                origin[row][slot] = index
            slots.append(where)
        counts = tuple(len(where) for where in slots)
        tails = scattered = None
        if all(not where or where[-1] - where[0] + 1 == len(where) for where in slots):
            tails = tuple(width - 1 - where[-1] if where else 0 for where in slots)
        else:
            scattered = on_device([where + [width] * (max(counts) - len(where)) for where in slots], device)
        origin_BN = on_device(origin, device)
        for row, given in enumerate(origins or ()):
            # Tokens that were reduced before the decoder say themselves which patch they are.
            origin_BN[row, on_device(slots[row], device).long()] = given[: counts[row]].to(device)
        if positions_BN is None:
            positions_BN = _contiguous_positions(lengths, width, device)
        return cls(
            hidden_BNC,
            lengths,
            origin_BN,
            positions_BN if compact else positions_BN.expand(batch, -1),
            counts,
            compact,
            tails,
            scattered,
        )

    @property
    def width(self) -> int:
        return self.hidden_BNC.shape[1]

    @cached_property
    def slots_BV(self) -> Tensor:
        """Where the visual tokens of each row stand, ascending, ``[B, V]``; of no meaning behind ``counts[i]``."""
        if self.tails is None:
            return self.scattered_BV
        device = self.hidden_BNC.device
        starts = [self.width - tail - count for tail, count in zip(self.tails, self.counts, strict=True)]
        return on_device(starts, device)[:, None] + torch.arange(max(self.counts), device=device)

    @property
    def block(self) -> slice | None:
        """The visual tokens of a single row that stand side by side, for plain slicing; None otherwise."""
        if self.tails is None or len(self.counts) > 1:
            return None
        end = self.width - self.tails[0]
        return slice(end - self.counts[0], end)

    def advance(self, hidden_BNC: Tensor) -> Sequences:
        """The same tokens with the hidden states that left a layer, wherever that layer lives."""
        device = hidden_BNC.device
        return replace(
            self,
            hidden_BNC=hidden_BNC,
            origin_BN=self.origin_BN.to(device),
            positions_BN=self.positions_BN.to(device),
            scattered_BV=None if self.scattered_BV is None else self.scattered_BV.to(device),
        )

    def padding_mask(self) -> Tensor | None:
        """Bool ``[B, N]``, True for real tokens; None if no row is padded (then kernels need no mask)."""
        if min(self.lengths) == self.width:
            return None
        return padding_mask(self.lengths, self.width, self.hidden_BNC.device)

    def gather_visual(self, values_BN: Tensor) -> Tensor:
        """Pick the columns of the visual tokens, ``[B, ..., N]`` to ``[B, ..., V]``; padding picks any column."""
        if self.block is not None:
            return values_BN[..., self.block]
        index = self.slots_BV.clamp_max(values_BN.shape[-1] - 1)
        if len(index) == 1:
            return values_BN.index_select(-1, index[0])
        index = index.view(len(index), *[1] * (values_BN.ndim - 2), -1)
        return values_BN.gather(-1, index.expand(*values_BN.shape[:-1], -1))

    def visual_hidden(self) -> Tensor:
        """Hidden states of the visual tokens, ``[B, V, C]``."""
        if self.block is not None:
            return self.hidden_BNC[:, self.block]
        return _gather_tokens(self.hidden_BNC, self.slots_BV.clamp_max(self.width - 1))

    def hidden_of(self, index_BK: Tensor) -> Tensor:
        """Hidden states of the visual tokens with these indices, ``[B, K, C]``."""
        if self.block is not None:
            return _gather_tokens(self.hidden_BNC[:, self.block], index_BK)
        return _gather_tokens(self.hidden_BNC, self.slots_BV.gather(1, index_BK).clamp_max(self.width - 1))

    def visual_origins(self) -> Tensor:
        """Origins of the visual tokens, ``[B, V]``; valid up to ``counts``."""
        return self.gather_visual(self.origin_BN)

    def apply(self, selection: Selection) -> Sequences:
        """The sequences after a selection: survivors in place, merged tokens behind the last visual token."""
        merged = selection.merged or (0,) * len(self.counts)
        counts = tuple(kept + new for kept, new in zip(selection.keep, merged, strict=True))
        lengths = tuple(
            length - before + after for length, before, after in zip(self.lengths, self.counts, counts, strict=True)
        )
        rearrange = self._sorted if self.block is None else self._sliced
        return rearrange(selection, merged, counts, lengths)

    def _sliced(self, selection: Selection, merged: tuple, counts: tuple, lengths: tuple) -> Sequences:
        """One row, one block: everything before and behind it moves as a whole.

        Half the small operations of the sort, and one copy of the hidden states less: at real sizes the difference is
        as large as the scoring itself.
        """
        block, keep_K = self.block, selection.keep_BK[0, : selection.keep[0]]
        new, device = merged[0], self.hidden_BNC.device
        padding = self.width - self.lengths[0]  # of no use from here on

        def around(values: Tensor, *inside: Tensor) -> Tensor:
            return torch.cat((values[:, padding : block.start], *inside, values[:, block.stop :]), dim=1)

        hidden = [self.hidden_BNC[:, block].index_select(1, keep_K)]
        origin = [self.origin_BN[:, block].index_select(1, keep_K)]
        if new:
            hidden.append(selection.merged_BMC[:, :new].to(self.hidden_BNC.dtype))
            origin.append(torch.full((1, new), MERGED, device=device))
        if self.compact:
            positions = self.positions_BN[:, padding : padding + lengths[0]]  # numbered from 0 already
        else:
            inside = [self.positions_BN[:, block].index_select(1, keep_K)]
            if new:
                inside.append(self.positions_BN[:, block].index_select(1, selection.source_BM[0, :new]))
            positions = around(self.positions_BN, *inside)
        return replace(
            self,
            hidden_BNC=around(self.hidden_BNC, *hidden),
            lengths=lengths,
            origin_BN=around(self.origin_BN, *origin),
            positions_BN=positions,
            counts=counts,
        )

    def _sorted(self, selection: Selection, merged: tuple, counts: tuple, lengths: tuple) -> Sequences:
        """Any batch. Everything follows from one sort: each surviving token gets its slot as key, each merged token
        the slot of the last visual token plus a half, everything else a key below zero, so the survivors end up
        right-aligned.
        """
        batch, width, device = len(self.lengths), self.width, self.hidden_BNC.device
        slots = torch.cat((self.slots_BV, torch.full((batch, 1), width, device=device)), dim=1)
        survives = torch.zeros(batch, width + 1, dtype=torch.bool, device=device)
        survives = survives.scatter_(1, slots.gather(1, selection.keep_BK), True)
        survives = survives[:, :width] | (self.origin_BN == _TEXT)
        key = torch.where(survives, 2 * torch.arange(width, device=device), -1)
        hidden, origin, positions = self.hidden_BNC, self.origin_BN, self.positions_BN
        origin = torch.where(survives, origin, _PADDING)

        most = max(merged)
        if most:
            last = on_device([max(count - 1, 0) for count in self.counts], device)[:, None]
            behind = 2 * slots.gather(1, last) + 1
            real = counts_to_mask(merged, most, device)
            key = torch.cat((key, torch.where(real, behind, -1)), dim=1)
            hidden = torch.cat((hidden, selection.merged_BMC.to(hidden.dtype)), dim=1)
            origin = torch.cat((origin, torch.where(real, MERGED, _PADDING)), dim=1)
            if not self.compact:
                source = slots.gather(1, selection.source_BM).clamp_max(width - 1)
                positions = torch.cat((positions, positions.gather(1, source)), dim=1)

        new_width = max(lengths)
        order = key.argsort(dim=1, stable=True)[:, -new_width:]
        origin = origin.gather(1, order)
        if self.compact:
            positions = _contiguous_positions(lengths, new_width, device)
        else:
            positions = positions.gather(1, order)
        scattered = None
        if self.tails is None:
            scattered = (origin < MERGED).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts)]
        return replace(
            self,
            hidden_BNC=_gather_tokens(hidden, order),
            lengths=lengths,
            origin_BN=origin,
            positions_BN=positions,
            counts=counts,
            scattered_BV=scattered,
        )


def padding_mask(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Bool ``[B, width]``, True in the last ``lengths[i]`` columns."""
    return torch.arange(width, device=device) >= width - on_device(lengths, device)[:, None]


def _contiguous_positions(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Positions 0.. from the first real token of each row; 0 in the padding. ``[1, N]`` where no row is padded."""
    if min(lengths) == width:
        return torch.arange(width, device=device)[None]
    starts = on_device([width - length for length in lengths], device)[:, None]
    return (torch.arange(width, device=device) - starts).clamp_min(0)


def _gather_tokens(values_BNC: Tensor, index_BK: Tensor) -> Tensor:
    if len(index_BK) == 1:
        return values_BNC.index_select(1, index_BK[0])
    return values_BNC.gather(1, index_BK[:, :, None].expand(-1, -1, values_BNC.shape[2]))
