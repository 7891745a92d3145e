"""The one owned decoder forward: prefill layer by layer with selections between, decode on caches of unequal length.

transformers keeps its layers, attention kernels, caches and masks; only the loop over the layers is ours, because the
stock loop sizes one mask and one set of rotary tables by layer 0 and uses them for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from llava import compat
from llava.pruning.base import BEFORE_DECODER, LayerView, PruningMethod, Rows, Selection
from llava.pruning.cache import CacheRecord
from llava.pruning.cap import capped_by_cls
from llava.pruning.layout import VisualLayout
from llava.pruning.scores import attention_rows, rotate_rows
from llava.pruning.selection import counts_to_mask, on_device
from llava.pruning.sequence import Sequences, padding_mask
from llava.pruning.trace import DecoderShape, Trace
from llava.pruning.vision import ReducedRow


@dataclass(frozen=True)
class Prompt:
    """Input of a prefill.

    Attributes:
        hidden_BNC: embeddings, left padded.
        lengths: real tokens per row.
        positions_BN: rotary positions; None numbers the tokens of each row from 0.
        layout: where the visual tokens are.
        facts: what the vision tower said, by name, per original visual index ``[B, N, ...]``, padded at the end.
        sample_ids: running number of each sample within the run.
        reduced: per row what a reduction in front of the decoder left behind; None if there was none.
    """

    hidden_BNC: Tensor
    lengths: tuple[int, ...]
    positions_BN: Tensor | None
    layout: VisualLayout
    facts: Mapping[str, Tensor]
    sample_ids: tuple[int, ...]
    reduced: Sequence[ReducedRow] | None = None


@dataclass(frozen=True)
class Prefill:
    """Result of a pruned prefill: final hidden states, one trace per row, and optionally the states between layers."""

    hidden_BNC: Tensor
    traces: list[Trace]
    hidden_states: tuple[Tensor, ...] | None


def prefill(
    decoder: nn.Module,
    method: PruningMethod,
    prompt: Prompt,
    cache,
    keep_states: bool = False,
    timer: Callable[[], AbstractContextManager] = nullcontext,
    **layer_kwargs,
) -> Prefill:
    """Run the prompt through all layers, letting the method select after the layers it declared.

    Args:
        decoder: Llama-like decoder of transformers.
        method: what prunes.
        prompt: the batch.
        cache: empty cache to fill; it also serves the keys for the scores.
        keep_states: collect the hidden states entering each layer (of unequal length) and the final ones.
        timer: context manager around everything that is selection: attention rows, the method, dropping tokens.
        layer_kwargs: passed on to every layer.
    """
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
    recorder = _Recorder(decoder, sequences, prompt)
    parts = [_Part(part, part.stages(num_layers)) for part in method.parts]
    query_rows = _text_rows(sequences, prompt.layout)

    def view(layer: int, rows: tuple[int, ...], attention: Tensor | None) -> LayerView:
        return LayerView(
            layer, num_layers, sequences.counts, rows, attention, prompt.sample_ids, sequences, prompt.facts
        )

    with timer():
        cap = None if prompt.reduced is not None else method.visual_token_num
        if cap is not None and max(sequences.counts) > cap:
            capped = capped_by_cls(view(BEFORE_DECODER, query_rows, None), prompt.layout, cap)
            sequences = sequences if capped is None else sequences.apply(capped)
        for part in parts:
            if BEFORE_DECODER in part.stages and max(sequences.counts) > 0:
                selection = part.select(view(BEFORE_DECODER, query_rows, None))
                sequences = sequences if selection is None else sequences.apply(selection)

    mask = rotary = None
    entered = None
    states = []
    for index, layer in enumerate(decoder.layers):
        if entered is not sequences.origin_BN:  # the tokens are others than in the layer before
            entered = sequences.origin_BN
            mask = compat.causal_mask(decoder.config, sequences.hidden_BNC, sequences.padding_mask())
            rotary = decoder.rotary_emb(sequences.hidden_BNC, sequences.positions_BN)
        recorder.entering(sequences)
        if keep_states:
            states.append(sequences.hidden_BNC)
        active = [part for part in parts if index in part.stages and max(sequences.counts) > 0]
        # Of several methods at one place at most the first looks at attention, see Composition.stages.
        rows = active[0].stages[index] if active else Rows.NONE
        last = (1,) * len(query_rows)
        wanted = {Rows.TEXT: query_rows, Rows.LAST: last}.get(rows)
        with _QueryTap(layer.self_attn, max(wanted) if wanted else 0) as tap:
            hidden = layer(
                sequences.hidden_BNC,
                attention_mask=mask,
                position_embeddings=rotary,
                # With gaps in them, position ids would make flash attention see several packed sequences.
                position_ids=None,
                past_key_values=cache,
                use_cache=True,
                **layer_kwargs,
            )
        advanced = sequences.advance(hidden)
        if advanced.origin_BN is not sequences.origin_BN:
            entered = None  # the layer lives on another device
        sequences = advanced
        with timer() if active else nullcontext():
            attention = None
            if wanted is not None:
                keys = compat.cached_keys(cache, index)
                attention = _visual_attention(layer.self_attn.scaling, tap.queries, keys, rotary, sequences, wanted)
            elif rows is Rows.NEXT_LAST:
                wanted = last
                attention = _next_layer_attention(decoder.layers[index + 1], rotary, sequences)
                recorder.projected_keys(sequences)
            if attention is not None:
                recorder.scored(wanted, sequences)
            for part in active:
                selection = part.select(view(index, wanted or query_rows, attention))
                sequences = sequences if selection is None else sequences.apply(selection)
                wanted = attention = None
        recorder.leaving(sequences)

    hidden = decoder.norm(sequences.hidden_BNC)
    recorder.cache_record(compact, prompt).attach_to(cache)
    traces = recorder.traces(_joined([part.memory.report for part in parts]), method)
    return Prefill(hidden, traces, (*states, hidden) if keep_states else None)


def decode(decoder: nn.Module, hidden_BQC: Tensor, cache, keep_states: bool = False, **layer_kwargs):
    """Run new tokens on a pruned cache; every layer has its own mask and, in compact mode, its own positions.

    Args:
        hidden_BQC: embeddings of the new tokens, not padded.
        cache: cache filled by :func:`prefill`.

    Returns:
        Final hidden states ``[B, Q, C]`` and the hidden states entering each layer (or None).
    """
    record = CacheRecord.of(cache)
    batch, new_tokens = hidden_BQC.shape[:2]
    decoded = compat.cached_length(cache) - record.widths[0]
    positions = record.positions(decoded, new_tokens, batch, hidden_BQC.device)
    tables = decoder.rotary_emb(hidden_BQC, positions.flatten(0, 1))
    cos, sin = (table.unflatten(0, positions.shape[:2]).unbind() for table in tables)

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
            **layer_kwargs,
        )
    hidden = decoder.norm(hidden)
    return hidden, (*states, hidden) if keep_states else None


class _QueryTap:
    """Catches the queries of the last ``rows`` tokens as a layer computes them, before rotary embedding."""

    def __init__(self, attention: nn.Module, rows: int) -> None:
        self.attention, self.rows = attention, rows
        self.queries: Tensor | None = None

    def __enter__(self) -> _QueryTap:
        if self.rows:
            self.hook = self.attention.q_proj.register_forward_hook(self._catch)
        return self

    def _catch(self, module: nn.Module, args, output: Tensor) -> None:
        # A copy of the few rows, so that the full query tensor is not kept alive.
        queries = output[:, -self.rows :].clone()
        self.queries = queries.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)

    def __exit__(self, *exc) -> None:
        if self.rows:
            self.hook.remove()


@dataclass
class _Part:
    """A method at work: where it selects, and what it remembers of this prefill."""

    method: PruningMethod
    stages: Mapping[int, Rows]
    memory: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(report={}))

    def select(self, view: LayerView) -> Selection | None:
        return self.method.select(view, self.memory)


def _joined(reports: Sequence[dict[str, list]]) -> dict[str, list]:
    """One report of several methods: costs add up; of anything else that two methods say, the later one counts."""
    joined: dict[str, list] = {}
    for report in reports:
        costs = joined.get("merge_flops")
        joined.update(report)
        if costs is not None and "merge_flops" in report:
            joined["merge_flops"] = [a + b for a, b in zip(costs, report["merge_flops"], strict=True)]
    return joined


def _next_layer_attention(layer: nn.Module, rotary, sequences: Sequences) -> Tensor:
    """What the last token will attend to in ``layer``, which has not run yet: ``[B, H, 1, V]``."""
    attention, here = layer.self_attn, sequences.hidden_BNC.device
    there = sequences.advance(sequences.hidden_BNC.to(compat.execution_device(layer.input_layernorm)))
    normed = layer.input_layernorm(there.hidden_BNC)
    heads = (-1, attention.head_dim)
    queries = attention.q_proj(normed[:, -1:]).unflatten(-1, heads).transpose(1, 2)
    keys = attention.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
    keys = rotate_rows(keys, *(table.to(keys.device) for table in rotary))
    return _visual_attention(attention.scaling, queries, keys, rotary, there, (1,) * len(queries)).to(here)


def _visual_attention(
    scaling: float, queries: Tensor, keys: Tensor, rotary, sequences: Sequences, rows: tuple[int, ...]
) -> Tensor:
    """Attention of each row's last ``rows[i]`` tokens to its visual tokens: float32 ``[B, H, T, V]``, padding zero."""
    most, width, device = max(rows), sequences.width, queries.device
    cos, sin = (table[:, -most:].to(device) for table in rotary)
    queries = rotate_rows(queries, cos, sin)
    padding = sequences.padding_mask()
    if padding is None:
        allowed = torch.ones(most, most, dtype=torch.bool, device=device).tril()  # among the rows themselves
    else:
        allowed = torch.ones(most, width, dtype=torch.bool, device=device).tril(width - most)
        allowed = allowed & padding[:, None, None, :]
    attention = sequences.gather_visual(attention_rows(queries, keys, scaling, allowed))
    if min(rows) < most:
        attention = attention * padding_mask(rows, most, device)[:, None, :, None]
    if min(sequences.counts) < max(sequences.counts):
        attention = attention * counts_to_mask(sequences.counts, attention.shape[-1], device)[:, None, None, :]
    return attention


