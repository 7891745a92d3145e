"""PosPad of "FocusUI: Efficient UI Grounding via Position-Preserving Visual Token Selection" (arXiv 2601.03928), as an
option of methods that drop tokens in front of the decoder: ``pospad``.

Every run of neighboring tokens that were dropped leaves one marker, in the place of its last token: survivors keep
their distances in ``positions=original``, and in ``compact`` it still shows that something was there.

Markers come on top of the budget, and traces count them as merged tokens: with few, scattered survivors there are as
many as these.

Deviations: the published marker is a token that FocusUI was trained with, which no other model has; here it is the mean
of the run (of input embeddings, or of features in front of the projector, wherever the method drops). Runs are those of
a crop where a method works in front of the projector; elsewhere text and newlines end them. What the cap per image
(``visual_token_num``) drops leaves no marker.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.pruning.engine.patch_ids import MERGED, PatchIds
from llava.pruning.selection import counts_to_mask, take, top_k
from llava.pruning.types import Selection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava.pruning.engine.sequence import Sequences
    from llava.pruning.vision import ReducedRow


def runs_of(dropped_BV: Tensor, adjacent_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Where runs end, bool ``[B, V]``, and the share of each token in the mean of its run, ``[B, runs, V]``.

    Args:
        dropped_BV: True for tokens that were dropped.
        adjacent_BV: True where the token stands directly behind the one before.
    """
    nothing = torch.zeros_like(dropped_BV[:, :1])
    follows = dropped_BV & torch.cat((nothing, dropped_BV[:, :-1]), 1) & adjacent_BV
    ends = dropped_BV & ~torch.cat((follows[:, 1:], nothing), 1)
    number = (dropped_BV & ~follows).long().cumsum(1) - 1
    # The host has to know how many there are.
    most = max(int(ends.sum(1).max()), 0) if ends.shape[1] else 0
    members = (number[:, None] == torch.arange(most, device=number.device)[:, None]) & dropped_BV[:, None]
    return ends, members / members.sum(2, keepdim=True).clamp_min(1)


def with_markers(sequences: Sequences, selection: Selection, effects: set[str]) -> tuple[Sequences, Selection]:
    """The sequences in which the last token of each run of dropped ones is its marker, and the selection that keeps
    these too; ``effects`` gets ``pospad`` if there are any.

    Args:
        sequences: in front of the decoder.
        selection: what a method keeps.
    """
    kept = selection.keep
    selection, ends, made = _with_ends(selection, sequences.counts, sequences.slots_BV)
    effects |= {"pospad"} if selection.keep != kept else set()
    return _remade(sequences, ends, made), selection


def _with_ends(selection: Selection, counts: tuple[int, ...], slots_BV: Tensor) -> tuple[Selection, Tensor, Tensor]:
    """A selection with the last token of each run, which of the tokens these are, bool ``[B, V]``, and what they are
    made of, ``[B, V, V]``.
    """
    rows, width = slots_BV.shape
    valid = counts_to_mask(counts, width, slots_BV.device)
    kept = torch.zeros(rows, width + 1, dtype=torch.bool, device=slots_BV.device)
    kept = kept.scatter_(1, selection.keep_BK, True)[:, :width] & valid
    adjacent = torch.ones_like(kept)
    adjacent[:, 1:] = slots_BV[:, 1:] == slots_BV[:, :-1] + 1
    ends, shares = runs_of(valid & ~kept, adjacent)
    keep = tuple(own + more for own, more in zip(selection.keep, ends.sum(1).tolist(), strict=True))
    # Runs end in their order: the mean of the i-th belongs to the i-th end.
    place = (ends.long().cumsum(1) - 1).clamp_min(0)
    if shares.shape[1]:
        made = take(shares, place)
    else:
        made = torch.zeros(rows, width, width, device=slots_BV.device)
    return replace(selection, keep_BK=top_k((kept | ends).float(), counts, keep), keep=keep), ends, made


def marks(reduced: Sequence[ReducedRow]) -> bool:
    """Whether a reduction in front of the decoder has left markers in any row, or tokens that were merged."""
    return any(len(row.origins) < row.visual_tokens or bool((row.origins < 0).any()) for row in reduced)


def _remade(sequences: Sequences, which_BV: Tensor, weights_BVV: Tensor) -> Sequences:
    """The sequences where some visual tokens have become means of others, whose shares stand in their rows: they are no
    patches any more.
    """
    later = sequences.advance(sequences.hidden_BNC.clone())
    slots = sequences.slots_BV.clamp_max(sequences.width - 1)
    rows, places = which_BV.nonzero(as_tuple=True)

    def write(values: Tensor) -> None:
        own = take(values, slots)
        made = weights_BVV @ own.float()
        values[rows, slots[rows, places]] = made[rows, places].to(values.dtype)

    write(later.hidden_BNC)
    later.origins = PatchIds(sequences.visual_origins().masked_fill(which_BV, MERGED))
    if sequences.added_BNF is not None:
        later.added_BNF = sequences.added_BNF.clone()
        write(later.added_BNF)
    if sequences.index_BN is not None:
        later.index_BN = sequences.index_BN.clone()
        later.index_BN[rows, slots[rows, places]] = MERGED
    return later


def crop_markers(tokens_PC: Tensor, origin_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Markers of a crop of which the patches ``origin_K`` stay (-1: none of them): features ``[M, C]``, the patch in
    whose place each stands, ``[M]``, and the share of each patch in it, ``[M, P]``.
    """
    kept = torch.zeros(len(tokens_PC) + 1, dtype=torch.bool, device=tokens_PC.device)
    kept[origin_K] = True
    dropped = ~kept[None, :-1]
    ends, shares = runs_of(dropped, torch.ones_like(dropped))
    return (shares[0] @ tokens_PC.float()).to(tokens_PC.dtype), ends[0].nonzero()[:, 0], shares[0]
