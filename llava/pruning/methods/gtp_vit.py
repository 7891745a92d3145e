"""GTP-ViT, "Efficient Vision Transformers via Graph-Based Token Propagation" (WACV 2024, arXiv 2311.03035), inside the
vision tower of LLaVA.

In every layer, between attention and MLP, the patches with the lowest scores go, and what they know is passed on first:
every patch that stays gets ``alpha`` times the features of its neighbors that go. Scores combine the attention that a
patch pays to itself and the attention that it receives from all tokens. Neighbors are the eight patches around a patch
and those most like it in front of the first layer; an edge weighs ``1 / sqrt(d_i d_j)``, with the numbers d of
neighbors, and keeps that weight.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. The
paper drops one constant number per layer; here every layer looks anew at what is left and drops the smallest number
with which the remaining layers end at the budget. Crops and images share the budget in proportion to their patches.

Deviations: the published code was written for classification, and leaves tokens in order of their scores; here the
order is that of the raster. Left out are its ablations (the mean of what goes as one more token, scores by similarity
of attention), sizes of tokens in the next attention, and sparse attention. Inside the tower unpadding (LLaVA-1.6) does
not take place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from llava.pruning.method import TowerMerger
from llava.pruning.scores import attention_rows
from llava.pruning.selection import take
from llava.pruning.vision import TowerKeep, TowerView

_BLOCK = 64
SELECTIONS = ("mixed", "sum", "diagonal", "received", "cls")
GRAPHS = ("mixed", "spatial", "semantic", "none")


class AttentionSummary(NamedTuple):
    """Of every head and token, CLS included, ``[N, H, T]``: what it pays to itself, receives from all tokens together,
    and receives from CLS.
    """

    own_NHT: Tensor
    received_NHT: Tensor
    cls_NHT: Tensor


def summary(query_NHTD: Tensor, key_NHTD: Tensor, scaling: float) -> AttentionSummary:
    """The sums of an attention map that never exists as a whole."""
    own, received, cls = [], torch.zeros((), device=query_NHTD.device), None
    for start in range(0, query_NHTD.shape[2], _BLOCK):
        rows = attention_rows(query_NHTD[:, :, start : start + _BLOCK], key_NHTD, scaling)
        own.append(rows.diagonal(start, 2, 3))
        received = received + rows.sum(2)
        cls = rows[:, :, 0] if cls is None else cls
    assert cls is not None
    return AttentionSummary(torch.cat(own, 2), received, cls)


def token_scores(attention: AttentionSummary, selection: str, heads: str) -> Tensor:
    """Scores of the patches, ``[N, P]``.

    Args:
        attention: of all tokens.
        selection: one of ``SELECTIONS``.
        heads: ``max`` or ``mean``; of each quantity, before quantities are combined.
    """
    patches = [values[:, :, 1:] for values in attention]
    own, received, cls = [values.amax(1) if heads == "max" else values.mean(1) for values in patches]
    if selection == "mixed":
        return own * received
    return {"sum": own + received, "diagonal": own, "received": received, "cls": cls}[selection]


def token_graph(patches_NPC: Tensor, kind: str, neighbors: int) -> Tensor:
    """Normalized weights of the edges between patches, ``[N, P, P]``, float32.

    Args:
        patches_NPC: features of all patches of a square picture.
        kind: one of ``GRAPHS``, but for ``none``.
        neighbors: patches that a patch is linked to for their likeness.
    """
    crops, count, _ = patches_NPC.shape
    device = patches_NPC.device
    edges = torch.zeros(crops, count, count, dtype=torch.bool, device=device)
    if kind in ("mixed", "spatial"):
        width = math.isqrt(count) if math.isqrt(count) ** 2 == count else count
        place = torch.arange(count, device=device)
        rows, columns = place // width, place % width
        edges |= ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1)
    if kind in ("mixed", "semantic"):
        unit = torch.nn.functional.normalize(patches_NPC.float(), dim=2)
        likeness = unit @ unit.transpose(1, 2)
        # The patch itself is the most similar one, and one more than wanted is above the bound.
        bound = likeness.kthvalue(max(count - neighbors, 1), dim=2, keepdim=True).values
        edges |= likeness >= bound
    weights = edges.masked_fill(torch.eye(count, dtype=torch.bool, device=device), False).float()
    scale = weights.sum(2).clamp_min(1).rsqrt()
    return weights * scale[:, :, None] * scale[:, None, :]


@dataclass(frozen=True, kw_only=True)
class GTPViT(TowerMerger):
    """Patches pass on what they know before they go.

    Attributes:
        selection: what scores are made of: ``mixed`` (own times received attention), ``sum``, ``diagonal`` (own),
            ``received``, or ``cls``.
        heads: ``max`` or ``mean`` over the heads.
        graph: neighbors by ``spatial`` place, ``semantic`` likeness or both (``mixed``); ``none`` passes nothing on.
        neighbors: patches that a patch is linked to for their likeness.
        alpha: weight of what is passed on.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    selection: str = "mixed"
    heads: str = "max"
    graph: str = "mixed"
    neighbors: int = 8
    alpha: float = 0.1

    name: ClassVar[str] = "gtp_vit"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("selection", self.selection in SELECTIONS, f"must be one of {', '.join(SELECTIONS)}")
        self.require("heads", self.heads in ("max", "mean"), "must be 'max' or 'mean'")
        self.require("graph", self.graph in GRAPHS, f"must be one of {', '.join(GRAPHS)}")
        self.require("neighbors", self.neighbors >= 1, "must be at least 1")
        self.require("alpha", self.alpha >= 0, "must not be negative")

    def merge(self, view: TowerView) -> TowerKeep | None:
        patches = view.sizes_NT.shape[1] - 1
        leaving = -(-(patches - view.target) // (view.layers - view.layer))  # rounded up
        if leaving <= 0:
            return None
        memory = view.memory
        if view.layer == 0 and self.graph != "none":
            graph = token_graph(view.entering_NTC[:, 1:], self.graph, self.neighbors)
            # By rows of those that pass on: these are few, and their rows lie together.
            memory.graph = graph.transpose(1, 2).contiguous()
            memory.place = torch.arange(patches, device=graph.device).expand(len(graph), -1)
        attention = summary(view.query_NHTD, view.key_NHTD, view.scaling)
        order = token_scores(attention, self.selection, self.heads).argsort(dim=1, descending=True, stable=True)
        kept, gone = order[:, : patches - leaving], order[:, patches - leaving :]
        index = torch.cat((torch.zeros_like(kept[:, :1]), kept + 1), dim=1)
        if self.graph == "none":
            return TowerKeep(index)
        # The graph stays whole, and places say what is left of it: cutting it down would take longer.
        going, memory.place = memory.place.gather(1, gone), memory.place.gather(1, kept)
        edges = take(memory.graph, going).gather(2, memory.place[:, None].expand(-1, leaving, -1))
        return TowerKeep(index, passed_on(view.hidden_NTC, index, gone + 1, edges, self.alpha))


def passed_on(hidden_NTC: Tensor, kept_NK: Tensor, gone_NG: Tensor, edges_NGP: Tensor, alpha: float) -> Tensor:
    """States of the tokens that stay, CLS first, with their shares of those that go, ``[N, K, C]``.

    Args:
        hidden_NTC: states of all tokens.
        kept_NK: indices of those that stay.
        gone_NG: indices of those that go.
        edges_NGP: weight of the edge from each that goes to each patch that stays, P = K - 1.
        alpha: weight of what is passed on.
    """
    hidden = take(hidden_NTC, kept_NK).float()
    passed = edges_NGP.transpose(1, 2) @ take(hidden_NTC, gone_NG).float()
    hidden[:, 1:].add_(passed, alpha=alpha)
    return hidden.to(hidden_NTC.dtype)
