"""What a method may ask of the vision tower, and what it is shown and returns there.

The model (or whoever calls :meth:`PruningRun.set_visual`) computes the facts that a method declares and hands its crops
over. Indices of patches count the crop's own raster.

Shapes: N crops of equal size and budget, P patches per crop, T tokens inside the tower (CLS and patches), K tokens that
leave, C width of the features.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava.pruning.engine.notices import say
from llava.pruning.selection import take
from llava.pruning.types import UnsupportedError


class TowerValue(enum.Enum):
    """A quantity per patch that a tower layer can give. Attention is float32, and 0 for patches that are padding."""

    CLS_ATTENTION = "attention that CLS pays to the patch, mean over heads"
    RECEIVED_ATTENTION = "attention that the patch receives, mean over heads and over all tokens, CLS included"
    KEYS = "key of the patch, mean over heads"
    WIDE_CLS_ATTENTION = "attention that CLS pays to the patch if all heads are taken as one wide head"
    WIDE_KEYS = "key of the patch, all heads side by side"
    PADDING = "share of the patch that is padding of the square picture, float32 in 0..1; of the picture, not a layer"
    CLIP_RELEVANCE = "relevance of the patch to the question in CLIP's joint space; no tower knows it, callers give it"

    def check_known(self) -> None:
        """Raise an :class:`UnsupportedError` for what no tower can say."""
        if self is TowerValue.CLIP_RELEVANCE:
            raise UnsupportedError(
                "relevance=clip needs CLIP's text encoder and projections, which this model does not have: use "
                "relevance=text, or give facts={'relevance': ...} with set_visual on a bare decoder"
            )

    @property
    def is_attention(self) -> bool:
        return self in (TowerValue.CLS_ATTENTION, TowerValue.RECEIVED_ATTENTION, TowerValue.WIDE_CLS_ATTENTION)

    @property
    def of_all_rows(self) -> bool:
        """Whether it takes the attention of every token, not that of CLS alone."""
        return self is TowerValue.RECEIVED_ATTENTION


@dataclass(frozen=True)
class ReliableAttention:
    """Attention that the patch receives of reliable tokens alone, mean over heads and over these, float32: those that
    themselves receive more than ``threshold`` times the mean. Where no token does, all are reliable.
    """

    threshold: float
    is_attention: ClassVar[bool] = True
    of_all_rows: ClassVar[bool] = True

    def check_known(self) -> None:
        """Every tower can say it."""


@dataclass(frozen=True)
class VisionFact:
    """A declared need: a value of one layer.

    Attributes:
        value: what.
        layer: 0-based index of the tower's layer, negative from the end; None: the layer whose output is used.
    """

    value: TowerValue | ReliableAttention
    layer: int | None = None


CLS_ATTENTION = "cls_attention"
"""Name of the one fact that has an argument of its own in ``set_visual``."""


@dataclass(frozen=True)
class VisionView:
    """A stack of crops in front of the projector (on a bare decoder: among the input embeddings).

    Attributes:
        tokens_NPC: patch features; projected ones, if the method ``reduces_projected``.
        facts: what the method declared, by its names, ``[N, P, ...]``.
        target: tokens that each crop may keep, below P.
        patches_NP: index of each patch in the raster of its crop; patches that the prompt leaves out are missing.
        grid: (width, height) of the crop in patches; (number of tokens, 1) where they do not form a square.
        cls_NC: the tower's CLS token; None where there is none (bare decoder, or CLS is among the tokens).
        project: the projector, for methods that look behind it; None where the tokens are projected already.
        prompts: number of the prompt that each crop belongs to.
        texts: by that number the embeddings ``[T, D]`` of the text behind the prompt's last image (of all its text, if
            it ends in an image); None unless the method ``reads_text``.
        padding_NP: patches that lie outside of the picture; None: nobody knows of any.
    """

    tokens_NPC: Tensor
    facts: Mapping[str, Tensor]
    target: int
    patches_NP: Tensor
    grid: tuple[int, int]
    cls_NC: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    prompts: tuple[int, ...] = ()
    texts: Sequence[Tensor] | None = None
    padding_NP: Tensor | None = None

    def is_raster(self, method: str, otherwise: str) -> bool:
        """Whether it is known where the patches stand; if not, it is said what the method does ``otherwise``."""
        if self.grid[1] > 1 or self.grid[0] == 1:
            return True
        say(method, f"nobody says here where the tokens of a picture stand, so {otherwise}")
        return False

    @cached_property
    def projected_NPD(self) -> Tensor:
        """The features as the decoder would get them."""
        return self.tokens_NPC if self.project is None else self.project(self.tokens_NPC)

    @cached_property
    def text_NTD(self) -> Tensor:
        """Text of each crop's prompt, ``[N, T, D]``, zeros behind :attr:`text_lengths`.

        Raises:
            UnsupportedError: images were encoded without a prompt.
        """
        if self.texts is None:
            raise UnsupportedError("this method looks at the text of the prompt, and images were encoded without one")
        texts = [self.texts[prompt].to(self.tokens_NPC.device) for prompt in self.prompts]
        return nn.utils.rnn.pad_sequence(texts, batch_first=True)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Text tokens of each crop's prompt."""
        return tuple(len((self.texts or ())[prompt]) for prompt in self.prompts)


