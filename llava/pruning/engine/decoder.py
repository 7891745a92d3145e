"""The one owned decoder forward: prefill layer by layer with selections between, decode on caches of unequal length.

transformers keeps its layers, attention kernels, caches and masks; only the loop over the layers is ours, because the
stock loop sizes one mask and one set of rotary tables by layer 0 and uses them for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llava import compat
from llava.pruning.engine.attention import RowScores, VisualAttention, next_layer_attention
from llava.pruning.engine.cache import CacheRecord
from llava.pruning.engine.layer_facts import BlockWatch
from llava.pruning.engine.layer_inputs import LayerInputsOf
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.patch_ids import PatchIds
from llava.pruning.engine.protocol import Method
from llava.pruning.engine.sequence import Numbering, Sequences
from llava.pruning.engine.token_cap import cap_by_cls
from llava.pruning.engine.trace import DecoderShape, Trace
from llava.pruning.engine.view import LayerView, SampleIds
from llava.pruning.selection import on_device
from llava.pruning.types import BEFORE_DECODER, LayerFact, Rows, Selection
from llava.pruning.vision import ReducedRow


@dataclass(frozen=True)
class Prompt:
    """Input of a prefill.

    Attributes:
        hidden_BNC: embeddings, left padded.
        lengths: real tokens per row.
        positions_BN: rotary positions, ``[1 or B, N]`` or ``[B, N, axes]``; None numbers the tokens of each row from 0.
        layout: where the visual tokens are.
        facts: what the vision tower said, by name, per original visual index ``[B, N, ...]``, padded at the end.
        samples: running number of each sample within the run.
        reduced: per row what a reduction in front of the decoder left behind; None if there was none.
        added_BNF: what the first layers add to their outputs, side by side ``[B, N, layers * C]`` (deepstack).
        index_BN: number of each token in the sequence that the decoder was given; to be followed through the layers.
        width: length of that sequence; default: that of ``hidden_BNC``.
    """

    hidden_BNC: Tensor
    lengths: tuple[int, ...]
    positions_BN: Tensor | None
    layout: VisualLayout
    facts: Mapping[str, Tensor]
    samples: SampleIds
    reduced: Sequence[ReducedRow] | None = None
    added_BNF: Tensor | None = None
    index_BN: Tensor | None = None
    width: int | None = None


@dataclass(frozen=True)
class Prefill:
    """Result of a pruned prefill: final hidden states, one trace per row, optionally the states between layers and
    which tokens are left.
    """

    hidden_BNC: Tensor
    traces: list[Trace]
    hidden_states: tuple[Tensor, ...] | None
    index_BN: Tensor | None = None


def prefill(
    decoder: compat.Decoder,
    method: Method,
    prompt: Prompt,
    cache: Any,
    keep_states: bool = False,
    timer: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Prefill:
    """Run the prompt through all layers, letting the method select after the layers it declared.

    Args:
        decoder: Llama-like decoder of transformers.
        method: what prunes.
        prompt: the batch.
        cache: empty cache to fill; it also serves the keys for the scores.
        keep_states: collect the hidden states entering each layer (of unequal length) and the final ones.
        timer: context manager around everything that is selection: attention rows, the method, dropping tokens.
    """
    # The batch before layer 0, the methods at work, and which tokens are asked for attention rows.
    num_layers = len(decoder.layers)
    compact = method.positions == "compact"
    sequences = Sequences.start(
        prompt.hidden_BNC,
        prompt.layout,
        prompt.lengths,
        prompt.positions_BN,
        compact,
        None if prompt.reduced is None else [row.origins for row in prompt.reduced],
    )
    sequences.added_BNF, sequences.index_BN = prompt.added_BNF, prompt.index_BN
    recorder = _Recorder(decoder, sequences, prompt)
    parts = [_Part(part, part.stages(num_layers), part.layer_facts(num_layers)) for part in method.parts]
    query_rows = _text_rows(sequences, prompt.layout)

    def view(
        layer: int,
        rows: tuple[int, ...],
        attention: Callable[[], VisualAttention] | None = None,
        said: Mapping[LayerFact, Any] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> LayerView:
        ids, facts = prompt.samples, prompt.facts
        counts, had = sequences.counts, tuple(recorder.visual_tokens)
        entered = tuple(recorder.counts_in)
        state = (ids, sequences, facts, cache, decoder.norm, attention, said or {}, rotary, entered)
        return LayerView(layer, num_layers, counts, had, rows, *state)

    def selected(selection: Selection | None) -> Sequences:
        """The sequences behind a selection; what the methods carry along follows it."""
        if selection is None:
            return sequences
        for part in parts:
            part.follow(selection)
        return sequences.apply(selection)

    # In front of layer 0: the cap per image, then methods that select among the embeddings.
    with timer():
        cap = None if prompt.reduced is not None else method.visual_token_num
        if cap is not None and max(sequences.counts) > cap:
            capped = cap_by_cls(view(BEFORE_DECODER, query_rows), prompt.layout, cap)
            sequences = sequences if capped is None else sequences.apply(capped)
        for part in parts:
            if BEFORE_DECODER in part.stages and max(sequences.counts) > 0:
                sequences = selected(part.select(view(BEFORE_DECODER, query_rows)))

    frames = LayerInputsOf(decoder)
    # Layer by layer: run it (attention rows are computed inside where asked for), show the method, drop tokens.
    last = (1,) * len(query_rows)
    rows_of = {Rows.TEXT: query_rows, Rows.LAST: last}
    # Of several methods at one place at most the first looks at attention, see Composition.stages.
    asked = {layer: rows for part in reversed(parts) for layer, rows in part.stages.items()}
    told = {layer: facts for part in reversed(parts) for layer, facts in part.facts.items()}
    scored = [layer for index, layer in enumerate(decoder.layers) if asked.get(index) in rows_of or told.get(index)]
    watched = [layer for index, layer in enumerate(decoder.layers) if LayerFact.BLOCKS in told.get(index, ())]
    states = []
    with RowScores(scored, frames, timer) as scores, BlockWatch(watched) as blocks:
        for index, layer in enumerate(decoder.layers):
            frame = frames.of(sequences)
            recorder.entering(sequences)
            if keep_states:
                states.append(sequences.hidden_BNC)
            active = [part for part in parts if index in part.stages and max(sequences.counts) > 0]
            rows = active[0].stages[index] if active else Rows.NONE
            wanted, facts = rows_of.get(rows), told.get(index, ())
            scores.of_next(sequences, wanted, facts if active else ())
            hidden = layer(
                sequences.hidden_BNC,
                attention_mask=frame.mask,
                position_embeddings=frame.rotary,
                # With gaps in them, position ids would make flash attention see several packed sequences.
                position_ids=None,
                past_key_values=cache,
                use_cache=True,
            )
            sequences = sequences.advance(hidden).with_addition()
            said: dict[LayerFact, Any] = {LayerFact.BLOCKS: blocks.take()} if LayerFact.BLOCKS in facts else {}
            if active:
                with timer():
                    found = scores.take()
                    said |= scores.take_facts()
                    attention: Callable[[], VisualAttention] | None = None
                    if rows in (Rows.NEXT_LAST, Rows.NEXT_TEXT):
                        wanted = last if rows is Rows.NEXT_LAST else query_rows
                        attention = _NextAttention(decoder.layers[index + 1], sequences, frames, wanted, recorder)
                    elif found is not None and wanted is not None:
                        recorder.scored(wanted, sequences)
                        attention = partial(_same, found)
                    for part in active:
                        sequences = selected(
                            part.select(view(index, wanted or query_rows, attention, said, frame.rotary))
                        )
                        wanted = attention = None
                said.clear()
            recorder.leaving(sequences)

    # What decoding must remember travels with the cache; what happened becomes one trace per row.
    hidden = decoder.norm(sequences.hidden_BNC)
    recorder.cache_record(compact, prompt).attach_to(cache, prompt.width or prompt.hidden_BNC.shape[1])
    traces = recorder.traces(_joined([part.memory.report for part in parts]), method)
    return Prefill(hidden, traces, (*states, hidden) if keep_states else None, sequences.index_BN)


def decode(
    decoder: compat.Decoder, hidden_BQC: Tensor, cache: Any, keep_states: bool = False
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Run new tokens on a pruned cache; every layer has its own mask and, in compact mode, its own positions.

    Args:
        hidden_BQC: embeddings of the new tokens, not padded.
        cache: cache filled by :func:`prefill`.

    Returns:
        Final hidden states ``[B, Q, C]`` and the hidden states entering each layer (or None).
    """
    record = CacheRecord.of(cache)
    assert record is not None
    batch, new_tokens = hidden_BQC.shape[:2]
    decoded = compat.cached_length(cache) - record.widths[0]
    positions = record.positions(decoded, new_tokens, batch, hidden_BQC.device)
    tables = compat.rotary_tables(decoder, hidden_BQC, positions.flatten(0, 1))
    cos, sin = (table.reshape(*positions.shape[:2], *table.shape[1:]).unbind() for table in tables)

    mask_of = record.masks(decoder.config, hidden_BQC, cache, decoded)
    states = []
    hidden = hidden_BQC
    for index, layer in enumerate(decoder.layers):
        if keep_states:
            states.append(hidden)
        hidden = layer(
            hidden,
            attention_mask=mask_of(index, hidden),
            position_embeddings=(cos[index], sin[index]),
            position_ids=None,
            past_key_values=cache,
            use_cache=True,
        )
    hidden = decoder.norm(hidden)
    return hidden, (*states, hidden) if keep_states else None


