"""What happens to each row of a prefill, layer by layer, and what becomes of it: traces, a record for the cache."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava import compat
from llava.pruning.engine.cache import CacheRecord
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.patch_ids import PatchIds
from llava.pruning.engine.prompt import Prompt
from llava.pruning.engine.protocol import Method
from llava.pruning.engine.sequence import Numbering, Sequences
from llava.pruning.engine.trace import DecoderShape, Trace
from llava.pruning.selection import on_device


class Recorder:
    """Collects counts and origins layer by layer and turns them into traces and the cache record."""

    def __init__(self, decoder: compat.Decoder, sequences: Sequences, prompt: Prompt) -> None:
        # Not the sequences themselves: they would keep the embeddings alive until the end of the prefill.
        self.start_lengths, self.start_counts = sequences.lengths, sequences.counts
        self.structure_counts = prompt.layout.structure_counts
        self._layout = prompt.layout if prompt.reduced is None else None
        self.visual_tokens = list(sequences.counts)
        for row, reduced in enumerate(prompt.reduced or ()):
            # The last patch of a prompt that ends in its image counts as text, see Sequences.start.
            self.visual_tokens[row] += reduced.visual_tokens - prompt.layout.counts[row]
        self.counts_in: list[tuple[int, ...]] = []
        self.counts_out: list[tuple[int, ...]] = []
        self.lengths: list[tuple[int, ...]] = []
        self.widths: list[int] = []
        self.origins: list[PatchIds] = []
        self.scoring = [0] * len(sequences.counts)
        self.shape = decoder_shape(decoder, sequences.hidden_BNC.element_size())

    def forked(self, origins: Mapping[int, PatchIds]) -> Recorder:
        """The same so far, to be continued in two ways; ``origins`` says what becomes of those that it has, by id."""
        later = copy.copy(self)
        later.__dict__.update({k: list(v) for k, v in vars(self).items() if isinstance(v, list)})
        later.origins = [origins[id(one)] for one in self.origins]
        return later

    def selections(self) -> list[Tensor]:
        """What every selection kept, as :meth:`PatchIds.selections` says it."""
        return self.origins[-1].selections()

    def with_selections(self, flat: Tensor | None) -> Recorder:
        """The same, with other indices: those of :meth:`selections`, flattened, one behind the other."""
        sizes = [kept.numel() for kept in self.selections()]
        given = [] if flat is None else list(torch.split(flat, sizes))
        origins = dict[int, PatchIds]()
        self.origins[-1].rebuilt(given, origins)
        return self.forked(origins)

    def entering(self, sequences: Sequences) -> None:
        self.counts_in.append(sequences.counts)
        self.lengths.append(sequences.lengths)
        self.widths.append(sequences.width)

    def scored(self, rows: tuple[int, ...], sequences: Sequences) -> None:
        for row, (wanted, length) in enumerate(zip(rows, sequences.lengths, strict=True)):
            self.scoring[row] += wanted * length * (self.shape.query_size or self.shape.hidden_size)

    def projected_keys(self, sequences: Sequences) -> None:
        for row, length in enumerate(sequences.lengths):
            self.scoring[row] += length * self.shape.hidden_size * self.shape.key_value_size

    def reused_keys(self, sequences: Sequences, known: Tensor | None) -> None:
        """The layer takes keys that were projected for its rows: what was counted for them is its own work."""
        for row, length in enumerate(sequences.lengths if known is not None else ()):
            self.scoring[row] -= length * self.shape.hidden_size * self.shape.key_value_size

    def leaving(self, sequences: Sequences) -> None:
        self.counts_out.append(sequences.counts)
        self.origins.append(sequences.origins)

    def traces(self, report: dict[str, list[Any]], method: Method) -> list[Trace]:
        return [
            Trace(
                shape=self.shape,
                # The last patch of a prompt that ends in its image stays in place as text, see Sequences.start.
                text_tokens=self.start_lengths[row] - self.start_counts[row],
                visual_tokens=self.visual_tokens[row],
                structure_tokens=self.structure_counts[row],
                tokens_in=[counts[row] for counts in self.counts_in],
                tokens_out=[counts[row] for counts in self.counts_out],
                scoring_flops=self.scoring[row],
                # A prompt without image was not pruned, whatever was computed for its row beside others.
                details={
                    name: values[row]
                    for name, values in report.items()
                    if values is not None and self.start_counts[row]
                },
                target_tokens=method.aim_of(self.visual_tokens[row]),
                target_ratio=method.target_ratio,
                budget=method.budget_kind,
                views=() if self._layout is None else _views_of_row(self._layout, row, self.start_counts[row]),
                _origins=partial(_origins_of_row, self.origins, self.counts_out, row),
                _members=partial(_members_of_row, self.origins, self.counts_out, row),
            )
            for row in range(len(self.start_counts))
        ]

    def cache_record(self, compact: bool, prompt: Prompt) -> CacheRecord:
        lengths = self.lengths if compact else [prompt.lengths] * len(self.lengths)
        if prompt.positions_BN is not None:
            following = Numbering(prompt.positions_BN, prompt.lengths).following(lengths)
        else:
            following = on_device(lengths, prompt.hidden_BNC.device)
        return CacheRecord(tuple(self.widths), tuple(self.lengths), following)


def _origins_of_row(origins: Sequence[PatchIds], counts: Sequence[tuple[int, ...]], row: int) -> list[Tensor]:
    return [layer.tensor()[row, : count[row]] for layer, count in zip(origins, counts, strict=True)]


def _views_of_row(layout: VisualLayout, row: int, count: int) -> tuple[int, ...]:
    """Visual tokens of each image; of the last one without a patch that ends the prompt, see Sequences.start."""
    sizes = [len(image) for image in layout.image_crops(row)]
    if sizes:
        sizes[-1] -= sum(sizes) - count
    return tuple(sizes)


def _members_of_row(
    origins: Sequence[PatchIds], counts: Sequence[tuple[int, ...]], row: int
) -> list[list[list[int]]] | None:
    layers = [layer.members(row, count[row]) for layer, count in zip(origins, counts, strict=True)]
    known = [members for members in layers if members is not None]
    return known if len(known) == len(layers) else None


def _all_origins(count: int, layers: int) -> list[Tensor]:
    return [torch.arange(count)] * layers


def decoder_shape(decoder: compat.Decoder, bytes_per_value: int) -> DecoderShape:
    """The sizes of a decoder that costs depend on."""
    config = decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderShape(
        num_layers=len(decoder.layers),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        key_value_size=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim,
        bytes_per_value=bytes_per_value,
        query_size=config.num_attention_heads * head_dim,
    )


def dense_traces(
    decoder: compat.Decoder, layout: VisualLayout, lengths: tuple[int, ...], bytes_per_value: int
) -> list[Trace]:
    """Traces of a prefill that dropped nothing."""
    shape = decoder_shape(decoder, bytes_per_value)
    return [
        Trace(
            shape=shape,
            text_tokens=length - count,
            visual_tokens=count,
            structure_tokens=structure,
            tokens_in=[count] * shape.num_layers,
            tokens_out=[count] * shape.num_layers,
            views=_views_of_row(layout, row, count),
            _origins=partial(_all_origins, count, shape.num_layers),
        )
        for row, (length, count, structure) in enumerate(
            zip(lengths, layout.counts, layout.structure_counts, strict=True)
        )
    ]
