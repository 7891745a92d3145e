"""DART, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (EMNLP 2025,
arXiv 2502.11494).

After decoder layer ``layer - 1``, once: *pivots* are the visual tokens and the text tokens behind the last image whose
keys (after rotary embedding, all heads side by side) have the largest L1 norm. Each pivot in turn takes, of the visual
tokens that are left, those least similar to it (cosine of the hidden states behind the decoder's final norm), all
pivots the same number. The visual pivots and what was taken stay. Survivors keep their positions.

Budget: as with FastV, ``target_tokens`` is turned into the count that makes the *processed* mean meet it,
``(L * T - layer * N) / (L - layer)``, at least one token.

Deviations: the published code keeps ``visual_pivots + P * floor(T / P)`` tokens for P pivots; here the first pivots
take one more until the count is met, which is the same set where nothing is left over. Pivots are walked in the order
in which Python iterates over a set of their places in the prompt, as published. The key norms are those of single
tokens: the published reshape is right only for another memory layout and mixes tokens in this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.budget import one_cut
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.selection import counts_to_mask, descending_order, on_device, top_k
from llava.pruning.types import Rows, Selection


@dataclass(frozen=True, kw_only=True)
class Dart(DecoderMethod):
    """Tokens that duplicate the pivots least.

    Attributes:
        layer: layers that see all visual tokens (K in the paper).
        visual_pivots: visual tokens that are pivots; they stay.
        text_pivots: text tokens that are pivots.
    """

    target_tokens: int | None = 64
    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4

    name: ClassVar[str] = "dart"
    published_budget: ClassVar[str] = "processed"
    reads_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("layer", self.layer >= 1, "must be at least 1")
        self.require("visual_pivots", self.visual_pivots >= 1, "must be at least 1")
        self.require("text_pivots", self.text_pivots >= 0, "must not be negative")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        self.require("layer", self.layer < num_layers, f"must be below the decoder's {num_layers} layers")
        return {self.layer - 1: Rows.NONE}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        rows = zip(view.counts, self.targets(view), strict=True)
        return self.choose(view, tuple(one_cut(count, view.num_layers, self.layer, target) for count, target in rows))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        # 1. Pivots by the norms of their keys, text behind the last image only.
        norms_BN = view.keys_BGND.float().abs().sum((1, 3))
        rows, width = max(view.query_rows), norms_BN.shape[1]
        visual = [min(self.visual_pivots, kept) for kept in keep]
        text = [min(self.text_pivots, own) for own in view.query_rows]
        by_norm = descending_order(view.of_visual(norms_BN), view.counts)[:, : max(visual)]
        # The text ends where the sequence ends: turned around it begins at 0.
        text_by_norm = descending_order(norms_BN[:, width - rows :].flip(1), view.query_rows)[:, : max(text)]
        places = torch.cat((view.slots_BV.gather(1, by_norm), width - 1 - text_by_norm), dim=1)
        # 2. In which order they are walked only the host can say: it is sent a handful of numbers, once.
        pivots, quotas = [], []
        for row, own in enumerate(places.tolist()):
            words = own[max(visual) :][: text[row]]
            walked = walk(own[: visual[row]], words, padding=width - view.lengths[row])
            pivots.append(walked)
            quotas.append(shares(keep[row] - visual[row], len(walked)))
        # 3. Each takes what is least like it.
        stays = torch.zeros(len(keep), max(view.counts), dtype=torch.bool, device=view.device)
        stays.scatter_(1, by_norm, counts_to_mask(visual, by_norm.shape[1], view.device))
        index = on_device(padded(pivots, width - 1), view.device).long()
        stays = least_similar(
            view.normed(view.hidden_BVC),
            view.normed(view.hidden_at(index)),
            on_device(padded(quotas, 0), view.device),
            stays,
            view.counts,
        )
        return Selection(top_k(stays.float(), view.counts, keep), keep)


def walk(visual: Sequence[int], text: Sequence[int], padding: int) -> list[int]:
    """Pivots in the order of the published code, which iterates over a set of their places in the unpadded prompt."""
    # Built from one list: a union of two sets may have a larger table, and with it another order.
    return [place + padding for place in set([own - padding for own in (*visual, *text)])]


def shares(total: int, pivots: int) -> list[int]:
    """How many tokens each pivot takes: as many as any other, the first ones one more where that leaves some over."""
    return [total // pivots + (place < total % pivots) for place in range(pivots)]


def padded(rows: Sequence[Sequence[int]], value: int) -> list[list[int]]:
    """Rows of equal length."""
    longest = max(map(len, rows))
    return [[*row, *[value] * (longest - len(row))] for row in rows]


def least_similar(
    tokens_BVC: Tensor, pivots_BPC: Tensor, quotas_BP: Tensor, chosen_BV: Tensor, counts: Sequence[int]
) -> Tensor:
    """Tokens that the pivots take one after another, each those that are least similar (cosine) to it.

    Args:
        tokens_BVC: candidates, row i valid up to ``counts[i]``.
        pivots_BPC: pivots in their order.
        quotas_BP: how many each takes.
        chosen_BV: tokens that are chosen already.
        counts: valid candidates per row.

    Returns:
        bool ``[B, V]``: the tokens chosen before and those taken. Of equals the first is taken.
    """
    tokens, pivots = (torch.nn.functional.normalize(side.float(), dim=2) for side in (tokens_BVC, pivots_BPC))
    unlike_BPV = -(pivots @ tokens.transpose(1, 2))
    rank = torch.arange(tokens.shape[1], device=tokens.device)
    for pivot in range(pivots.shape[1]):
        order = descending_order(unlike_BPV[:, pivot].masked_fill(chosen_BV, -torch.inf), counts)
        chosen_BV = chosen_BV | torch.zeros_like(chosen_BV).scatter(1, order, rank < quotas_BP[:, pivot, None])
    return chosen_BV