def _text_rows(sequences: Sequences, layout: VisualLayout) -> tuple[int, ...]:
    """Tokens behind the last image, per row: the text that sees every visual token. 1 for rows without any."""
    return tuple(
        max(sequences.width - start, 1) if count else 1
        for start, count in zip(layout.text_starts, sequences.counts, strict=True)
    )


class _Recorder:
    """Collects counts and origins layer by layer and turns them into traces and the cache record."""

    def __init__(self, decoder: nn.Module, sequences: Sequences, prompt: Prompt) -> None:
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
        self.origins: list[Tensor] = []
        self.scoring = [0] * len(sequences.counts)
        self.shape = decoder_shape(decoder, sequences.hidden_BNC.element_size())
        self._seen = None

    def entering(self, sequences: Sequences) -> None:
        self.counts_in.append(sequences.counts)
        self.lengths.append(sequences.lengths)
        self.widths.append(sequences.width)

    def scored(self, rows: tuple[int, ...], sequences: Sequences) -> None:
        for row, (wanted, length) in enumerate(zip(rows, sequences.lengths, strict=True)):
            self.scoring[row] += wanted * length * self.shape.hidden_size

    def projected_keys(self, sequences: Sequences) -> None:
        for row, length in enumerate(sequences.lengths):
            self.scoring[row] += length * self.shape.hidden_size * self.shape.key_value_size

    def leaving(self, sequences: Sequences) -> None:
        self.counts_out.append(sequences.counts)
        if self._seen is not sequences.origin_BN:
            self._seen = sequences.origin_BN
            self._origins = sequences.visual_origins()
        self.origins.append(self._origins)

    def traces(self, report: dict[str, list], method: PruningMethod) -> list[Trace]:
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
                target_tokens=method.aim,
                budget=method.budget_kind,
                _origins=[
                    origins[row, : counts[row]] for origins, counts in zip(self.origins, self.counts_out, strict=True)
                ],
            )
            for row in range(len(self.start_counts))
        ]

    def cache_record(self, compact: bool, prompt: Prompt) -> CacheRecord:
        if not compact and prompt.positions_BN is not None:
            following = (prompt.positions_BN[:, -1] + 1).expand(len(self.lengths), len(prompt.lengths))
        else:
            lengths = self.lengths if compact else [prompt.lengths] * len(self.lengths)
            following = on_device(lengths, prompt.hidden_BNC.device)
        return CacheRecord(tuple(self.widths), tuple(self.lengths), following)


def decoder_shape(decoder: nn.Module, bytes_per_value: int) -> DecoderShape:
    """The sizes of a decoder that costs depend on."""
    config = decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderShape(
        num_layers=len(decoder.layers),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        key_value_size=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim,
        bytes_per_value=bytes_per_value,
    )


def dense_traces(
    decoder: nn.Module, layout: VisualLayout, lengths: tuple[int, ...], bytes_per_value: int
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
            _origins=[torch.arange(count)] * shape.num_layers,
        )
        for length, count, structure in zip(lengths, layout.counts, layout.structure_counts, strict=True)
    ]
