"""What a method may ask of the vision tower, and what it is shown and returns there.

The model (or whoever calls :meth:`PruningRun.set_visual`) computes the facts that a method declares and hands its crops
over. Indices of patches count the crop's own raster.

Shapes: N crops of equal size and budget, P patches per crop, T tokens inside the tower (CLS and patches), K tokens that
leave, C width of the features.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class TowerValue(enum.Enum):
    """A quantity per patch that a tower layer can give. Attention is float32, and 0 for patches that are padding."""

    CLS_ATTENTION = "attention that CLS pays to the patch, mean over heads"
    RECEIVED_ATTENTION = "attention that the patch receives, mean over heads and over all tokens, CLS included"
    KEYS = "key of the patch, mean over heads"
    WIDE_CLS_ATTENTION = "attention that CLS pays to the patch if all heads are taken as one wide head"
    WIDE_KEYS = "key of the patch, all heads side by side"

    @property
    def is_attention(self) -> bool:
        return self not in (TowerValue.KEYS, TowerValue.WIDE_KEYS)


@dataclass(frozen=True)
class VisionFact:
    """A declared need: a value of one layer.

    Attributes:
        value: what.
        layer: 0-based index of the tower's layer, negative from the end; None: the layer whose output is used.
    """

    value: TowerValue
    layer: int | None = None


CLS_ATTENTION = "cls_attention"
"""Name of the one fact that has an argument of its own in ``set_visual``."""


@dataclass(frozen=True)
class VisionView:
    """A stack of crops in front of the projector (on a bare decoder: among the input embeddings).

    Attributes:
        tokens_NPC: patch features.
        facts: what the method declared, by its names, ``[N, P, ...]``.
        target: tokens that each crop may keep, below P.
        patches_NP: index of each patch in the raster of its crop; patches that the prompt leaves out are missing.
        grid: (width, height) of the crop in patches; (number of tokens, 1) where they do not form a square.
        cls_NC: the tower's CLS token; None where there is none (bare decoder, or CLS is among the tokens).
    """

    tokens_NPC: Tensor
    facts: Mapping[str, Tensor]
    target: int
    patches_NP: Tensor
    grid: tuple[int, int]
    cls_NC: Tensor | None = None


@dataclass(frozen=True)
class Reduction:
    """What leaves a stack of crops.

    Attributes:
        tokens_NKC: features; a kept patch may be changed.
        origin_NK: index into the view's P tokens, or -1 for a token that is none of them (merged, CLS).
        source_NK: index of the token whose place it takes: its rotary position in position mode ``original``.
        in_place: merged tokens stand at their place too; otherwise behind all patches of the image, in this order.
    """

    tokens_NKC: Tensor
    origin_NK: Tensor
    source_NK: Tensor
    in_place: bool = False

    @classmethod
    def keep(cls, tokens_NPC: Tensor, index_NK: Tensor) -> Reduction:
        """Nothing but a choice of patches."""
        return cls(take(tokens_NPC, index_NK), index_NK, index_NK)


@dataclass(frozen=True)
class TowerView:
    """Tokens inside a tower layer, between attention and MLP.

    Attributes:
        layer: index of the layer; ``layers`` is how many run.
        keys_NTC: this layer's keys, mean over heads. Token 0 is CLS if ``has_cls``.
        sizes_NT: patches that each token stands for.
        target: patches (CLS not counted) that shall be left behind the last layer.
    """

    layer: int
    layers: int
    keys_NTC: Tensor
    sizes_NT: Tensor
    target: int
    has_cls: bool = True


@dataclass(frozen=True)
class TowerMerge:
    """Which tokens become one; the tower takes their mean, weighted by size.

    Attributes:
        slot_NT: for every token its place in the new sequence.
        leader_NK: for every new token the old one that names its place.
    """

    slot_NT: Tensor
    leader_NK: Tensor


@dataclass(frozen=True)
class ReducedRow:
    """What a prompt row must say about visual tokens that were reduced before the decoder.

    Attributes:
        origins: original visual index of each visual token of the row, -1 for merged ones.
        visual_tokens: visual tokens that the row would have without the reduction.
        positions: position that each token of the row (text too) would have without the reduction.
    """

    origins: Tensor
    visual_tokens: int
    positions: Tensor


def take(tokens_NPC: Tensor, index_NK: Tensor) -> Tensor:
    """``[N, K, C]`` of ``[N, P, C]``."""
    return tokens_NPC.gather(1, index_NK[:, :, None].expand(-1, -1, tokens_NPC.shape[2]))


def merge_tokens(tokens_NTC: Tensor, sizes_NT: Tensor, merge: TowerMerge) -> tuple[Tensor, Tensor]:
    """Means of the tokens of each new place, weighted by size, ``[N, K, C]``, and the new sizes, ``[N, K]``."""
    new = torch.arange(merge.leader_NK.shape[1], device=tokens_NTC.device)
    # One product instead of a scattered sum: the order of summation is fixed on every device.
    weights = (merge.slot_NT[:, None, :] == new[:, None]) * sizes_NT[:, None, :].float()
    sizes = weights.sum(2)
    return ((weights @ tokens_NTC.float()) / sizes[:, :, None]).to(tokens_NTC.dtype), sizes


def rest_of(count: int, index_NK: Tensor) -> Tensor:
    """The indices of ``count`` tokens that are not in ``index_NK``, ascending: ``[N, count - K]``."""
    chosen = torch.zeros(len(index_NK), count, dtype=torch.uint8, device=index_NK.device).scatter_(1, index_NK, 1)
    return chosen.argsort(dim=1, stable=True)[:, : count - index_NK.shape[1]]
