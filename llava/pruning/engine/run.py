"""A pruning run: a method attached to a model, for as long as the context lasts.

The run replaces the forward of the decoder instance, hears from the model where the visual tokens are, and collects the
traces. On exit the decoder has its own forward again.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, NoReturn, SupportsIndex

from torch import Tensor, nn

from llava import compat
from llava.pruning.engine.cache import CacheRecord
from llava.pruning.engine.decoder import decode, prefill
from llava.pruning.engine.guesses import prompt_then_guesses
from llava.pruning.engine.labels import follow_labels
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.notices import Notices, say
from llava.pruning.engine.prompting import deepstack_features, prompt_of
from llava.pruning.engine.prompts import reader_of
from llava.pruning.engine.protocol import Method, Replays
from llava.pruning.engine.recorder import dense_traces
from llava.pruning.engine.rows import check_lengths, repeated, row_lengths
from llava.pruning.engine.stopwatch import Stopwatch
from llava.pruning.engine.support import check_arguments, check_decoder, check_prompt_form, check_step_form
from llava.pruning.engine.told import Told, told_of
from llava.pruning.engine.trace import Trace
from llava.pruning.engine.view import SampleIds
from llava.pruning.types import OptionError, OwnDefault, UnsupportedError
from llava.pruning.vision import CLS_ATTENTION, ReducedRow, TowerValue, VisionFact

_ANY_DEPTH = 24  # names of facts do not depend on the depth of the tower
_RUN_ATTRIBUTE = "pruning_run"


class PruningRun:
    """Context manager that prunes inside ``model``; build it with ``method.attach(model)``.

    Threads may share a run: prefills and steps take turns, what :meth:`set_visual` says holds for the thread that says
    it, and traces come in the order in which prefills end. Only the running numbers of samples have no meaning then: a
    method that draws by them (``random``) is refused unless ``sample_ids`` are given.

    While the run is attached the model can be neither copied nor pickled: the copy would keep pruning forever.

    Attributes:
        method: the attached method, with the position mode that it has in this decoder.
        reader: what finds the visual tokens in the prompts of the model; None if somebody has to say where they are.
        traces: one :class:`Trace` per sample per prefill, in order; may be cleared at any time.
        samples_seen: running number of the next sample; set it to continue an earlier run (seeded methods use it).
        sample_ids: numbers of the samples of the next prefill, one per prompt, where a reader finds the visual tokens;
            None: counted on from ``samples_seen``. One prefill uses it up.
        graphs: :class:`~llava.pruning.engine.graphs.PrefillGraphs` to replay instead of launching kernel by kernel;
            None: no graphs. Not while a ``selection_timer`` or ``notes_members`` is set.
        selection_timer: makes the context manager around each piece of what only pruning needs (in the tower, in front
            of the decoder, between its layers); whoever measures sets it.
        notes_members: let traces say which tokens every merged one is made of; off by default.
    """

    selection_timer: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, method: Method, model: nn.Module, graphs: Replays | None = None) -> None:
        self.graphs = graphs
        model = compat.unwrapped(model)
        self.reader = reader_of(model)
        self.decoder: Any = compat.find_decoder(model)
        self._axes = compat.has_axes(self.decoder)
        if getattr(model, "mixes_patches", False):
            method = method.without_patches()
        self.method = _with_original_positions(method) if self._axes else method
        self.traces: list[Trace] = []
        self._stages = method.stages(len(self.decoder.layers))
        self._told = threading.local()
        self._turn = threading.RLock()
        self._threads: set[threading.Thread] = set()
        self.samples_seen = 0
        self.sample_ids: Sequence[int] | None = None
        self.notes_members = False
        self._notices = Notices()
        self._seconds: list[float] = []
        self._unread: list[Stopwatch] = []
        self._model = model
        self._undo = ExitStack()

    def __enter__(self) -> PruningRun:
        if getattr(self.decoder, _RUN_ATTRIBUTE, None) is not None:
            raise RuntimeError("a pruning run is already attached to this model; leave its context first")
        if self._prunes:
            if self.reader is not None:
                self.reader.check(self)
            check_decoder(self.decoder, set(self._stages.values()))
            config = getattr(self._model, "generation_config", None)
            if getattr(config, "prefill_chunk_size", None):
                raise UnsupportedError("generation_config.prefill_chunk_size is set: chunked prefill cannot be pruned")
        self._dense_forward = self.decoder.forward

        @functools.wraps(self._dense_forward)  # the signature must survive: others look at it
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        with ExitStack() as undo:
            undo.callback(self._notices.report)
            self._replace(undo, self.decoder, _RUN_ATTRIBUTE, self)
            self._replace(undo, self.decoder, "forward", forward)
            for module in {self._model, self.decoder}:
                for name in ("__deepcopy__", "__reduce_ex__"):
                    self._replace(undo, module, name, _refuse_copy)
            if self._prunes and self._model is not self.decoder:
                self._replace(undo, self._model, "forward", self._seeing_labels(self._model.forward))
                if hasattr(self._model, "loss_function"):
                    self._replace(undo, self._model, "_loss_function", self._loss(self._model.loss_function))
            if self.reader is not None:
                self.reader.enter(self, undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    @staticmethod
    def _replace(undo: ExitStack, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the instance until the run ends."""
        before = module.__dict__.get(name)
        setattr(module, name, value)
        undo.callback(delattr, module, name) if before is None else undo.callback(setattr, module, name, before)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        _refuse_copy()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        _refuse_copy()

    def exclusive(self) -> AbstractContextManager[Any]:
        """A turn of this thread: what belongs to one prefill and must not meet another one's."""
        return self._turn

    def _seeing_labels(self, own: Any) -> Any:
        """The model's forward, noting whether it is given labels: then the decoder must say which tokens are left. No
        hook, as PEFT's adapters call the forward itself.
        """
        names = list(inspect.signature(own).parameters)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            labels = {**dict(zip(names, args, strict=False)), **kwargs}.get("labels")
            self._told.labels, self._told.left = labels is not None, None
            return own(*args, **kwargs)

        return forward

    def _loss(self, own: Any) -> Any:
        """The model's loss, with labels only of tokens that are still there."""

        @functools.wraps(own)
        def loss(*args: Any, **kwargs: Any) -> Any:
            left = getattr(self._told, "left", None)
            return own(*args, **kwargs) if left is None else own(*args, **follow_labels(own, args, kwargs, left))

        return loss

    @property
    def selects(self) -> bool:
        """Whether the method drops or merges tokens anywhere; a dense run with a cap does not count."""
        return bool(self._stages) or self.reduces_vision

    @property
    def needs_cls_attention(self) -> bool:
        """Whether the model has to provide CLS attention with :meth:`set_visual`."""
        return self.method.needs_cls or self.method.visual_token_num is not None

    @property
    def reduces_vision(self) -> bool:
        """Whether the method works before the decoder, so that prompts must be encoded while it is attached."""
        return self.method.reduces_vision or self.method.merges_in_tower

    @property
    def shapes_prompt(self) -> bool:
        """Whether what is computed in front of the decoder is the method's own, CLS attention aside."""
        return self.reduces_vision or bool(set(self.vision_facts(_ANY_DEPTH)) - {CLS_ATTENTION})

    def vision_facts(self, tower_layers: int) -> dict[str, VisionFact]:
        """What the vision tower has to compute for the method, by name."""
        facts = dict(self.method.vision_facts(tower_layers))
        if self.needs_cls_attention:
            facts.setdefault(CLS_ATTENTION, VisionFact(TowerValue.CLS_ATTENTION))
        return facts

    def _needed_facts(self, reduced: bool) -> list[str]:
        """Names of the facts that the prefill needs; those for a reduction that has taken place are done with."""
        if not reduced:
            return list(self.vision_facts(_ANY_DEPTH))
        parts = [part for part in self.method.parts if part.ranks_in_decoder or not part.reduces_vision]
        names = [name for part in parts for name in part.vision_facts(_ANY_DEPTH)]
        return names + [CLS_ATTENTION] * any(part.needs_cls for part in parts)

    @property
    def prefill_seconds(self) -> list[float]:
        """Wall-clock seconds of every decoder prefill, selection included; reading it waits for the device."""
        self._seconds.extend(watch.seconds() for watch in self._unread)
        self._unread.clear()
        return self._seconds

    def set_visual(
        self,
        layout: VisualLayout,
        cls_attention: Tensor | Sequence[Tensor | None] | None = None,
        *,
        facts: Mapping[str, Sequence[Tensor | None]] | None = None,
        reduced: Sequence[ReducedRow] | None = None,
        sample_ids: Sequence[int] | None = None,
        width: int | None = None,
    ) -> None:
        """Say where the visual tokens of the next prompts are: for one prefill, which uses it up.

        Args:
            layout: spans in the (left-padded) sequence given to the decoder, one row per sample; rows are repeated for
                beams.
            cls_attention: one vector ``[N_i]`` per row (None for rows without visual tokens), or a tensor ``[N]`` or
                ``[B, N]``. Needed if :attr:`needs_cls_attention`.
            facts: further facts that the method declared, by name one tensor ``[N_i, ...]`` per row.
            reduced: if the visual tokens were reduced already, what each row must say about it. N_i of all facts still
                counts the visual tokens before the reduction.
            sample_ids: number of each row's sample, for seeded methods; default: counted on from :attr:`samples_seen`.
            width: tokens of the (padded) prompts where guesses of assisted decoding may stand behind them.

        Raises:
            ValueError: a fact is missing or of the wrong length.
        """
        needed = self._needed_facts(reduced is not None)
        self._told.prompts = told_of(self.method.name, layout, cls_attention, facts, reduced, sample_ids, width, needed)

    @property
    def _prunes(self) -> bool:
        return bool(self._stages) or self.method.visual_token_num is not None or self.reduces_vision

    def _forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        def dense() -> Any:
            return self._dense_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )

        with self._turn:
            continues = compat.cached_length(past_key_values) > 0
            if continues and CacheRecord.of(past_key_values) is None:
                return dense()  # nothing was pruned from this cache
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is None or (input_ids is not None and inputs_embeds is not None):
                raise ValueError("the decoder needs exactly one of input_ids and inputs_embeds")
            batch, width = given.shape[:2]
            if continues:
                self._refuse(kwargs)
                check_step_form(attention_mask, position_ids, batch, width, self._axes)
                embeds = self._embeds(input_ids, inputs_embeds)
                last, states = decode(self.decoder, embeds, past_key_values, self._keeps_states(kwargs))
                return self._output(last, past_key_values, states, kwargs)

            told = self._take_told()
            if told.width is not None and told.width < width and self._prunes:
                self._told.prompts = replace(told, width=None)
                given_all = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                                 inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)  # fmt: skip
                cache = compat.new_cache() if past_key_values is None else past_key_values
                return prompt_then_guesses(self._forward, told.width, cache, given_all)
            added = deepstack_features(self.decoder, kwargs, given) if self._prunes else None
            layout, repeats = repeated(told.layout, batch)
            prunes = self._prunes and any(layout.counts)
            if self._prunes:
                taken = () if added is None else ("deepstack_visual_embeds", "visual_pos_masks")
                self._refuse({name: value for name, value in kwargs.items() if name not in taken})
            if prunes:
                check_prompt_form(attention_mask, position_ids, batch, width, self._axes)
                if position_ids is not None and position_ids.ndim == 3:
                    position_ids = position_ids[-3:].permute(1, 2, 0)
                labeled = getattr(self._told, "labels", False)
                if labeled and not hasattr(self._model, "loss_function"):
                    raise UnsupportedError(
                        "labels= cannot be used while a method prunes this model: the decoder returns fewer tokens "
                        "than there are labels; compute the loss from the logits"
                    )
                lengths = layout.lengths or row_lengths(attention_mask, batch, width)
                check_lengths(lengths, attention_mask)
            else:
                lengths = layout.lengths or compat.visible_tokens(attention_mask, batch, width)
            with Stopwatch(given.device) as watch:
                if not prunes:
                    result = dense()
                    traces = dense_traces(self.decoder, layout, lengths, result[0].element_size())
                else:
                    cache = compat.new_cache() if past_key_values is None else past_key_values
                    compat.check_cache(cache)
                    embeds = self._embeds(input_ids, inputs_embeds)
                    prompt = prompt_of(
                        self.method, self.selection_timer, embeds, lengths, position_ids, layout, told, repeats,
                        self._ids(told, repeats), added, labeled, self.notes_members,
                    )  # fmt: skip
                    timer = self.selection_timer
                    graphs = None if timer is not nullcontext or self.notes_members else self.graphs
                    through = prefill if graphs is None else graphs.prefill
                    pruned = through(self.decoder, self.method, prompt, cache, self._keeps_states(kwargs), timer)
                    traces, self._told.left = pruned.traces, pruned.index_BN
                    self._notices.given(self.method.parts, pruned.effects)
                    if use_cache is None:
                        use_cache = getattr(self.decoder.config, "use_cache", True)
                    cached = cache if use_cache or past_key_values is not None else None
                    result = self._output(pruned.hidden_BNC, cached, pruned.hidden_states, kwargs)
            self._unread.append(watch)
            self._notices.add(self.method.name, traces[::repeats])
            self.samples_seen += told.layout.batch_size
            self.traces.extend(traces[::repeats])
            return result

    def _embeds(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        embeds: Tensor = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return embeds

    def _keeps_states(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("output_hidden_states")
        return bool(getattr(self.decoder.config, "output_hidden_states", False) if wanted is None else wanted)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        if self.decoder.training:
            raise UnsupportedError("visual token pruning is for inference: call model.eval() first")
        check_arguments(self.decoder.config, kwargs)

    @property
    def told(self) -> bool:
        """Whether this thread has said where the visual tokens of the next prompts are."""
        return getattr(self._told, "prompts", None) is not None

    def _take_told(self) -> Told:
        """What was said about this prompt. It holds for one prefill: the next prompt has its image elsewhere."""
        if self.reader is not None and not self.told:
            self.reader.tell(self)
            self.sample_ids = None
        told: Told | None = getattr(self._told, "prompts", None)
        self._told.prompts = None
        if told is None:
            raise RuntimeError(
                "the pruning run does not know where the visual tokens are: "
                + ("" if self.reader is None else f"{self.reader.family} says so by input_ids and pixels; else ")
                + "call run.set_visual(VisualLayout...) in this thread before every prefill; a layout holds for one "
                "prefill, and a prompt without an image has one without spans"
            )
        self._threads.add(threading.current_thread())
        return told

    def _ids(self, told: Told, repeats: int) -> SampleIds:
        if told.sample_ids is not None:
            ids = told.sample_ids
        else:
            ids = tuple(range(self.samples_seen, self.samples_seen + told.layout.batch_size))
        alive = sum(thread.is_alive() for thread in self._threads)
        return SampleIds(tuple(sample for sample in ids for _ in range(repeats)), told.sample_ids is None and alive > 1)

    def _output(self, hidden: Tensor, cache: Any, states: tuple[Tensor, ...] | None, kwargs: dict[str, Any]) -> Any:
        output = compat.BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=states)
        as_dict = kwargs.get("return_dict")
        if as_dict is None:
            as_dict = getattr(self.decoder.config, "return_dict", True)
        return output.to_tuple() if as_dict is False else output


def _with_original_positions(method: Method) -> Method:
    """The method where positions have several axes: renumbering has no meaning there.

    Raises:
        OptionError: it was asked for.
    """
    if method.positions != "compact":
        return method
    if not isinstance(method.positions, OwnDefault):
        raise OptionError(
            "positions=compact has no meaning in a decoder whose positions have several axes (M-RoPE): use original"
        )
    say(method.name, "positions=original, because this decoder's positions have several axes (M-RoPE)")
    own = copy.copy(method)
    object.__setattr__(own, "positions", "original")  # methods are frozen
    return own


def _refuse_copy(*_: object) -> NoReturn:
    raise RuntimeError(
        "a pruning run is attached to this model: leave its context before the model is copied or pickled"
    )
