"""VScan, "Rethinking Visual Token Reduction for Efficient Large Vision-Language Models" (arXiv 2505.22654).

In two stages. Behind the projector: half of the patches that stay are *local*, the same number of each window of the
picture, by the CLS attention of a shallow layer of the tower; the others are *global*, by the CLS attention of the
selected layer. Every dropped patch is averaged into the kept one most like it (cosine of the projected features).
Raster order. In front of a layer in the middle of the decoder: the tokens stay that the last token of the prompt is
about to attend to in that layer, computed from the layer's own norm and projections for this one row.

Budget: ``target_tokens`` is the *processed* mean, as the paper counts. One and a half times as many enter the decoder,
and the second stage leaves what makes the mean (96 and from layer 16 of 32 on 32: 64). ``tokens`` gives the numbers
instead. Crops and images share the budget of the first stage in proportion to their patches.

Deviations: the published code rounds the tokens of each window down and lets the rest of the budget lapse; here the
most attended of the others take these places, and those that windows have too few patches for, unless ``fill`` is
off. Other grids than 24 x 24 have smaller windows at the right and at the bottom. The layers are 6 of 24 and 16 of 32,
scaled to other depths. Padding patches have no CLS attention. On a bare decoder, where nothing says which tokens form
a picture, a window is a run of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.budget import parse_layers, plan_stages
from llava.pruning.engine.view import LayerView
from llava.pruning.method import VisionReducer
from llava.pruning.selection import take
from llava.pruning.types import Rows, Selection
from llava.pruning.vision import CLS_ATTENTION, Reduction, TowerValue, VisionFact, VisionView

_SHALLOW, _DEPTH = 6, 24
_IN_FRONT = 1.5  # tokens that enter the decoder, as a multiple of the mean


def windows_of(patches_NP: Tensor, grid: tuple[int, int], side: int) -> tuple[Tensor, int]:
    """Number of each patch's window, ``[N, P]``, and how many windows the whole grid (width, height) has."""
    width, height = grid
    if height == 1:
        return patches_NP // side**2, -(-width // side**2)
    across, down = -(-width // side), -(-height // side)
    return patches_NP // width // side * across + patches_NP % width // side, across * down


def best_of_windows(attention_NP: Tensor, window_NP: Tensor, windows: int, each: int) -> Tensor:
    """True for the ``each`` most attended patches of every window, ``[N, P]``; windows may have fewer."""
    order = attention_NP.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, window_NP.gather(1, order).argsort(dim=1, stable=True))
    # Where each window begins in this order.
    sizes = (window_NP[:, :, None] == torch.arange(windows, device=window_NP.device)).sum(1)
    rank = torch.arange(order.shape[1], device=order.device) - (sizes.cumsum(1) - sizes).gather(
        1, window_NP.gather(1, order)
    )
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, rank < each)


