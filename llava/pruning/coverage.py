"""Greedy coverage: what is chosen next is what adds most to how well everything is covered (facility location).

Shapes: N crops, R things to cover, P candidates that cover them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coverage_order(
    likeness_NPR: Tensor,
    picks: int,
    *,
    factor_NP: Tensor | None = None,
    bonus_NP: Tensor | None = None,
    last_NP: Tensor | None = None,
    chosen_need_none: bool = False,
) -> Tensor:
    """Candidates in the order in which they are chosen, ``[N, picks]``; of equals the first.

    A thing is covered as well as by the best of the chosen candidates, and not at all at the start.

    Args:
        likeness_NPR: how well each candidate covers each thing.
        picks: how many.
        factor_NP: what the added coverage of a candidate is multiplied with.
        bonus_NP: what is added to it.
        last_NP: candidates that are chosen after all others, in their order.
        chosen_need_none: the things are the candidates, and those that are chosen need no cover.
    """
    crops, patches, things = likeness_NPR.shape
    device = likeness_NPR.device
    row = torch.arange(crops, device=device)
    covered = likeness_NPR.new_zeros(crops, things)
    taken = likeness_NPR.new_zeros(crops, patches)
    if last_NP is not None:
        taken = taken.masked_fill(last_NP, -1.0)
    order = torch.empty(crops, picks, dtype=torch.long, device=device)
    for step in range(picks):
        added = (likeness_NPR - covered[:, None]).clamp_min(0)
        gain = added.sum(2)
        if factor_NP is not None:
            gain = gain * factor_NP
        if bonus_NP is not None:
            gain = gain + bonus_NP
        best = torch.where(taken < 0, taken, gain).argmax(1)
        order[:, step] = best
        taken[row, best] = -torch.inf
        covered = torch.maximum(covered, likeness_NPR[row, best])
        if chosen_need_none:
            covered[row, best] = torch.inf
    return order