@dataclass
class _Part:
    """A method at work: where it selects, and what it remembers of this prefill."""

    method: Method
    stages: Mapping[int, Rows]
    facts: Mapping[int, Collection[LayerFact]]
    memory: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(report={}, carried={}))

    def select(self, view: LayerView) -> Selection | None:
        return self.method.select(view, self.memory)

    def follow(self, selection: Selection) -> None:
        """What the method carries along, for the tokens that a selection leaves."""
        if self.memory.carried:
            self.memory.carried = {name: carried(values, selection) for name, values in self.memory.carried.items()}


def carried(values_BV: Tensor, selection: Selection) -> Tensor:
    """Values of visual tokens ``[B, V]`` behind a selection: 0 for merged tokens and in the padding."""
    merged = selection.merged or (0,) * len(selection.keep)
    width = max(kept + new for kept, new in zip(selection.keep, merged, strict=True))
    # A column of zeros stands for the padding that a selection points to.
    padded = torch.nn.functional.pad(values_BV, (0, 1))
    kept = padded.gather(1, selection.keep_BK.to(values_BV.device).clamp_max(values_BV.shape[1]))
    return torch.nn.functional.pad(kept, (0, width - kept.shape[1]))


@dataclass(frozen=True)
class _NextAttention:
    """The rows that the next layer would attend with, computed (and counted) when a method looks at them."""

    layer: Any
    sequences: Sequences
    frames: LayerInputsOf
    rows: tuple[int, ...]
    recorder: _Recorder

    def __call__(self) -> VisualAttention:
        self.recorder.scored(self.rows, self.sequences)
        self.recorder.projected_keys(self.sequences)
        return next_layer_attention(self.layer, self.sequences, self.frames, self.rows)


