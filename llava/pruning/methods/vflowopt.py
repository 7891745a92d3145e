"""VFlowOpt, "A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization" (ICCV 2025,
arXiv 2508.05211), with the settings that its authors' search found for LLaVA-OneVision-7B.

Three stages by one map of importance: the attention that a patch receives in the selected layer of the tower, mean over
heads, of reliable tokens alone, those that receive more than ``threshold`` times the mean themselves. In front of the
projector the most important patches stay. What is dropped is recycled: of each cell of a grid over the crop, ``side``
patches wide, the mean of its dropped patches, weighted with their importance, takes the place of the most important of
them. In front of decoder layers 9 and 18 of 28 the least important of what is left go, recycled tokens as important as
the patches whose place they took.

Budget: ``target_tokens`` is the *processed* mean, as the paper counts. Its search gave shares of the three stages, a
side and a threshold for 10%, 25% and 50% of the tokens; other budgets lie between these, the last stage takes up the
rounding, and other depths have the stages at the same relative place. Crops and images share the budget of the first
stage in proportion to their patches. The search itself (Bayesian, on the state of the last token) is not part of this.

Deviations: with a budget in tokens, whose share of the prompt the tower does not know, the threshold is that of 10%;
``target_ratio`` interpolates it. Where no token is reliable all are (the published code then divides by 0); the entropy
of patches has weight 0 in all published settings and is left out; a cell of which nothing is dropped leaves its place
to the next important patch, and the side grows where there were more cells than tokens; the published code recycles
pictures of several crops only, in cells of the whole raster of tiles; newlines are no candidates. Published, tokens are
numbered anew in front of the decoder and keep these numbers inside; here they are renumbered in every layer, or with
``positions=original`` keep those of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch

from llava.pruning.budget import nearest_plan, scaled_layers
from llava.pruning.engine.view import LayerView
from llava.pruning.method import VisionReducer
from llava.pruning.selection import top_k
from llava.pruning.types import Rows, Selection
from llava.pruning.vision import Reduction, ReliableAttention, VisionFact, VisionView

_DEPTH, _LAYERS = 28, (9, 18)
_SHARES = np.array(
    [
        (0.0, 1.0, 0.6011),
        (0.11661529508161146, 1.0, 0.6011),
        (0.2651026358526424, 0.9833433139039235, 0.8773258179532721),
        (0.7233201448753168, 0.748747637472693, 0.487),
        (1.0, 1.0, 1.0),
    ]
)
"""Of nothing, 10%, 25%, 50% and all tokens: what each of the three stages leaves of what it is given."""
_SIDES = (17.386981849158786, 15.580797034937687, 11.756787150848968)
_THRESHOLDS = (39.26492840997221, 34.759552803070484, 28.683047941520474)
_FOUND = (0.10, 0.25, 0.50)


@lru_cache(maxsize=1024)
def shares_for(ratio: float) -> tuple[float, float, float]:
    """Shares of the three stages at which the published decoder works on that share of the tokens in the mean."""

    def at(parameter: float) -> tuple[float, float, float]:
        place = parameter * (len(_SHARES) - 1)
        first, second, third = (float(np.interp(place, np.arange(len(_SHARES)), column)) for column in _SHARES.T)
        return first, second, third

    def entering(parameter: float) -> list[int]:
        first, second, third = (round(1e6 * share) for share in np.cumprod(at(parameter)))
        return [first] * _LAYERS[0] + [second] * (_LAYERS[1] - _LAYERS[0]) + [third] * (_DEPTH - _LAYERS[1])

    return at(nearest_plan(entering, 10**6, round(1e6 * ratio), "nominal"))


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(VisionReducer):
    """Importance by reliable attention, recycling by cells, two cuts in the decoder.

    Attributes:
        threshold: multiple of the mean from which a token is reliable; None: by the share of the budget.
        side: width of a cell in patches; None: by the share of the first stage.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    threshold: float | None = None
    side: float | None = None

    name: ClassVar[str] = "vflowopt"
    published_budget: ClassVar[str] = "processed"
    ranks_in_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("threshold", self.threshold is None or self.threshold >= 0, "must not be negative")
        self.require("side", self.side is None or self.side >= 1, "must be at least 1")

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        threshold = self.threshold
        if threshold is None:
            threshold = float(np.interp(self.target_ratio or 0.0, _FOUND, _THRESHOLDS))
        return {"importance": VisionFact(ReliableAttention(threshold))}

    # --- in front of the projector ---

    def aim_in_front(self, count: int) -> int | None:
        aim = self.aim_of(count)
        if aim is None or not count:
            return aim
        return min(max(round(count * shares_for(min(aim / count, 1.0))[0]), 1), count)

    def reduce(self, view: VisionView) -> Reduction:
        importance = view.facts["importance"].float()
        crops, patches = importance.shape
        side = self.side or float(np.interp(view.target / patches, _SHARES[1:4, 0], _SIDES))
        view.is_raster(self.name, "cells are runs of tokens")
        cell_NP, cells = cells_of(view.patches_NP, view.grid, side, view.target)
        rank = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = rank < view.target - cells
        # The most important of the dropped patches of each cell takes the place of all of them.
        member = (cell_NP[:, :, None] == torch.arange(cells, device=rank.device)) & ~kept[:, :, None]
        best_NG = rank[:, :, None].masked_fill(~member, patches).amin(1)
        recycled = ~kept & (rank == best_NG.gather(1, cell_NP))
        first = (kept | recycled) * 2 * patches - rank
        index = top_k(first.float(), [patches] * crops, [view.target] * crops)
        # What each token that leaves is made of.
        own = torch.nn.functional.one_hot(index, patches).float()
        of_cell = (cell_NP.gather(1, index)[:, :, None] == cell_NP[:, None]) & ~kept[:, None]
        shares = of_cell * importance[:, None]
        # A cell that nobody looks at, such as one of padding: all of it alike.
        shares = torch.where(shares.sum(2, keepdim=True) > 0, shares, of_cell.float())
        shares = shares / shares.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        weights = torch.where(recycled.gather(1, index)[:, :, None], shares, own)
        tokens = (weights @ view.tokens_NPC.float()).to(view.tokens_NPC.dtype)
        return Reduction(tokens, index, index, weights=lambda: weights)

    # --- in the decoder ---

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return dict.fromkeys(scaled_layers([layer - 1 for layer in _LAYERS], _DEPTH, num_layers), Rows.NONE)

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if not hasattr(memory, "plans"):
            rows = zip(view.counts, view.prompt_counts, strict=True)
            memory.plans = [self._plan(count, had, view.num_layers) for count, had in rows]
        plans = zip(memory.plans, view.counts, strict=True)
        keep = tuple(min(plan.get(view.layer, count), count) for plan, count in plans)
        if keep == view.counts:
            return None
        return Selection(top_k(view.vision_fact("importance"), view.counts, keep), keep)

    def _plan(self, count: int, had: int, num_layers: int) -> Mapping[int, int]:
        """Tokens to keep behind the layers of the two cuts of ``count`` that entered the decoder."""
        aim, layers = self.aim_of(had), tuple(self.stages(num_layers))
        if aim is None or not count or not layers:
            return {}
        second = min(max(round(count * shares_for(min(aim / had, 1.0))[1]), 1), count)
        spent = count * (layers[0] + 1) + (second * (layers[-1] - layers[0]) if len(layers) > 1 else 0)
        behind = num_layers - layers[-1] - 1
        third = (num_layers * min(aim, had) - spent) // behind if behind else second
        last = min(max(third, 1), second)
        return {layers[0]: second, layers[-1]: last} if len(layers) > 1 else {layers[0]: last}


def cells_of(patches_NP: torch.Tensor, grid: tuple[int, int], side: float, most: int) -> tuple[torch.Tensor, int]:
    """Number of each patch's cell, ``[N, P]``, and how many cells the grid (width, height) has: not more than ``most``,
    for which the side grows.

    Without a grid (a span of a bare decoder that is no square) a cell is a run of ``side`` squared tokens.
    """
    width, height = grid
    if height == 1:
        run = max(int(side**2), -(-width // most), 1)
        return patches_NP // run, -(-width // run)

    def along(length: int, side: float) -> int:
        return int((length - 1) // side) + 1

    while along(width, side) * along(height, side) > most:
        side *= 1.25
    across = along(width, side)
    row, column = patches_NP // width, patches_NP % width
    return (row // side).long() * across + (column // side).long(), across * along(height, side)
