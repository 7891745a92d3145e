"""What a method is shown of a layer.

Shapes: B batch rows, V visual tokens (padded at the end), H heads, T query rows, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava import compat
from llava.pruning.engine.sequence import Sequences
from llava.pruning.selection import on_device, top_k
from llava.pruning.types import BEFORE_DECODER, LayerFact, OptionError, Selection, UnsupportedError
from llava.pruning.views import EQUAL, JOINT, ViewBudget, Views
from llava.pruning.vision import CLS_ATTENTION

if TYPE_CHECKING:
    from llava.pruning.engine.attention import VisualAttention
    from llava.pruning.engine.layout import VisualLayout


@dataclass(frozen=True)
class SampleIds:
    """Running number of each row's sample, and whether that number depends on which of several threads came first."""

    ids: tuple[int, ...]
    by_chance: bool = False


@dataclass
class LayerView:
    """What a method sees after a layer (or, at ``BEFORE_DECODER``, of the input embeddings).

    Tensors that only some methods want are computed when first asked for. Visual tokens come in sequence order, padded
    at the end to the longest row; merged tokens are ordinary ones.

    Attributes:
        layer: index of the layer just run, or ``BEFORE_DECODER``.
        num_layers: layers of the decoder.
        counts: visual tokens per row, before this selection.
        prompt_counts: visual tokens per row that the prompt had before anything was dropped.
        query_rows: attention rows per batch row (at least 1).
        samples: running number of each sample; methods use :attr:`sample_ids`.
        sequences: the engine's state; methods use the properties below instead.
        initial_facts: what the vision tower said, by name and original visual index, ``[B, N, ...]``.
        cache: keys and values of the layers that have run; methods use :attr:`keys_BGND`.
        norm: the norm behind the decoder's last layer; methods use :meth:`normed`.
        attention: gives the declared attention rows; None if no rows were declared.
        layer_facts: what was declared of the layer; methods use :meth:`layer_fact`.
        rotary: cosines and sines of the layer's tokens, ``[B or 1, N, D]``; None in front of the decoder.
        entered: visual tokens per row that entered each layer so far, this one included.
        layout: where the visual tokens were in the prompt; methods use :attr:`images`. None behind a reduction.
        view_budget: how the method's selections are shared out among the images, see :mod:`llava.pruning.views`.
    """

    layer: int
    num_layers: int
    counts: tuple[int, ...]
    prompt_counts: tuple[int, ...]
    query_rows: tuple[int, ...]
    samples: SampleIds
    sequences: Sequences
    initial_facts: Mapping[str, Tensor]
    cache: Any = None
    norm: Callable[[Tensor], Tensor] | None = None
    attention: Callable[[], VisualAttention] | None = None
    layer_facts: Mapping[LayerFact, Any] = field(default_factory=dict)
    rotary: tuple[Tensor, Tensor] | None = None
    entered: Sequence[tuple[int, ...]] = ()
    layout: VisualLayout | None = None
    view_budget: ViewBudget = JOINT

    def best(self, scores_BV: Tensor, keep: tuple[int, ...]) -> Selection:
        """Keep the ``keep[i]`` visual tokens with the highest scores, of each image its share if it has one."""
        return Selection(top_k(self.shared_out(scores_BV, keep), self.counts, keep), keep)

    def shared_out(self, scores_BV: Tensor, keep: tuple[int, ...]) -> Tensor:
        """Scores whose ``keep[i]`` highest are those that :meth:`best` keeps."""
        return scores_BV if self.views is None else self.views.ranked(scores_BV, self.counts, keep)

    @cached_property
    def views(self) -> Views | None:
        """Which image each visual token is part of, and the images' shares; None where all compete with all.

        Raises:
            UnsupportedError: there are shares, and nobody can say any more what belongs to which image.
        """
        if self.view_budget == JOINT:
            return None
        if self.layout is None:
            raise UnsupportedError(
                "view_budget cannot be kept behind a method that reduces the images in front of the decoder"
            )
        sizes = [tuple(map(len, images)) for images in self.images]
        # A share per image says how many there have to be, even where there is one.
        alone = self.view_budget == EQUAL and max(map(len, sizes)) <= 1
        return None if alone else Views.of(self.view_budget, sizes, self.origins_BV)

    @cached_property
    def _attention(self) -> VisualAttention | None:
        return None if self.attention is None else self.attention()

    # Tensor | None: a method knows what it declared.
    @property
    def attention_BHTV(self) -> Any:
        """Float32 probabilities of the declared rows over the visual tokens, not renormalized, zero in the padding;
        None if no rows were declared.
        """
        return None if self._attention is None else self._attention.rows_BHTV

    @property
    def relevance_BV(self) -> Any:
        """Attention that each visual token receives: mean over heads, then over the declared rows. float32; None if
        no rows were declared.
        """
        return None if self._attention is None else self._attention.received_BV

    def layer_fact(self, fact: LayerFact) -> Any:
        """What the layer said; its shape stands at each member of :class:`~llava.pruning.types.LayerFact`."""
        return self.layer_facts[fact]

    @property
    def images(self) -> list[tuple[tuple[int, ...], ...]]:
        """Per row and image the crop (0 = the whole image) of each visual token that the decoder was given; all of one
        crop where nobody said so.
        """
        if self.layout is None:
            return [((0,) * count,) for count in self.counts]
        return [self.layout.image_crops(row) for row in range(len(self.counts))]

    @property
    def origins_BV(self) -> Tensor:
        """Number of each visual token in the prompt before anything was dropped, ``[B, V]``; -1 for merged tokens."""
        return self.sequences.visual_origins()

    @cached_property
    def rotary_of_text(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines that the layer rotated the text rows with, ``[B, T, D]``; see :attr:`text_BTC`."""
        cos, sin = (table[:, -max(self.query_rows) :] for table in self._rotary)
        return cos, sin

    @cached_property
    def rotary_of_visual(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines that the layer rotated the visual tokens with, ``[B, V, D]``."""
        cos, sin = (self.of_visual(table.transpose(1, 2)).transpose(1, 2) for table in self._rotary)
        return cos, sin

    @property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        if self.rotary is None:
            raise OptionError("this method looks at rotary tables, and there are none in front of layer 0")
        # Made where the layer's input was; the layer may live elsewhere.
        cos, sin = (table.to(self.device).expand(len(self.counts), -1, -1) for table in self.rotary)
        return cos, sin

    @property
    def real_BN(self) -> Tensor | None:
        """Bool ``[B, N]``, False for the padding in front of each row; None if there is none."""
        return self.sequences.padding_mask()

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """Running number of each sample within the run, the same whatever the batch size.

        Raises:
            UnsupportedError: several threads share the run, so that the numbers would depend on who came first.
        """
        if self.samples.by_chance:
            raise UnsupportedError(
                "several threads share one pruning run, and this method draws by the running number of the sample: "
                "give set_visual(sample_ids=...), or attach the run in one thread at a time"
            )
        return self.samples.ids

    @cached_property
    def hidden_BVC(self) -> Tensor:
        """Hidden states of the visual tokens leaving the layer, ``[B, V, C]``; gathered when first asked for."""
        return self.sequences.visual_hidden()

    def hidden_of(self, index_BK: Tensor) -> Tensor:
        """Hidden states of some visual tokens only, ``[B, K, C]``; indices ``[B, K]`` below V."""
        return self.sequences.hidden_of(index_BK)

    def hidden_at(self, slots_BK: Tensor) -> Tensor:
        """Hidden states of any tokens, ``[B, K, C]``, by their places in the left-padded sequence ``[B, K]``."""
        return self.sequences.hidden_BNC.gather(
            1, slots_BK[:, :, None].expand(-1, -1, self.sequences.hidden_BNC.shape[2])
        )

    def mean_between(self, begin_BS: Tensor, end_BS: Tensor | None) -> Tensor:
        """Mean hidden state of all tokens, text too, that stand in the places ``begin .. end - 1`` of the left-padded
        sequence (None: to the end), float32 ``[B, S, C]``; 0 where there are none.
        """
        hidden_BNC = self.sequences.hidden_BNC
        slots = torch.arange(hidden_BNC.shape[1], device=self.device)
        inside = slots >= begin_BS[..., None]
        if end_BS is not None:
            inside = inside & (slots < end_BS[..., None])
        weights = inside.float()
        return weights @ hidden_BNC.float() / weights.sum(2, keepdim=True).clamp_min(1)

    def normed(self, hidden_BKC: Tensor) -> Tensor:
        """Hidden states behind the norm that follows the decoder's last layer."""
        assert self.norm is not None  # of a prefill
        return self.norm(hidden_BKC).to(self.device)

    @property
    def keys_BGND(self) -> Tensor:
        """Keys of all tokens of the layer just run, after rotary embedding, ``[B, key heads, N, D]``, padded in front.

        Raises:
            OptionError: no layer has been run.
        """
        if self.layer == BEFORE_DECODER:
            raise OptionError("this method looks at keys, and there are none in front of layer 0")
        return compat.cached_keys(self.cache, self.layer).to(self.device)

    @property
    def slots_BV(self) -> Tensor:
        """Places of the visual tokens in the left-padded sequence, ``[B, V]``; of no meaning behind ``counts[i]``."""
        return self.sequences.slots_BV

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per row, text included, padding not."""
        return self.sequences.lengths

    def of_visual(self, values_BN: Tensor) -> Tensor:
        """Columns of the visual tokens, ``[B, ..., V]`` of ``[B, ..., N]``; of no meaning behind ``counts[i]``."""
        return self.sequences.gather_visual(values_BN)

    @cached_property
    def query_rows_B(self) -> Tensor | int:
        """``query_rows`` for arithmetic with tensors ``[B]``: one number if all are equal."""
        if min(self.query_rows) == max(self.query_rows):
            return self.query_rows[0]
        return on_device(self.query_rows, self.device)

    @cached_property
    def text_BTC(self) -> Tensor:
        """Hidden states of the text rows, ``[B, T, C]``, where row i is valid in its *last* ``query_rows[i]`` places.

        Only in a stage with ``Rows.TEXT`` or ``Rows.NONE``: with ``Rows.LAST`` it is the last token alone.
        """
        return self.sequences.hidden_BNC[:, -max(self.query_rows) :]

    @cached_property
    def cls_attention_BV(self) -> Tensor:
        """CLS attention of the current visual tokens, float32 ``[B, V]``; 0 for merged tokens."""
        return self.vision_fact(CLS_ATTENTION)

    def vision_fact(self, name: str) -> Tensor:
        """A declared fact of the vision tower for the current visual tokens, ``[B, V, ...]``; 0 for merged tokens."""
        origins = self.sequences.visual_origins()
        values = self.initial_facts[name].to(origins.device)  # given where the embeddings are
        shape = (*origins.shape, *[1] * (values.ndim - 2))
        index = origins.clamp_min(0).view(shape).expand(*origins.shape, *values.shape[2:])
        return values.gather(1, index).masked_fill((origins < 0).view(shape), 0)

    @property
    def device(self) -> torch.device:
        return self.sequences.hidden_BNC.device