def _same(attention: VisualAttention) -> VisualAttention:
    return attention


def _joined(reports: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """One report of several methods: costs add up; of anything else that two methods say, the later one counts."""
    joined: dict[str, list[Any]] = {}
    for report in reports:
        costs = joined.get("merge_flops")
        joined.update(report)
        if costs is not None and "merge_flops" in report:
            joined["merge_flops"] = [a + b for a, b in zip(costs, report["merge_flops"], strict=True)]
    return joined


def _text_rows(sequences: Sequences, layout: VisualLayout) -> tuple[int, ...]:
    """Tokens behind the last image, per row: the text that sees every visual token. 1 for rows without any."""
    return tuple(
        max(sequences.width - start, 1) if count else 1
        for start, count in zip(layout.text_starts, sequences.counts, strict=True)
    )


class _Recorder:
    """Collects counts and origins layer by layer and turns them into traces and the cache record."""

    def __init__(self, decoder: compat.Decoder, sequences: Sequences, prompt: Prompt) -> None:
        # Not the sequences themselves: they would keep the embeddings alive until the end of the prefill.
        self.start_lengths, self.start_counts = sequences.lengths, sequences.counts
        self.structure_counts = prompt.layout.structure_counts
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
                _origins=partial(_origins_of_row, self.origins, self.counts_out, row),
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
            _origins=partial(_all_origins, count, shape.num_layers),
        )
        for length, count, structure in zip(lengths, layout.counts, layout.structure_counts, strict=True)
    ]
