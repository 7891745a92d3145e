"""Greedy diversity: which token is the most isolated one, and which are farthest from those already picked.

Shapes: B batch rows, V tokens of a row (padded to the longest), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.pruning.selection import counts_to_mask, take

_BLOCK = 256
"""Rows of distances that exist at one time."""
_FRESH = 64
"""Tokens that are measured after the sample; twice as many in every further round, up to a block."""
_FARTHEST = 2.0  # of cosine distances


def max_min_order(
    tokens_BVC: Tensor, counts: Sequence[int], picks: int, room: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Indices ``[B, picks]`` of the most diverse tokens, in the order in which they are picked.

    First the token whose nearest neighbor is farthest, then always the token farthest from those already picked, by
    cosine distance. One running minimum per token, O(picks x V), after the first pick: see
    :func:`most_isolated`. Devices other than the CPU, which would have to wait for what that
    finds, look at all pairs in one product.

    Args:
        tokens_BVC: ``[B, V, C]``, row i valid up to ``counts[i]``.
        counts: valid tokens per row; a row with fewer than ``picks`` repeats arbitrary indices behind its count.
        picks: tokens to pick.
        room: the group of each token ``[B, V]``, and how many of each group ``[B, G]`` are picked before any other
            token: of the groups that have room left and tokens, the token farthest from all that are picked.
    """
    unit = torch.nn.functional.normalize(tokens_BVC.float(), dim=2)
    batch, width = unit.shape[:2]
    # Where no row is padded the mask is not needed, nor the copy from the host that it takes.
    padding = None if min(counts) == width else ~counts_to_mask(counts, width, unit.device)
    closest = unit.new_full((batch, width), torch.inf)
    if padding is not None:
        closest = closest.masked_fill(padding, -torch.inf)
    left_BG = None if room is None else room[1].clone()

    def having_room(values_BV: Tensor) -> Tensor | None:
        """Which tokens there is room for; None: for all."""
        if room is None or left_BG is None:
            return None
        open_BV = (left_BG.gather(1, room[0]) > 0) & (values_BV > -torch.inf)
        return open_BV | ~open_BV.any(1, keepdim=True)

    def best_of(values_BV: Tensor) -> Tensor:
        """The best of these tokens; of equals the first."""
        open_BV = having_room(values_BV)
        return (values_BV if open_BV is None else values_BV.masked_fill(~open_BV, -torch.inf)).argmax(1)

    if unit.device.type == "cpu":
        best_B = most_isolated(unit, counts, picks, having_room(closest))
    else:  # one product, without waiting for what it says
        best_B = best_of(isolation(unit, padding))
    picked = []
    while True:
        picked.append(best_B)
        if len(picked) == picks:
            return torch.stack(picked, 1)
        last = best_B[:, None]
        if room is not None and left_BG is not None:
            left_BG.scatter_add_(1, room[0].gather(1, last), left_BG.new_full((batch, 1), -1))
        from_last = 1 - (unit @ take(unit, last).transpose(1, 2))[:, :, 0]
        closest = torch.minimum(closest, from_last).scatter(1, last, -torch.inf)
        best_B = best_of(closest)


def isolation(unit_BVC: Tensor, padding_BV: Tensor | None) -> Tensor:
    """Cosine distance of each token to its nearest neighbor, ``[B, V]``, from all pairs; -inf in the padding.

    Args:
        unit_BVC: tokens of length 1.
        padding_BV: True behind each row's tokens; None: there is no padding.
    """
    nearest = []
    for start in range(0, unit_BVC.shape[1], _BLOCK):
        distance = 1 - unit_BVC[:, start : start + _BLOCK] @ unit_BVC.transpose(1, 2)
        # Invalid tokens are infinitely far as neighbors, so they are nobody's nearest, and never picked themselves.
        if padding_BV is not None:
            distance.masked_fill_(padding_BV[:, None, :], torch.inf)
        distance.diagonal(start, 1, 2).fill_(torch.inf)
        nearest.append(distance.amin(2))
    found = torch.cat(nearest, 1)
    return found if padding_BV is None else found.masked_fill(padding_BV, -torch.inf)


