"""Which token is the most isolated one: the first pick of what looks for diverse tokens.

Shapes: B batch rows, V tokens of a row (padded to the longest), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 256
"""Rows of distances that exist at one time."""
_FRESH = 64
"""Tokens that are measured after the sample; twice as many in every further round, up to a block."""


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
