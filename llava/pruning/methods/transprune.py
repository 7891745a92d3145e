"""TransPrune, "Token Transition Pruning for Efficient Large Vision-Language Model" (CVPR 2026, arXiv 2507.20630).

In front of three decoder layers. A token's *transition* in a layer is how much attention and MLP change it: the norm of
what comes out divided by that of what went in (behind the norm, in front of the residual), times the share of
``exp(1 - cosine of both)`` among all tokens of the prompt, text included; attention and MLP add up. It is summed over
the layers from the one in front of the first cut on ("TTV"). The second signal is the mean attention that all text
tokens behind the picture would pay in the layer that comes next ("IGA"). Both are divided by their sum over the visual
tokens that are left; the tokens with the largest sum stay.

Budget: the paper gives layers 7, 9 and 12 of 32 and the shares 0.875, 0.625 and 0.125 of all tokens that they leave, a
*processed* mean of 236 of 576 tokens (``shares=0.875/0.625/0.125``, ``layers`` scaled to other depths), and no other
budget. ``target_tokens`` is the processed mean. The layers move to the front in proportion until the published shares
cost no more than the target (or the first cut is in front of layer 1); then the shares move from the published ones
toward one token each or toward all tokens until the mean meets the target.

Deviations: rows of a batch share nothing (the published code runs one prompt at a time); values are summed in float32;
in a prompt that ends in its image the last token counts as text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from llava.pruning.budget import mean_tokens, nearest_plan, parse_layers
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.selection import counts_to_mask, on_device
from llava.pruning.types import LayerFact, Rows, Selection

_LAYERS, _DEPTH = (7, 9, 12), 32
_SHARES = (0.875, 0.625, 0.125)
_LEAST = 1e-8


def transition(before_BNC: Tensor, after_BNC: Tensor, real_BN: Tensor | None = None) -> Tensor:
    """Transition of each token, float32 ``[B, N]``; 0 in the padding.

    Args:
        before_BNC: what goes into a block.
        after_BNC: what comes out of it.
        real_BN: False for padding; None if there is none.
    """
    before, after = before_BNC.float(), after_BNC.float()
    weight = torch.exp(1 - torch.nn.functional.cosine_similarity(before, after, dim=2))
    if real_BN is not None:
        weight = weight * real_BN
    ratio = after.norm(dim=2) / before.norm(dim=2).clamp_min(_LEAST)
    moved: Tensor = ratio * weight / weight.sum(1, keepdim=True)
    return moved


@dataclass(frozen=True, kw_only=True)
class TransPrune(DecoderMethod):
    """Cuts by token transition and attention of the text.

    Attributes:
        layers: layers in front of which tokens are dropped, such as ``7/9/12``; None: from the budget.
        accumulate: layers in front of which transitions are added, each that of the layer before it; None: all from
            the first to the last of ``layers``.
        shares: share of all visual tokens that each cut leaves, such as ``0.875/0.625/0.125``; replaces
            ``target_tokens``.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    layers: str | None = None
    accumulate: str | None = None
    shares: str | None = None

    name: ClassVar[str] = "transprune"
    shares_views: ClassVar[bool] = True
    published_budget: ClassVar[str] = "processed"
    instead_of_target: ClassVar[str | None] = "shares"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("layers", "accumulate"):
            text = getattr(self, option)
            rising = text is None or (parse_layers(text) or (0,))[0] >= 1
            self.require(option, rising, "must be rising layer indices from 1 such as 7/9/12")
        shares = _SHARES if self.shares is None else _parse_shares(self.shares)
        self.require("shares", bool(shares), "must be falling shares in 0..1 such as 0.875/0.625/0.125")
        cuts = len(_LAYERS if self.layers is None else parse_layers(self.layers) or ())
        alike = self.shares is None or len(shares) == cuts
        self.require("shares", alike, f"must be as many as there are layers ({cuts})")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        for option in ("layers", "accumulate"):
            layers = parse_layers(getattr(self, option) or "1") or ()
            self.require(option, layers[-1] < num_layers, f"must be below the decoder's {num_layers} layers")
        # Which of these it will be depends on the number of visual tokens. The next layer is asked for attention only
        # where tokens are dropped.
        given = self._given(num_layers)
        cuts = [given] if given else _possible(num_layers)
        added = parse_layers(self.accumulate) if self.accumulate else None
        needed = {layer for plan in cuts for layer in (*plan, *(added or range(plan[0], plan[-1])))}
        return dict.fromkeys((layer - 1 for layer in sorted(needed)), Rows.NEXT_TEXT)

    def layer_facts(self, num_layers: int) -> Mapping[int, Collection[LayerFact]]:
        return dict.fromkeys(self.stages(num_layers), (LayerFact.BLOCKS,))

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        # 1. How many tokens each row keeps in front of which layer, and from where on it adds transitions.
        if not hasattr(memory, "plans"):
            rows = zip(view.counts, view.prompt_counts, strict=True)
            memory.plans = [self._plan(count, had, view.num_layers) for count, had in rows]
            memory.added = [self._added(plan) for plan in memory.plans]
        layer = view.layer + 1
        # 2. The transition of the layer that has just run.
        states, real = view.layer_fact(LayerFact.BLOCKS), view.real_BN
        if any(layer in added for added in memory.added):
            both = transition(states.attention_in, states.attention_out, real)
            both = view.of_visual(both + transition(states.mlp_in, states.mlp_out, real))
            takes_part = on_device([float(layer in added) for added in memory.added], view.device)
            mask = counts_to_mask(view.counts, both.shape[1], view.device)
            added = both * mask * takes_part[:, None]
            if "transition" in memory.carried:
                added = added + memory.carried["transition"].to(added.device)
            memory.carried["transition"] = added
        # 3. Both signals in equal parts.
        keep = tuple(min(plan.get(layer, n), n) for plan, n in zip(memory.plans, view.counts, strict=True))
        if keep == view.counts:
            return None
        score = _shared(memory.carried.get("transition", torch.zeros_like(view.relevance_BV)))
        return view.best(score + _shared(view.relevance_BV), keep)

    def _given(self, num_layers: int) -> tuple[int, ...] | None:
        if self.layers is not None:
            return parse_layers(self.layers)
        return _cuts(_LAYERS[0], num_layers) if self.shares is not None else None

    def _added(self, plan: Mapping[int, int]) -> Collection[int]:
        if self.accumulate is not None:
            return parse_layers(self.accumulate) or ()
        return range(min(plan), max(plan) + 1) if plan else ()

    def _plan(self, count: int, prompt_count: int, num_layers: int) -> Mapping[int, int]:
        layers = self._given(num_layers)
        if self.shares is not None:
            return dict(zip(layers or (), (int(count * share) for share in _parse_shares(self.shares)), strict=False))
        return plan_cuts(count, num_layers, self.target_of(prompt_count), layers)


