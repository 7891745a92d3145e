"""Which patch each visual token was: resolved only when somebody asks.

A prefill asks seldom (CLS attention behind layer 0, a trace that is read afterwards), so a selection only notes what it
kept: a few operations less at every one of thirty boundaries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.pruning.selection import on_device

if TYPE_CHECKING:
    from llava.pruning.types import Selection

MERGED = -1
"""Origin of a token that was merged out of several."""


class PatchIds:
    """Original visual index of every visual token of a batch; ``MERGED`` for merged ones."""

    def __init__(self, known_BV: Tensor | None, notes_members: bool = False) -> None:
        self._known_BV = known_BV
        self._step: tuple[PatchIds, Tensor, tuple[int, ...], tuple[int, ...]] | None = None
        # What says which tokens each merged one is made of; only where somebody wants to know.
        self.notes_members = notes_members
        self._merging: Callable[[], Tensor] | None = None
        self._made: dict[int, list[set[int]] | None] = {}

    def rebuilt(self, given: list[Tensor], known: dict[int, PatchIds]) -> PatchIds:
        """The same chain with other indices, as many as :meth:`selections`, flattened or not; nothing in it is
        resolved. ``known`` gets what became of each link, by its ``id``.
        """
        # A replay says again what was kept, but not what was merged.
        later = PatchIds(self._known_BV if self._step is None else None)
        if self._step is not None:
            earlier, keep_BK, keep, merged = self._step
            later._step = earlier.rebuilt(given[:-1], known), given[-1].view(keep_BK.shape), keep, merged
        known[id(self)] = later
        return later

    def selections(self) -> list[Tensor]:
        """Indices ``[B, K]`` that each selection kept, the first one first."""
        if self._step is None:
            return []
        return [*self._step[0].selections(), self._step[1]]

    def after(self, keep_BK: Tensor, keep: tuple[int, ...], merged: tuple[int, ...]) -> PatchIds:
        """Those behind a selection; arguments as in :class:`~llava.pruning.types.Selection`."""
        later = PatchIds(None, self.notes_members)
        later._step = self, keep_BK, keep, merged
        return later

    def note_members(self, selection: Selection, width: int) -> None:
        """Remember what can say which of the ``width`` tokens before the selection its merged ones are made of; it is
        asked when the trace is read, and costs the prefill nothing.
        """
        if selection.weights is not None:
            self._merging = selection.weights
        elif selection.source_BM is not None:
            source = selection.source_BM.clamp_max(width - 1)
            self._merging = partial(torch.nn.functional.one_hot, source, width)

    def members(self, row: int, count: int) -> list[list[int]] | None:
        """Of each merged token among the ``count`` of a row the patches that it is made of, ascending; None if they
        were not noted, or if some were merged in front of the decoder, where nobody notes it.
        """
        made = self._made_of(row)
        if made is None:
            return None
        origins = self.tensor()[row, :count].tolist()
        return [sorted(made[place]) for place, origin in enumerate(origins) if origin == MERGED]

    def _made_of(self, row: int) -> list[set[int]] | None:
        """The patches in every token of a row."""
        if row not in self._made:
            self._made[row] = self._gathered(row)
        return self._made[row]

    def _gathered(self, row: int) -> list[set[int]] | None:
        if self._step is None:
            first = self.tensor()[row].tolist()
            return None if not self.notes_members or MERGED in first else [{patch} for patch in first]
        earlier, keep_BK, keep, merged = self._step
        before = earlier._made_of(row)
        if before is None or (merged[row] and self._merging is None):
            return None
        made = [before[place] for place in keep_BK[row, : keep[row]].tolist()]
        if merged[row] and self._merging is not None:
            for own in self._merging()[row, : merged[row]] > 0:
                made.append({patch for place in own.nonzero().flatten().tolist() for patch in before[place]})
        return made

    def tensor(self) -> Tensor:
        """``[B, V]`` in sequence order, of no meaning behind a row's number of visual tokens."""
        if self._known_BV is None:
            self._known_BV = self._resolved()
        return self._known_BV

    def _resolved(self) -> Tensor:
        assert self._step is not None
        earlier, keep_BK, keep, merged = self._step
        before = earlier.tensor().to(keep_BK.device)
        # Entries behind keep[i] are no valid indices; what they pick is replaced or of no meaning.
        kept = before.gather(1, keep_BK[:, : max(keep)].clamp_max(before.shape[1] - 1))
        width = max(old + new for old, new in zip(keep, merged, strict=True))
        kept = torch.nn.functional.pad(kept, (0, width - kept.shape[1]), value=MERGED)
        if min(keep) == max(keep):
            return kept
        # Merged tokens stand behind the last one that was kept.
        mask = torch.arange(width, device=kept.device) < on_device(keep, kept.device)[:, None]
        return kept.masked_fill(~mask, MERGED)
