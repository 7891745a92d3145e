"""ToDRE, token diversity and task relevance (arXiv 2505.18757).

Two stages. Among the input embeddings, greedily: the next token is the one with the smallest sum of cosines to those
chosen so far (max-sum diversification). Deep in the decoder, where the text has taken from the picture what it needs,
*all* visual tokens go, for the rest of the prefill and for decoding: in front of ``exit_layer``.

No code was found, and two things are not public. Which token comes first: here the one with the smallest sum of cosines
to all tokens. By which measure of the attention of text to picture the layer of the second stage is picked, in the
second half of the decoder and per model or per prompt: so ``exit_layer`` has to be given, and without it there is no
second stage.

Budget: ``target_tokens`` is the *processed* mean over all layers, the empty ones included (the paper gives the share
that the first stage drops, 90%): with an exit in front of layer 24 of 32 a third more tokens enter the decoder. Without
an exit nominal and processed mean are both the target. The exit is not scaled with the depth. Images and crops of a
prompt compete for one budget; survivors are renumbered, as is usual in front of the decoder (the paper does not say).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.selection import counts_to_mask, first_in_sequence_order, take
from llava.pruning.types import BEFORE_DECODER, Rows, Selection


def max_sum_order(tokens_BVC: Tensor, counts: Sequence[int], picks: int) -> Tensor:
    """Indices ``[B, picks]`` of tokens that are least like those before them, in the order in which they are picked.

    Args:
        tokens_BVC: ``[B, V, C]``, row i valid up to ``counts[i]``.
        counts: valid tokens per row; a row with fewer than ``picks`` repeats arbitrary indices behind its count.
        picks: tokens to pick.
    """
    unit = torch.nn.functional.normalize(tokens_BVC.float(), dim=2)
    valid = counts_to_mask(counts, unit.shape[1], unit.device)
    unit = unit * valid[:, :, None]
    taken = torch.zeros_like(valid, dtype=torch.float32).masked_fill(~valid, torch.inf)

    def likeness(others_BC: Tensor) -> Tensor:
        return (unit @ others_BC[:, :, None])[:, :, 0]

    picked = [(likeness(unit.sum(1)) + taken).argmin(1)]  # of equals the first
    similarity = torch.zeros_like(taken)
    for _ in range(picks - 1):
        last = picked[-1][:, None]
        taken = taken.scatter(1, last, torch.inf)
        similarity = similarity + likeness(take(unit, last)[:, 0])
        picked.append((similarity + taken).argmin(1))
    return torch.stack(picked, 1)


@dataclass(frozen=True, kw_only=True)
class ToDRE(DecoderMethod):
    """Diverse tokens, and none at all in the last layers.

    Attributes:
        exit_layer: layer in front of which all visual tokens are dropped; None: they stay.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    exit_layer: int | None = None

    name: ClassVar[str] = "todre"
    published_budget: ClassVar[str] = "processed"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("exit_layer", self.exit_layer is None or self.exit_layer >= 1, "must be at least 1")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        if self.exit_layer is None:
            return {BEFORE_DECODER: Rows.NONE}
        self.require("exit_layer", self.exit_layer < num_layers, f"must be below the decoder's {num_layers} layers")
        return {BEFORE_DECODER: Rows.NONE, self.exit_layer - 1: Rows.NONE}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        if view.layer != BEFORE_DECODER:
            nothing = torch.zeros(len(view.counts), 0, dtype=torch.long, device=view.device)
            return Selection(nothing, (0,) * len(view.counts))
        rows = zip(view.counts, self.targets(view), strict=True)
        keep = tuple(tokens_in_front(count, target, view.num_layers, self.exit_layer) for count, target in rows)
        return self.choose(view, keep)

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        order = max_sum_order(view.hidden_BVC, view.counts, max(keep))
        return Selection(first_in_sequence_order(order, keep, view.hidden_BVC.shape[1]), keep)


def tokens_in_front(count: int, target: int, num_layers: int, exit_layer: int | None) -> int:
    """Tokens that enter the decoder so that all layers process ``target`` in the mean; at least one."""
    return min(max(round(target * num_layers / (exit_layer or num_layers)), 1), count)