def _shared(values_BV: Tensor) -> Tensor:
    return values_BV / (values_BV.sum(1, keepdim=True) + _LEAST)


def _parse_shares(text: str) -> tuple[float, ...]:
    """Falling shares in 0..1; empty if the text says something else."""
    try:
        shares = tuple(float(part) for part in text.split("/"))
    except ValueError:
        return ()
    falling = all(a >= b for a, b in zip(shares, shares[1:], strict=False))
    return shares if falling and 0 < shares[-1] and shares[0] <= 1 else ()


def _cuts(first: int, num_layers: int) -> tuple[int, ...]:
    """The published layers at another depth, moved to the front so that the first of 32 would be ``first``."""
    moved = (layer * first / _LAYERS[0] for layer in _LAYERS)
    layers: list[int] = []
    for layer in moved:
        layers.append(max(round(layer * num_layers / _DEPTH), (layers or [0])[-1] + 1))
    return tuple(layer for layer in layers if layer < num_layers)


def _possible(num_layers: int) -> list[tuple[int, ...]]:
    """The cuts that a budget may choose from, the latest first."""
    cuts = (_cuts(first, num_layers) for first in range(_LAYERS[0], 0, -1))
    return [layers for layers in dict.fromkeys(cuts) if layers]


@lru_cache(maxsize=1024)
def plan_cuts(count: int, num_layers: int, target: int, layers: tuple[int, ...] | None) -> Mapping[int, int]:
    """Tokens to keep in front of each layer so that the processed mean meets ``target``."""

    def leaving(layers: tuple[int, ...], keep: Sequence[int]) -> list[int]:
        wanted, current, counts = dict(zip(layers, keep, strict=True)), count, []
        for layer in range(num_layers):
            current = wanted.get(layer + 1, current)
            counts.append(current)
        return counts

    def keep(layers: tuple[int, ...], parameter: float) -> list[int]:
        """1/2 are the published shares; 0 is one token each, 1 all tokens."""
        published = np.interp(np.linspace(0, len(_SHARES) - 1, len(layers)), range(len(_SHARES)), _SHARES)
        return [max(round(count * np.interp(parameter, (0, 0.5, 1), (0, share, 1))), 1) for share in published]

    if layers is None:
        possible = _possible(num_layers)
        if not possible:
            return {}
        cheap = (own for own in possible if mean_tokens(count, leaving(own, keep(own, 0.5)), "processed") <= target)
        layers = next(cheap, possible[-1])
    best = nearest_plan(lambda p: leaving(layers, keep(layers, p)), count, target, "processed")
    return dict(zip(layers, keep(layers, best), strict=True))