@dataclass(frozen=True)
class Reduction:
    """What leaves a stack of crops.

    Attributes:
        tokens_NKC: features; a kept patch may be changed.
        origin_NK: index into the view's P tokens, or -1 for a token that is none of them (merged, CLS).
        source_NK: index of the token whose place it takes: its rotary position in position mode ``original``.
        in_place: merged tokens stand at their place too; otherwise behind all patches of the image, in this order.
        weights: gives float ``[N, K, P]``, how much of each patch is in each token, rows that add up to 1. Asked only
            where more than features travels with the tokens (deepstack features); None: all of the source.
    """

    tokens_NKC: Tensor
    origin_NK: Tensor
    source_NK: Tensor
    in_place: bool = False
    weights: Callable[[], Tensor] | None = None

    @classmethod
    def keep(cls, tokens_NPC: Tensor, index_NK: Tensor) -> Reduction:
        """Nothing but a choice of patches."""
        return cls(take(tokens_NPC, index_NK), index_NK, index_NK)


@dataclass(frozen=True)
class TowerView:
    """Tokens inside a tower layer, between attention and MLP.

    Attributes:
        layer: index of the layer; ``layers`` is how many run.
        query_NHTD: what the layer has attended with, as are keys and values. Token 0 is CLS if ``has_cls``.
        scaling: factor on the products of queries and keys.
        entering_NTC: states that entered the layer.
        hidden_NTC: what leaves attention, the states that entered the layer added.
        sizes_NT: patches that each token stands for; 0 for those that are hidden.
        target: patches (CLS not counted) that shall be left behind the last layer.
        memory: new for every pass of the tower: whatever the method has to remember from one layer to the next.
    """

    layer: int
    layers: int
    query_NHTD: Tensor
    key_NHTD: Tensor
    value_NHTD: Tensor
    scaling: float
    entering_NTC: Tensor
    hidden_NTC: Tensor
    sizes_NT: Tensor
    target: int
    memory: SimpleNamespace
    has_cls: bool = True

    @cached_property
    def keys_NTC(self) -> Tensor:
        """Mean of the keys over heads, float32."""
        return self.key_NHTD.float().mean(1)


@dataclass(frozen=True)
class TowerKeep:
    """Tokens that go on, in this order; the others are dropped.

    Attributes:
        keep_NK: indices of tokens, CLS among them.
        hidden_NKC: their new states; None: they stay what they are.
    """

    keep_NK: Tensor
    hidden_NKC: Tensor | None = None


@dataclass(frozen=True)
class TowerHide:
    """Tokens that no other attends to from now on, bool ``[N, T]``. They go on: crops may hide different numbers."""

    hide_NT: Tensor


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


def unit_rows(index_NK: Tensor, patches: int) -> Tensor:
    """Weights ``[N, K, P]`` of tokens that are one patch each."""
    return torch.nn.functional.one_hot(index_NK, patches).float()


def merge_tokens(tokens_NTC: Tensor, sizes_NT: Tensor, merge: TowerMerge) -> tuple[Tensor, Tensor]:
    """Means of the tokens of each new place, weighted by size, ``[N, K, C]``, and the new sizes, ``[N, K]``."""
    slot_NT, leader_NK = merge.slot_NT, merge.leader_NK
    crops, new, device = *leader_NK.shape, tokens_NTC.device
    if device.type == "cpu":  # one after another: what joins a leader is added to it, and nothing else is computed
        joining = rest_of(slot_NT.shape[1], leader_NK)
        place, own, added = slot_NT.gather(1, joining), sizes_NT.gather(1, leader_NK), sizes_NT.gather(1, joining)
        sizes = own.scatter_add(1, place, added)
        sums = take(tokens_NTC, leader_NK).float().mul_(own[:, :, None]).flatten(0, 1)
        rows = (place + torch.arange(crops)[:, None] * new).flatten()
        sums.index_add_(0, rows, (take(tokens_NTC, joining) * added[:, :, None]).flatten(0, 1))
        return sums.view(crops, new, -1).div_(sizes[:, :, None]).to(tokens_NTC.dtype), sizes
    # One product instead of a scattered sum: the order of summation is fixed on every device.
    weights = (slot_NT[:, None, :] == torch.arange(new, device=device)[:, None]) * sizes_NT[:, None, :].float()
    sizes = weights.sum(2)
    return ((weights @ tokens_NTC.float()) / sizes[:, :, None]).to(tokens_NTC.dtype), sizes


def rest_of(count: int, index_NK: Tensor) -> Tensor:
    """The indices of ``count`` tokens that are not in ``index_NK``, ascending: ``[N, count - K]``."""
    chosen = torch.zeros(len(index_NK), count, dtype=torch.uint8, device=index_NK.device).scatter_(1, index_NK, 1)
    return chosen.argsort(dim=1, stable=True)[:, : count - index_NK.shape[1]]
