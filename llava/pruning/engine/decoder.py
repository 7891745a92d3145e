"""The one owned decoder forward: prefill layer by layer with selections between, decode on caches of unequal length.

transformers keeps its layers, attention kernels, caches and masks; only the loop over the layers is ours, because the
stock loop sizes one mask and one set of rotary tables by layer 0 and uses them for all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llava import compat
from llava.pruning.engine.attention import RowScores, VisualAttention, next_layer_attention, projected_keys
from llava.pruning.engine.cache import CacheRecord
from llava.pruning.engine.layer_facts import BlockWatch
from llava.pruning.engine.layer_inputs import LayerInputsOf
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.patch_ids import PatchIds
from llava.pruning.engine.prompt import Prompt
from llava.pruning.engine.protocol import Method
from llava.pruning.engine.recorder import Recorder
from llava.pruning.engine.sequence import Sequences
from llava.pruning.engine.token_cap import cap_by_cls
from llava.pruning.engine.trace import Trace
from llava.pruning.engine.view import LayerView
from llava.pruning.pospad import marks, with_markers
from llava.pruning.types import BEFORE_DECODER, LayerFact, Rows, Selection
from llava.pruning.views import JOINT, ViewBudget


@dataclass(frozen=True)
class Prefill:
    """Result of a pruned prefill: final hidden states, one trace per row, optionally the states between layers and
    which tokens are left; and which options changed something, by method (see engine/notices.py).
    """

    hidden_BNC: Tensor
    traces: list[Trace]
    hidden_states: tuple[Tensor, ...] | None
    index_BN: Tensor | None = None
    effects: frozenset[tuple[str, str]] = frozenset()


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
    work = Prefilling(decoder, method, prompt, cache, keep_states, timer)
    work.before_decoder()
    with work.scoring():
        work.through(range(len(decoder.layers)))
    return work.outcome().delivered(prompt, method, cache)


class Prefilling:
    """A prefill on its way through the layers: run one, let the method decide how much stays, drop the rest."""

    def __init__(
        self,
        decoder: compat.Decoder,
        method: Method,
        prompt: Prompt,
        cache: Any,
        keep_states: bool = False,
        timer: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.decoder, self.method, self.prompt, self.cache, self.timer = decoder, method, prompt, cache, timer
        self.sequences = Sequences.start(
            prompt.hidden_BNC,
            prompt.layout,
            prompt.lengths,
            prompt.positions_BN,
            method.positions == "compact",
            None if prompt.reduced is None else [row.origins for row in prompt.reduced],
            prompt.members,
        )
        self.sequences.added_BNF, self.sequences.index_BN = prompt.added_BNF, prompt.index_BN
        self.recorder = Recorder(decoder, self.sequences, prompt)
        depth = len(decoder.layers)
        self.parts = [_Part(part, part.stages(depth), part.layer_facts(depth)) for part in method.parts]
        if method.parts[0].pospad and marks(prompt.reduced or ()):
            self.parts[0].memory.effects.add("pospad")
        # Which tokens are asked for attention rows.
        self.query_rows = _text_rows(self.sequences, prompt.layout)
        self.rows_of = {Rows.TEXT: self.query_rows, Rows.LAST: (1,) * len(self.query_rows)}
        self.frames = LayerInputsOf(decoder)
        self.states: list[Tensor] | None = [] if keep_states else None
        self._scores: RowScores | None = None
        self._blocks: BlockWatch | None = None
        # The method that selects behind the layer that ran last (there is one at most), and what it looks at.
        self._pending: tuple[_Part, LayerView] | None = None

    def _show(
        self,
        part: _Part | None,
        layer: int,
        rows: tuple[int, ...] | None = None,
        attention: Callable[[], VisualAttention] | None = None,
        said: Mapping[LayerFact, Any] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> LayerView:
        prompt, sequences = self.prompt, self.sequences
        depth, had = len(self.decoder.layers), tuple(self.recorder.visual_tokens)
        return LayerView(
            layer, depth, sequences.counts, had, rows or self.query_rows, prompt.samples, sequences, prompt.facts,
            self.cache, self.decoder.norm, attention, said or {}, rotary, tuple(self.recorder.counts_in),
            prompt.layout if prompt.reduced is None else None, JOINT if part is None else part.budget,
        )  # fmt: skip

    def before_decoder(self) -> None:
        """In front of layer 0: the cap per image, then methods that select among the embeddings."""
        with self.timer():
            cap = None if self.prompt.reduced is not None else self.method.visual_token_num
            if cap is not None and max(self.sequences.counts) > cap:
                self._drop(cap_by_cls(self._show(None, BEFORE_DECODER), cap))
            for part in self.parts:
                if BEFORE_DECODER in part.stages and max(self.sequences.counts) > 0:
                    selection = part.select(self._show(part, BEFORE_DECODER))
                    if selection is not None and part.method.pospad:
                        self.sequences, selection = with_markers(self.sequences, selection, part.memory.effects)
                    self._drop(selection)

    def scoring(self) -> ExitStack:
        """What the calls of :meth:`layer` have to lie in: layers say there what methods ask of them."""
        asked = {layer: rows for part in self.parts for layer, rows in part.stages.items()}
        told = {layer: facts for part in self.parts for layer, facts in part.facts.items()}
        layers = list(enumerate(self.decoder.layers))
        scored = [layer for index, layer in layers if asked.get(index) in self.rows_of or told.get(index)]
        watched = [layer for index, layer in layers if LayerFact.BLOCKS in told.get(index, ())]
        self._scores, self._blocks = RowScores(scored, self.frames, self.timer), BlockWatch(watched)
        both = ExitStack()
        both.enter_context(self._scores)
        both.enter_context(self._blocks)
        return both

    def through(self, layers: Iterable[int]) -> None:
        """Run layers one after another, with the decision and the selection behind each."""
        for index in layers:
            self.layer(index)
            self.decide()
            self.select()

    def layer(self, index: int) -> None:
        """Run a layer, attention rows inside, and let the method that selects behind it observe what they say."""
        scores, blocks, layer = self._scores, self._blocks, self.decoder.layers[index]
        assert scores is not None and blocks is not None
        frame = self.frames.of(self.sequences)
        self.recorder.entering(self.sequences)
        if self.states is not None:
            self.states.append(self.sequences.hidden_BNC)
        part = next((part for part in self.parts if index in part.stages and max(self.sequences.counts) > 0), None)
        if part is not None and part.method.passes(index, self.sequences.counts, part.memory):
            part = None
        rows = Rows.NONE if part is None else part.stages[index]
        wanted = self.rows_of.get(rows)
        facts: Collection[LayerFact] = () if part is None else part.facts.get(index, ())
        scores.of_next(self.sequences, wanted, facts)
        known, self.sequences.keys_BNF = self.sequences.keys_BNF, None
        self.recorder.reused_keys(self.sequences, known)
        with projected_keys(layer, known):
            hidden = layer(
                self.sequences.hidden_BNC,
                attention_mask=frame.mask,
                position_embeddings=frame.rotary,
                # With gaps in them, position ids would make flash attention see several packed sequences.
                position_ids=None,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.sequences = self.sequences.advance(hidden).with_addition()
        said: dict[LayerFact, Any] = {LayerFact.BLOCKS: blocks.take()} if LayerFact.BLOCKS in facts else {}
        if part is None:
            return
        with self.timer():
            found = scores.take()
            said |= scores.take_facts()
            attention: Callable[[], VisualAttention] | None = None
            if rows in (Rows.NEXT_LAST, Rows.NEXT_TEXT):
                wanted = self.rows_of[Rows.LAST if rows is Rows.NEXT_LAST else Rows.TEXT]
                following = self.decoder.layers[index + 1]
                attention = _NextAttention(following, self.sequences, self.frames, wanted, self.recorder)
            elif found is not None and wanted is not None:
                self.recorder.scored(wanted, self.sequences)
                attention = partial(_same, found)
            view = self._show(part, index, wanted, attention, said, frame.rotary)
            part.observe(view)
        self._pending = part, view

    def decide(self) -> Hashable:
        """Let that method read from the device what it needs; its answer stands for all counts that follow."""
        if self._pending is None:
            return None
        part, view = self._pending
        with self.timer():
            return part.decide(view)

    def select(self) -> None:
        """Drop what that method does not keep."""
        if self._pending is not None:
            part, view = self._pending
            self._pending = None
            with self.timer():
                self._drop(part.select(view))
        self.recorder.leaving(self.sequences)

    def _drop(self, selection: Selection | None) -> None:
        """Go on with what a selection leaves; what the methods carry along follows it."""
        if selection is not None:
            for part in self.parts:
                part.follow(selection)
            self.sequences = self.sequences.apply(selection)

    def report(self) -> dict[str, list[Any]]:
        """What the methods have to say about each sample."""
        return _joined([part.memory.report for part in self.parts])

    def outcome(self) -> Outcome:
        """What is left behind the last layer."""
        hidden, states = self.decoder.norm(self.sequences.hidden_BNC), self.states
        return Outcome(
            hidden, None if states is None else (*states, hidden), self.recorder, self.report(),
            self.sequences.index_BN, frozenset((p.method.name, o) for p in self.parts for o in p.memory.effects),
        )  # fmt: skip

    def forked(self, cache: Any) -> Prefilling:
        """The same state, to go on from more than once: on the same tensors, with a cache that holds what this has."""
        later = copy.copy(self)
        later.cache, later.frames = cache, self.frames.forked()
        # What is computed when it is first asked for belongs to the one that asked.
        later.sequences = self.sequences.advance(self.sequences.hidden_BNC)
        origins = dict[int, PatchIds]()
        own = self.sequences.origins
        later.sequences.origins = own.rebuilt(own.selections(), origins)
        later.recorder = self.recorder.forked(origins)
        later.parts = [replace(part, memory=_forked(part.memory)) for part in self.parts]
        if self._pending is not None:
            part, view = self._pending
            later._pending = later.parts[self.parts.index(part)], replace(view, sequences=later.sequences)
        later.states = None if self.states is None else list(self.states)
        return later


@dataclass(frozen=True)
class Outcome:
    """What the layers leave behind, before it becomes a :class:`Prefill`."""

    hidden_BNC: Tensor
    hidden_states: tuple[Tensor, ...] | None
    recorder: Recorder
    report: dict[str, list[Any]]
    index_BN: Tensor | None
    effects: frozenset[tuple[str, str]] = frozenset()

    def delivered(self, prompt: Prompt, method: Method, cache: Any) -> Prefill:
        """What decoding must remember travels with the cache; what happened becomes one trace per row."""
        record = self.recorder.cache_record(method.positions == "compact", prompt)
        record.attach_to(cache, prompt.width or prompt.hidden_BNC.shape[1])
        traces = self.recorder.traces(self.report, method)
        return Prefill(self.hidden_BNC, traces, self.hidden_states, self.index_BN, self.effects)


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
    memory: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(report={}, carried={}, effects=set()))

    @property
    def budget(self) -> ViewBudget:
        """How its selections are shared out among the images."""
        given = self.method.view_budget
        return given if isinstance(given, str) else tuple(given)

    def observe(self, view: LayerView) -> None:
        self.method.observe(view, self.memory)

    def decide(self, view: LayerView) -> Hashable:
        return self.method.decide(view, self.memory)

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
    # A column of zeros stands for the padding that a selection points to. Values go where their tokens are.
    padded = torch.nn.functional.pad(values_BV.to(selection.keep_BK.device), (0, 1))
    kept = padded.gather(1, selection.keep_BK.clamp_max(values_BV.shape[1]))
    return torch.nn.functional.pad(kept, (0, width - kept.shape[1]))


@dataclass(frozen=True)
class _NextAttention:
    """The rows that the next layer would attend with, computed (and counted) when a method looks at them."""

    layer: Any
    sequences: Sequences
    frames: LayerInputsOf
    rows: tuple[int, ...]
    recorder: Recorder

    def __call__(self) -> VisualAttention:
        self.recorder.scored(self.rows, self.sequences)
        self.recorder.projected_keys(self.sequences)
        return next_layer_attention(self.layer, self.sequences, self.frames, self.rows)


def _same(attention: VisualAttention) -> VisualAttention:
    return attention


def _forked(value: Any) -> Any:
    """A copy of what a method remembers: containers anew, what is in them the same."""
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: _forked(inner) for name, inner in vars(value).items()})
    if isinstance(value, dict):
        return {key: _forked(inner) for key, inner in value.items()}
    return [_forked(inner) for inner in value] if isinstance(value, list) else value


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
