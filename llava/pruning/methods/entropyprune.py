"""EntropyPrune (EMNLP 2026 Findings, arXiv 2602.17196).

After decoder layer ``layer - 1`` (the "entropy collapse layer" comes next), once: a visual token is the matrix of its
queries in that layer, one row per head. The mean over heads is subtracted; ``-sum(l ln l) / ln(heads)`` over the
eigenvalues ``l`` of its Gram matrix, divided by the number of heads, is its entropy. The tokens with the largest one
stay, at their positions. No attention row is needed.

As in the published code the rows are not brought to unit length and the eigenvalues do not sum to 1, so the entropy
may be negative, and large queries count against a token. Eigenvalues below 1e-10 count as 1e-10; float64.

Budget: as in :mod:`~llava.pruning.methods.fastv`, ``(L * T - layer * N) / (L - layer)`` tokens make the *processed*
mean meet ``target_tokens``; ``ratio`` overrides it. LLaVA-1.6 has the same rule here, where the published code keeps
``target_tokens`` after the cut.

Deviations: heads of any width are taken as they are (the published code wants a multiple of 128 and averages wider
heads down to 128); values and hidden states, two more choices beside queries and keys, are left out. Where keys have
fewer heads than queries (grouped-query attention) there are as many rows. On a GPU the eigenvalues are the one place
where the host waits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.budget import one_cut
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.types import LayerFact, Rows, Selection

_LEAST = 1e-10


def head_entropy(states_BHVD: Tensor) -> Tensor:
    """Entropy of each token's matrix of heads, float64 ``[B, V]``; 0 where there is a single head."""
    heads = states_BHVD.shape[1]
    if heads == 1:
        return states_BHVD.new_zeros(states_BHVD.shape[0], states_BHVD.shape[2], dtype=torch.float64)
    rows = states_BHVD.transpose(1, 2).double()
    rows = rows - rows.mean(2, keepdim=True)
    spectrum = torch.linalg.eigvalsh(rows @ rows.transpose(2, 3) / heads).clamp_min(_LEAST)
    entropy: Tensor = -(spectrum * spectrum.log()).sum(2) / math.log(heads)
    return entropy


@dataclass(frozen=True, kw_only=True)
class EntropyPrune(DecoderMethod):
    """One cut by the entropy of the heads.

    Attributes:
        layer: layers that see all visual tokens (K in the paper).
        states: what a token's matrix is made of: ``queries`` or ``keys`` of layer K - 1.
        ratio: fraction of the visual tokens to drop; replaces ``target_tokens``.
    """

    target_tokens: int | None = 64
    layer: int = 2
    states: str = "queries"
    ratio: float | None = None

    name: ClassVar[str] = "entropyprune"
    shares_views: ClassVar[bool] = True
    published_budget: ClassVar[str] = "processed"
    instead_of_target: ClassVar[str | None] = "ratio"
    facts: ClassVar[frozenset[LayerFact]] = frozenset({LayerFact.QUERIES})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("layer", self.layer >= 1, "must be at least 1")
        self.require("states", self.states in ("queries", "keys"), "must be 'queries' or 'keys'")
        self.require("ratio", self.ratio is None or 0 <= self.ratio < 1, "must lie in 0..1, 1 excluded")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        self.require("layer", self.layer < num_layers, f"must be below the decoder's {num_layers} layers")
        return {self.layer - 1: self.rows}

    def layer_facts(self, num_layers: int) -> Mapping[int, Collection[LayerFact]]:
        return {self.layer - 1: self.facts} if self.states == "queries" else {}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        rows = zip(view.counts, view.prompt_counts, strict=True)
        return self.choose(view, tuple(self._keep(count, had, view.num_layers) for count, had in rows))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        if self.states == "queries":
            states = view.layer_fact(LayerFact.QUERIES)
        else:
            states = view.of_visual(view.keys_BGND.transpose(2, 3)).transpose(2, 3)
        return view.best(head_entropy(states), keep)

    def _keep(self, count: int, prompt_count: int, num_layers: int) -> int:
        if self.ratio is not None:
            return round(count * (1 - self.ratio))
        return one_cut(count, num_layers, self.layer, self.target_of(prompt_count))