def most_isolated(unit_BVC: Tensor, counts: Sequence[int], sample: int, open_BV: Tensor | None = None) -> Tensor:
    """The token of each row whose nearest neighbor is farthest, ``[B]``; of equals the first. Reads back to the host.

    Distances to a sample of tokens bound all others' from above. Those with the largest bounds are measured, which
    lowers the bounds of what is left, until the largest of all is no bound any more. That takes a small multiple of
    ``sample x V`` distances where many tokens resemble others, as those of photographs do, and where none does at worst
    each pair once, half of what looking at all pairs from both sides takes.

    Args:
        unit_BVC: tokens of length 1, row i valid up to ``counts[i]``.
        counts: valid tokens per row.
        sample: tokens that are measured first, evenly spaced.
        open_BV: tokens that may be chosen; the others count as neighbors only. None: all.
    """
    chosen = [
        _of_row(unit_BVC[row, :count], sample, None if open_BV is None else open_BV[row, :count])
        for row, count in enumerate(counts)
    ]
    return torch.tensor(chosen, device=unit_BVC.device)


def _of_row(unit_VC: Tensor, sample: int, open_V: Tensor | None) -> int:
    count, device = len(unit_VC), unit_VC.device
    if count < 2:
        return 0
    nearest = torch.full((count,), torch.inf, device=device)
    measured = torch.zeros(count, dtype=torch.bool, device=device)
    sample = min(sample, count)
    block, fresh = torch.arange(sample, device=device) * count // sample, _FRESH
    while True:
        # What was measured before has its distances to these already: each pair is looked at once.
        others = (~measured).nonzero()[:, 0]
        distance = 1 - unit_VC[block] @ unit_VC[others].T
        distance.masked_fill_(block[:, None] == others, torch.inf)
        nearest[others] = torch.minimum(nearest[others], distance.amin(0))
        nearest[block] = torch.minimum(nearest[block], distance.amin(1))
        measured[block] = True
        bound = nearest if open_V is None else nearest.masked_fill(~open_V, -torch.inf)
        best = bound.argmax()
        if measured[best]:
            return int(best)
        # Only what may be farther than all that is known.
        known = bound.masked_fill(~measured, -torch.inf).max()
        left = bound.masked_fill(measured, -torch.inf)
        block = left.topk(max(min(int((left >= known).sum()), fresh), 1)).indices
        if not (block == best).any():  # of equals topk may leave out the first
            block[-1] = best
        fresh = min(2 * fresh, _BLOCK)


def weighted_order(tokens_BVC: Tensor, weight_BV: Tensor, real_BV: Tensor | None, picks: int) -> Tensor:
    """Tokens in the order in which they are chosen, ``[B, picks]``: always the largest weight times distance to those
    chosen already; of equals the first. A row with fewer tokens repeats arbitrary ones behind its own.

    Args:
        tokens_BVC: visual tokens, compared by their cosines.
        weight_BV: at least 0.
        real_BV: False for padding; None if there is none.
        picks: how many.
    """
    unit = torch.nn.functional.normalize(tokens_BVC.float(), dim=2)
    batch, width = weight_BV.shape
    row = torch.arange(batch, device=unit.device)
    # Many rows of the cosines are cheaper all at once.
    cosines = unit @ unit.transpose(1, 2) if picks * 4 > width else None
    distance = torch.full_like(weight_BV, _FARTHEST)
    open_BV = torch.zeros_like(weight_BV)  # minus infinity for what cannot be chosen any more
    if real_BV is not None:
        open_BV.masked_fill_(~real_BV, -torch.inf)
    order = torch.empty(batch, picks, dtype=torch.long, device=unit.device)
    for step in range(picks):
        best = torch.addcmul(open_BV, weight_BV, distance).argmax(1)
        order[:, step] = best
        open_BV[row, best] = -torch.inf
        near = cosines[row, best] if cosines is not None else (unit @ unit[row, best][:, :, None])[:, :, 0]
        distance = torch.minimum(distance, (1 - near).clamp_min_(0))
    return order
