"""Greedy coverage: what is chosen next is what adds most to how well everything is covered (facility location).

Shapes: N crops, R things to cover, P candidates that cover them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FRESH = 32
"""Candidates that are looked at anew at one time."""


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

    A thing is covered as well as by the best of the chosen candidates, and not at all at the start. On a CPU only
    candidates are looked at anew whose gain may still be the largest (gains never grow): that takes the number of picks
    times the number of things, and chooses the same. On other devices, which would have to wait for that, every step
    looks at all.

    Args:
        likeness_NPR: how well each candidate covers each thing.
        picks: how many.
        factor_NP: what the added coverage of a candidate is multiplied with; not negative.
        bonus_NP: what is added to it.
        last_NP: candidates that are chosen after all others, in their order.
        chosen_need_none: the things are the candidates, and those that are chosen need no cover.
    """
    likeness_NPR = likeness_NPR.contiguous()
    weights = _Weights(factor_NP, bonus_NP, last_NP)
    if likeness_NPR.device.type != "cpu":
        return _looking_at_all(likeness_NPR, picks, weights, chosen_need_none)
    orders = [
        _looking_again(likeness_PR, picks, weights.of(crop), chosen_need_none)
        for crop, likeness_PR in enumerate(likeness_NPR)
    ]
    return torch.stack(orders)


class _Weights:
    """What makes gains of added coverage: of all crops ``[N, P]``, or of one ``[P]``."""

    def __init__(self, factor: Tensor | None, bonus: Tensor | None, last: Tensor | None) -> None:
        self.factor, self.bonus, self.last = factor, bonus, last

    def of(self, crop: int) -> _Weights:
        return _Weights(*(None if part is None else part[crop] for part in (self.factor, self.bonus, self.last)))

    def gain(self, added: Tensor, index: Tensor | None = None) -> Tensor:
        """Gains of candidates (of one crop: of those with these indices) from the coverage that they add."""
        factor, bonus = (part if part is None or index is None else part[index] for part in (self.factor, self.bonus))
        gain = added if factor is None else added * factor
        return gain if bonus is None else gain + bonus


def _looking_at_all(likeness_NPR: Tensor, picks: int, weights: _Weights, chosen_need_none: bool) -> Tensor:
    crops, patches, things = likeness_NPR.shape
    device = likeness_NPR.device
    row = torch.arange(crops, device=device)
    covered = likeness_NPR.new_zeros(crops, things)
    taken = likeness_NPR.new_zeros(crops, patches)
    if weights.last is not None:
        taken = taken.masked_fill(weights.last, -1.0)
    order = torch.empty(crops, picks, dtype=torch.long, device=device)
    for step in range(picks):
        gain = weights.gain((likeness_NPR - covered[:, None]).clamp_min_(0).sum(2))
        best = torch.where(taken < 0, taken, gain).argmax(1)
        order[:, step] = best
        taken[row, best] = -torch.inf
        covered = torch.maximum(covered, likeness_NPR[row, best])
        if chosen_need_none:
            covered[row, best] = torch.inf
    return order


def _looking_again(likeness_PR: Tensor, picks: int, weights: _Weights, chosen_need_none: bool) -> Tensor:
    """Of one crop. Gains from earlier steps bound those of now: terms only get smaller, and so do their sums, added up
    in the same order. The first of the largest bounds is the choice as soon as it is a gain of now.
    """
    patches, things = likeness_PR.shape
    covered = likeness_PR.new_zeros(things)
    bound = weights.gain((likeness_PR - covered).clamp_min_(0).sum(1))
    if weights.last is not None:
        bound = bound.masked_fill(weights.last, -1.0)
    fresh, order = min(_FRESH, patches), list[int]()
    for _ in range(picks):
        looked_at = set[int]()
        while (best := int(bound.argmax())) not in looked_at:
            before, again = bound.topk(fresh)
            if float(before[0]) < 0:
                break  # nothing is left but what is chosen last
            if best not in (numbers := again.tolist()):  # of equals topk may leave out the first
                again[-1] = numbers[-1] = best
            gain = weights.gain(likeness_PR.index_select(0, again).sub_(covered).clamp_min_(0).sum(1), again)
            # What is chosen already, or chosen last, keeps its place.
            bound[again] = gain if float(before[-1]) >= 0 else torch.where(before < 0, before, gain)
            looked_at.update(numbers)
        order.append(best)
        bound[best] = -torch.inf
        covered = torch.maximum(covered, likeness_PR[best])
        if chosen_need_none:
            covered[best] = torch.inf
    return torch.tensor(order)
