"""The padded batch inside a pruned prefill, and how a selection changes it.

Rows are padded on the left, so that the last token of every row stays at the end. All lengths are host integers; the
device only ever sees gathers.

Shapes: B batch rows, N tokens (padded), V visual tokens (padded), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llava.pruning.engine.layout import Spans, VisualLayout
from llava.pruning.engine.patch_ids import PatchIds
from llava.pruning.selection import counts_to_mask, on_device, take
from llava.pruning.types import Selection

_Counts = tuple[int, ...]


@dataclass
class Sequences:
    """State of a batch between two layers of the prefill.

    Attributes:
        hidden_BNC: hidden states, left padded.
        lengths: tokens per row, padding excluded.
        origins: which patch each visual token was. Another object after every selection, so it also tells whether the
            tokens are still the same.
        positions_BN: rotary positions, ``[1, N]`` where they are the same in every row; ``[B, N, axes]`` where a
            position has several axes (M-RoPE).
        counts: visual tokens per row.
        compact: renumber the positions after each selection.
        numbering: what compact positions are taken from; None: 0, 1, 2, ...
        tails: tokens behind the last visual token of each row, if the visual tokens of every row stand side by side
            (dropping and merging keeps them so): then their places are known to the host. Otherwise None.
        scattered_BV: the places of the visual tokens where ``tails`` is None, see :attr:`slots_BV`.
        added_BNF: what the next layers add to their outputs, side by side (deepstack features of the visual tokens,
            zero for text); it travels with the tokens.
        index_BN: number of each token in the prompt, -1 for merged ones; None if nobody asks.
        keys_BNF: what the next layer would project keys to, if that is known.
    """

    hidden_BNC: Tensor
    lengths: tuple[int, ...]
    origins: PatchIds
    positions_BN: Tensor
    counts: tuple[int, ...]
    compact: bool
    numbering: Numbering | None
    tails: tuple[int, ...] | None
    scattered_BV: Tensor | None
    added_BNF: Tensor | None = None
    index_BN: Tensor | None = None
    keys_BNF: Tensor | None = None

    @classmethod
    def start(
        cls,
        hidden_BNC: Tensor,
        layout: VisualLayout,
        lengths: tuple[int, ...],
        positions_BN: Tensor | None,
        compact: bool,
        origins: list[Tensor] | None = None,
        members: bool = False,
    ) -> Sequences:
        """State before layer 0. Structure tokens are kept like text; so is the last token of a row, visual or not,
        because its output predicts the next token.

        A prompt that ends in an image therefore treats the last patch as its text; there is no other row that could
        say what the patches are asked for.
        """
        batch, width = hidden_BNC.shape[:2]
        device = hidden_BNC.device
        blocks: list[Spans] = []
        for row, (spans, length, end) in enumerate(zip(layout.spans, lengths, layout.text_starts, strict=True)):
            if spans and (spans[0][0] < width - length or end > width):
                raise ValueError(
                    f"row {row}: visual spans {list(spans)} lie outside its tokens {width - length}..{width - 1}; the "
                    "layout must be set for each prompt, padding must be on the left, and the prompt must be given to "
                    "the decoder in one piece (chunked prefill cannot be pruned)"
                )
            blocks.append(tuple((first, min(last, width - 1)) for first, last in spans if first < width - 1))
        counts = tuple(sum(last - first for first, last in spans) for spans in blocks)
        tails = scattered = None
        if all(not count or spans[-1][1] - spans[0][0] == count for spans, count in zip(blocks, counts, strict=True)):
            tails = tuple(width - spans[-1][1] if spans else 0 for spans in blocks)
        else:
            slots = [[slot for first, last in spans for slot in range(first, last)] for spans in blocks]
            scattered = on_device([row + [width] * (max(counts) - len(row)) for row in slots], device)
        known = torch.arange(max(counts), device=device).expand(batch, -1)
        if origins is not None:
            # Tokens that were reduced before the decoder say themselves which patch they are.
            given = [row[:count].to(device) for row, count in zip(origins, counts, strict=True)]
            known = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
        numbering = None if positions_BN is None else Numbering(positions_BN, lengths)
        if positions_BN is None:
            positions_BN = _contiguous_positions(lengths, width, device)
        return cls(
            hidden_BNC,
            lengths,
            PatchIds(known, members),
            positions_BN if compact else positions_BN.expand(batch, *positions_BN.shape[1:]),
            counts,
            compact,
            numbering,
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
            return _given(self.scattered_BV)
        device = self.hidden_BNC.device
        starts = [self.width - tail - count for tail, count in zip(self.tails, self.counts, strict=True)]
        return on_device(starts, device)[:, None] + torch.arange(max(self.counts), device=device)

    @property
    def block(self) -> slice | None:
        """Where the visual tokens stand if they stand side by side and in the same place in every row, for plain
        slicing; None otherwise.
        """
        if self.tails is None or min(self.tails) < max(self.tails) or min(self.counts) < max(self.counts):
            return None
        end = self.width - self.tails[0]
        return slice(end - self.counts[0], end)

    def advance(self, hidden_BNC: Tensor) -> Sequences:
        """The same tokens with the hidden states that left a layer, wherever that layer lives."""
        device = hidden_BNC.device
        if device == self.hidden_BNC.device:
            # `replace` and `copy` take ten times as long, which counts in every layer.
            later = object.__new__(Sequences)
            later.__dict__.update(self.__dict__, hidden_BNC=hidden_BNC)
            return later
        return replace(
            self,
            hidden_BNC=hidden_BNC,
            positions_BN=self.positions_BN.to(device),
            scattered_BV=None if self.scattered_BV is None else self.scattered_BV.to(device),
            added_BNF=None if self.added_BNF is None else self.added_BNF.to(device),
            index_BN=None if self.index_BN is None else self.index_BN.to(device),
        )

    def with_addition(self) -> Sequences:
        """What the layer that has just run adds to its output, if there is any, added."""
        if self.added_BNF is None:
            return self
        width = self.hidden_BNC.shape[2]
        later = self.advance(self.hidden_BNC + self.added_BNF[..., :width].to(self.hidden_BNC.dtype))
        later.added_BNF = self.added_BNF[..., width:] if self.added_BNF.shape[2] > width else None
        return later

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
        """PatchIds of the visual tokens, ``[B, V]``; valid up to ``counts``."""
        return self.origins.tensor().to(self.hidden_BNC.device)

    def apply(self, selection: Selection) -> Sequences:
        """The sequences after a selection: survivors in place, merged tokens behind the last visual token."""
        merged = selection.merged or (0,) * len(self.counts)
        counts = tuple(kept + new for kept, new in zip(selection.keep, merged, strict=True))
        lengths = tuple(
            length - before + after for length, before, after in zip(self.lengths, self.counts, counts, strict=True)
        )
        # Where all rows drop equally many out of the same place, no row moves against another.
        alike = self.block is not None and len(set(zip(selection.keep, merged, strict=True))) == 1
        rearrange = self._sliced if alike else self._sorted
        later = rearrange(selection, merged, counts, lengths)
        later.origins = self.origins.after(selection.keep_BK, selection.keep, merged)
        if self.origins.notes_members and max(merged):
            later.origins.note_members(selection, max(self.counts))
        return later

    def _sliced(self, selection: Selection, merged: _Counts, counts: _Counts, lengths: _Counts) -> Sequences:
        """Everything before and behind the one block moves as a whole.

        A third of the small operations of the sort, and one copy of the hidden states less: at real sizes the
        difference is as large as the scoring itself.
        """
        block = self.block
        assert block is not None
        keep_BK, new = selection.keep_BK[:, : selection.keep[0]], merged[0]
        padding = self.width - max(self.lengths)  # of no use from here on
        width = max(lengths)

        def around(values: Tensor, *inside: Tensor) -> Tensor:
            return torch.cat((values[:, padding : block.start], *inside, values[:, block.stop :]), dim=1)

        hidden = [_gather_tokens(self.hidden_BNC[:, block], keep_BK)]
        if new:
            hidden.append(_given(selection.merged_BMC)[:, :new].to(self.hidden_BNC.dtype))
        if not self.compact:
            inside = [_gather_tokens(self.positions_BN[:, block], keep_BK)]
            if new:
                inside.append(_gather_tokens(self.positions_BN[:, block], _given(selection.source_BM)[:, :new]))
            positions = around(self.positions_BN, *inside)
        elif min(lengths) == width:
            positions = self.positions_BN[:, padding : padding + width]  # the first ones already
        else:
            positions = self._first_positions(lengths, width)
        added, index, keys = self.added_BNF, self.index_BN, None if new else self.keys_BNF
        if keys is not None:
            keys = around(keys, _gather_tokens(keys[:, block], keep_BK))
        if added is not None:
            merged_BMF = [self._merged_addition(selection)[:, :new]] if new else []
            added = around(added, _gather_tokens(added[:, block], keep_BK), *merged_BMF)
        if index is not None:
            index = around(index, _gather_tokens(index[:, block], keep_BK), keep_BK.new_full((len(counts), new), -1))
        return replace(
            self,
            hidden_BNC=around(self.hidden_BNC, *hidden),
            lengths=lengths,
            positions_BN=positions,
            counts=counts,
            added_BNF=added,
            index_BN=index,
            keys_BNF=keys,
        )

    def _merged_addition(self, selection: Selection) -> Tensor:
        """What is added to merged tokens: of their members what they are of their members, ``[B, M, F]``."""
        added = _given(self.added_BNF)
        visual = _gather_tokens(added, self.slots_BV.clamp_max(self.width - 1))
        if selection.weights is None:
            return _gather_tokens(visual, _given(selection.source_BM).clamp_max(visual.shape[1] - 1))
        return (selection.weights().float() @ visual.float()).to(added.dtype)

    def _first_positions(self, lengths: tuple[int, ...], width: int) -> Tensor:
        """Compact positions: the i-th token of a row takes the i-th position that the prompt had."""
        if self.numbering is None:
            return _contiguous_positions(lengths, width, self.hidden_BNC.device)
        return self.numbering.first(lengths, width, self.hidden_BNC.device)

    def _sorted(self, selection: Selection, merged: _Counts, counts: _Counts, lengths: _Counts) -> Sequences:
        """Any batch. Everything follows from one sort: each surviving token gets its slot as key, each merged token
        the slot of the last visual token plus a half, everything else a key below zero, so the survivors end up
        right-aligned.
        """
        batch, width, device = len(self.lengths), self.width, self.hidden_BNC.device
        # 1. Slots of the visual tokens, with one column behind the last token for what is padding.
        nowhere = torch.full((batch, 1), width, device=device)  # a column behind the last token
        slots = torch.cat((self.slots_BV, nowhere), dim=1)
        visual = self.slots_BV
        if min(self.counts) < visual.shape[1]:
            visual = visual.masked_fill(~counts_to_mask(self.counts, visual.shape[1], device), width)
        # 2. What stays: text (all real tokens that are not visual) and the visual tokens that were kept.
        kept = torch.zeros(batch, width + 1, dtype=torch.bool, device=device)
        text = torch.cat((padding_mask(self.lengths, width, device), kept[:, :1]), dim=1).scatter_(1, visual, False)
        kept = kept.scatter_(1, slots.gather(1, selection.keep_BK), True)[:, :width]
        # 3. Keys: twice the slot for what stays, -1 for what goes.
        key = torch.where(kept | text[:, :width], 2 * torch.arange(width, device=device), -1)
        hidden, positions = self.hidden_BNC, self.positions_BN
        added, index = self.added_BNF, self.index_BN

        most = max(merged)
        if most:
            # 4. Merged tokens become columns behind all others; an odd key puts them behind the last visual slot.
            last = on_device([max(count - 1, 0) for count in self.counts], device)[:, None]
            behind = 2 * slots.gather(1, last) + 1
            real = counts_to_mask(merged, most, device)
            key = torch.cat((key, torch.where(real, behind, -1)), dim=1)
            kept = torch.cat((kept, real), dim=1)
            hidden = torch.cat((hidden, _given(selection.merged_BMC).to(hidden.dtype)), dim=1)
            if not self.compact:
                source = slots.gather(1, _given(selection.source_BM)).clamp_max(width - 1)
                positions = torch.cat((positions, _gather_tokens(positions, source)), dim=1)
            if added is not None:
                added = torch.cat((added, self._merged_addition(selection)), dim=1)
            if index is not None:
                index = torch.nn.functional.pad(index, (0, most), value=-1)

        # 5. The largest keys, in order: survivors, right-aligned. What goes lies in front, where it is cut off.
        new_width = max(lengths)
        order = key.argsort(dim=1, stable=True)[:, -new_width:]
        if self.compact:
            positions = self._first_positions(lengths, new_width)
        else:
            positions = _gather_tokens(positions, order)
        # 6. Where the visual tokens stand now, unless the host knows it.
        scattered = None
        if self.tails is None:
            elsewhere = (~kept.gather(1, order)).to(torch.uint8)
            scattered = elsewhere.argsort(dim=1, stable=True)[:, : max(counts)]
        return replace(
            self,
            hidden_BNC=_gather_tokens(hidden, order),
            lengths=lengths,
            positions_BN=positions,
            counts=counts,
            scattered_BV=scattered,
            added_BNF=None if added is None else _gather_tokens(added, order),
            index_BN=None if index is None else index.gather(1, order),
            keys_BNF=None if most or self.keys_BNF is None else _gather_tokens(self.keys_BNF, order),
        )


@dataclass(frozen=True)
class Numbering:
    """Positions that were given for a prompt, ``[1 or B, N]`` or ``[B, N, axes]``, left padded, and the real tokens of
    each row.
    """

    positions_BN: Tensor
    lengths: tuple[int, ...]

    def first(self, lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
        """The first ``lengths[i]`` positions of each row, ``[B, width]``, left padded (with the first one)."""
        padding = on_device([width - length for length in lengths], device)[:, None]
        return self.at((torch.arange(width, device=device) - padding).clamp_min(0))

    def following(self, lengths: Sequence[tuple[int, ...]]) -> Tensor:
        """Position of the next token after the first ``lengths[l][i]`` of each row, ``[L, B]``."""
        next_BL = self.at(on_device(lengths, self.positions_BN.device).T)
        return (next_BL if next_BL.ndim == 2 else next_BL[..., 0]).T  # a text token stands at one number on all axes

    def at(self, tokens_BK: Tensor) -> Tensor:
        """Positions of the tokens with these numbers, counted from the first real one of each row; behind the last one
        they go on in steps of 1, with several axes from the largest number on any of them.
        """
        device, width = tokens_BK.device, self.positions_BN.shape[1]
        places = tokens_BK + on_device([width - length for length in self.lengths], device)[:, None]
        given = self.positions_BN.to(device).expand(len(self.lengths), *self.positions_BN.shape[1:])
        found, behind = _gather_tokens(given, places.clamp_max(width - 1)), (places - width + 1).clamp_min(0)
        if given.ndim == 2:
            return found + behind
        largest = given.flatten(1).amax(1)[:, None] + behind
        return torch.where((behind > 0)[..., None], largest[..., None], found)


def padding_mask(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Bool ``[B, width]``, True in the last ``lengths[i]`` columns."""
    return torch.arange(width, device=device) >= width - on_device(lengths, device)[:, None]


def _contiguous_positions(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Positions 0.. from the first real token of each row; 0 in the padding. ``[1, N]`` where no row is padded."""
    if min(lengths) == width:
        return torch.arange(width, device=device)[None]
    starts = on_device([width - length for length in lengths], device)[:, None]
    return (torch.arange(width, device=device) - starts).clamp_min(0)


def _given(values: Tensor | None) -> Tensor:
    """What a selection with merged tokens (or scattered ones) has."""
    assert values is not None
    return values


def _gather_tokens(values_BN: Tensor, index_BK: Tensor) -> Tensor:
    """``[B, K, ...]`` of ``[B, N, ...]``."""
    if len(index_BK) == 1:
        return values_BN.index_select(1, index_BK[0])
    if values_BN.ndim == 2:
        return values_BN.gather(1, index_BK)
    return take(values_BN, index_BK)