def absorb(tokens_NPC: Tensor, kept_NK: Tensor) -> Tensor:
    """Share of each patch in each kept one, ``[N, K, P]``: a kept patch and those most like it count alike."""
    unit = torch.nn.functional.normalize(tokens_NPC.float(), dim=2)
    kept = take(unit, kept_NK)
    place = torch.arange(kept_NK.shape[1], device=kept_NK.device)
    nearest = (unit @ kept.transpose(1, 2)).argmax(2).scatter(1, kept_NK, place.expand_as(kept_NK))
    members = (nearest[:, None] == place[:, None]).float()
    return members / members.sum(2, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class VScan(VisionReducer):
    """Local and global patches with the others merged into them, and a cut in the middle of the decoder.

    Attributes:
        window: side of a window in patches.
        local_share: share of the first stage's tokens that windows choose.
        fill: give the places that windows leave to the most attended of the other patches.
        local_layer: layer of the tower that ranks the local patches, counted from 1; None: 6 of 24.
        layers: layers of the decoder in front of which tokens are dropped, such as ``16`` or ``12/20``; None: the one
            in the middle.
        tokens: tokens that enter the decoder and those that each of the layers leaves, such as ``96/32``; replaces
            ``target_tokens``.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    window: int = 6
    local_share: float = 0.5
    fill: bool = True
    local_layer: int | None = None
    layers: str | None = None
    tokens: str | None = None

    name: ClassVar[str] = "vscan"
    published_budget: ClassVar[str] = "processed"
    instead_of_target: ClassVar[str | None] = "tokens"
    reduces_projected: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("window", self.window >= 1, "must be at least 1")
        self.require("local_share", 0 <= self.local_share <= 1, "must lie in 0..1")
        self.require("local_layer", self.local_layer is None or self.local_layer >= 1, "must be at least 1")
        layers = (1,) if self.layers is None else parse_layers(self.layers)
        self.require("layers", layers is not None and layers[0] >= 1, "must be rising layer indices from 1, such as 16")
        # Tokens fall where layers rise.
        given = (1,) if self.tokens is None else parse_layers("/".join(reversed(self.tokens.split("/"))))
        self.require("tokens", given is not None and given[0] >= 1, "must be falling numbers from 1 up, such as 96/32")
        self.require(
            "tokens",
            self.tokens is None or len(given or ()) == len(layers or ()) + 1,
            "must give the tokens that enter the decoder and those left in front of each of the layers",
        )

    # --- behind the projector ---

    def aim_in_front(self, count: int) -> int | None:
        if self.tokens is not None:
            return int(self.tokens.split("/")[0])
        aim = self.aim_of(count)
        return None if aim is None else int(aim * _IN_FRONT)

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        layer = self.local_layer or max(round(tower_layers * _SHALLOW / _DEPTH), 1)
        return {
            "local": VisionFact(TowerValue.CLS_ATTENTION, layer - 1),
            CLS_ATTENTION: VisionFact(TowerValue.CLS_ATTENTION),
        }

    def reduce(self, view: VisionView) -> Reduction:
        # Local patches first, the others by the attention of the selected layer.
        view.is_raster(self.name, "windows are runs of tokens")
        windows, number = windows_of(view.patches_NP, view.grid, self.window)
        local = int(view.target * self.local_share)
        each = local // number
        chosen = best_of_windows(view.facts["local"].float(), windows, number, each)
        order = view.facts[CLS_ATTENTION].float().argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, chosen.gather(1, order).to(torch.uint8).argsort(dim=1, descending=True, stable=True))
        count = view.target if self.fill else max(each * number + view.target - local, 1)
        kept = order[:, :count].sort(dim=1).values
        # What goes becomes part of what stays.
        shares = absorb(view.tokens_NPC, kept)
        merged = (shares @ view.tokens_NPC.float()).to(view.tokens_NPC.dtype)
        return Reduction(merged, kept, kept, weights=lambda: shares)

    # --- in the decoder ---

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        if self.layers is None:
            return tuple(layer for layer in (num_layers // 2,) if layer)
        layers = parse_layers(self.layers) or ()
        self.require("layers", layers[-1] < num_layers, f"must be below the decoder's {num_layers} layers")
        return layers

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {layer - 1: Rows.NEXT_LAST for layer in self._layers(num_layers)}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if not hasattr(memory, "plans"):
            rows = zip(view.counts, view.prompt_counts, strict=True)
            memory.plans = [self._plan(count, had, view.num_layers) for count, had in rows]
        keep = tuple(
            min(plan.get(view.layer + 1, count), count) for plan, count in zip(memory.plans, view.counts, strict=True)
        )
        return None if keep == view.counts else view.best(view.relevance_BV, keep)

    def _plan(self, count: int, prompt_count: int, num_layers: int) -> Mapping[int, int]:
        """Tokens to keep in front of each layer."""
        layers = self._layers(num_layers)
        if self.tokens is not None:
            return dict(zip(layers, map(int, self.tokens.split("/")[1:]), strict=True))
        aim = self.aim_of(prompt_count)
        return {} if aim is None or not count else plan_stages(count, num_layers, aim, layers)
