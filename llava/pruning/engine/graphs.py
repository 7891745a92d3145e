"""CUDA graphs of pruned prefills: what a prefill asks of the device is recorded once and then asked for in one go.

Behind the first layers a 7B decoder works on a hundred tokens, and a GPU is done with a layer long before the host has
launched the next one. A graph has no launches. What it needs is that nothing depends on the host, and in a prefill one
thing does: the counts, where a method decides on them by what it has seen. So there are two graphs: the *head*, up to
that decision, one per shape of the prompts, and a *tail* for everything behind it, one per shape and decision.

The first prefill of a shape runs as always. Prompts that are padded, reduced in front of the decoder, or have positions
of their own, and methods that do not say they are ``capturable``, run as always too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from llava import compat
from llava.pruning.engine.decoder import Outcome, Prefill, Prefilling, prefill
from llava.pruning.engine.notices import say
from llava.pruning.engine.prompt import Prompt
from llava.pruning.engine.protocol import Method
from llava.pruning.engine.view import SampleIds
from llava.pruning.views import JOINT


class Graph(Protocol):
    """What was recorded; to be replayed on the memory that it was recorded with."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Any], Any], tuple[Graph, Any]]
"""Records what a function asks of the device, in the memory pool of earlier records: the graph, the function's result
(memory that every replay fills anew).
"""


def capture_on_cuda(work: Callable[[], Any], pool: Any) -> tuple[Graph, Any]:
    """By :class:`torch.cuda.CUDAGraph`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph, result


@dataclass
class _Head:
    """Graph up to the decision, and the tails by decision, the one used last at the end.

    Attributes:
        graph: None if nothing has to be decided.
        inputs: the tensors that a prompt is copied into.
        work: the state behind the graph; goes on in a tail.
    """

    inputs: list[Tensor]
    graph: Graph | None
    work: Prefilling
    tails: OrderedDict[Hashable, _Tail] = field(default_factory=OrderedDict)


@dataclass
class _Left:
    """What a tail leaves behind, in two pieces of memory: so it takes two launches to copy it.

    Attributes:
        states: final hidden states, then keys and values of all layers, one behind the other.
        kept: indices that the selections kept, likewise; None if there were none.
        shapes: of the states.
        outcome: the rest of the outcome; its tensors are not to be read.
        layers: of the cache, likewise.
    """

    states: Tensor
    kept: Tensor | None
    shapes: list[torch.Size]
    outcome: Outcome
    layers: list[Any]

    @classmethod
    def of(cls, outcome: Outcome, layers: list[Any]) -> _Left:
        states = [outcome.hidden_BNC, *(s for keys_values in map(compat.keys_values, layers) for s in keys_values)]
        if len({(state.dtype, state.device) for state in states}) > 1:
            raise RuntimeError("keys and values are of another type than the hidden states, or elsewhere")
        shapes, hidden = [state.shape for state in states], states[0]
        flat = torch.cat([state.flatten() for state in states])
        kept = [indices.flatten() for indices in outcome.recorder.selections()]
        # What is in the two pieces need not be kept alive beside them.
        outcome = replace(outcome, hidden_BNC=hidden[:, :0])
        layers = [compat.with_keys_values(layer, hidden[:0], hidden[:0]) for layer in layers]
        return cls(flat, torch.cat(kept) if kept else None, shapes, outcome, layers)


@dataclass
class _Tail:
    """A graph behind a decision, and what it leaves in the memory that the next replay will write into."""

    graph: Graph
    left: _Left

    def copied(self) -> tuple[Outcome, list[Any]]:
        """A copy of what is there: the outcome, and layers for a cache."""
        left = self.left
        pieces = torch.split(left.states.clone(), [shape.numel() for shape in left.shapes])
        hidden, *states = (piece.view(shape) for piece, shape in zip(pieces, left.shapes, strict=True))
        layers = [
            compat.with_keys_values(layer, keys, values)
            for layer, keys, values in zip(left.layers, states[::2], states[1::2], strict=True)
        ]
        recorder = left.outcome.recorder.with_selections(None if left.kept is None else left.kept.clone())
        return replace(left.outcome, hidden_BNC=hidden, recorder=recorder), layers


class PrefillGraphs:
    """Graphs of one decoder and method; give it to ``method.attach(model, graphs=...)``, to one run or to several.

    Results do not depend on it, up to kernels that a library chooses otherwise.

    Attributes:
        limit: most tails per shape, and most shapes; the ones used longest ago go first. A tail holds the keys and
            values of one prefill.
        counts: prefills by how they ran: ``eager``, ``captured`` (a tail was recorded) and ``replayed``.
    """

    def __init__(self, limit: int = 16, capture: Capture = capture_on_cuda) -> None:
        self.limit, self.capture = limit, capture
        self.counts = {"eager": 0, "captured": 0, "replayed": 0}
        self._heads: OrderedDict[Hashable, _Head | None] = OrderedDict()
        self._never: set[Hashable] = set()
        self._pool: Any = None

    def prefill(
        self,
        decoder: compat.Decoder,
        method: Method,
        prompt: Prompt,
        cache: Any,
        keep_states: bool = False,
        timer: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Prefill:
        """As :func:`~llava.pruning.engine.decoder.prefill`."""
        key = None if keep_states or compat.cached_length(cache) else self._key(decoder, method, prompt)
        replayed = None
        if key is not None and key in self._heads:
            try:
                replayed = self._replayed(key, decoder, method, prompt, cache)
            except RuntimeError as error:  # torch has no class of its own for what cannot be captured
                say(method.name, f"prefills like this run without CUDA graphs: {error}")
                self._never.add(key)
                del self._heads[key]
        elif key is not None:
            self._heads[key] = None  # kernels are loaded and tuned in this one, and the next is captured
            self._forget(self._heads)
        if replayed is None:
            self.counts["eager"] += 1
            return prefill(decoder, method, prompt, cache, keep_states, timer)
        return replayed

    def _replayed(self, key: Hashable, decoder: compat.Decoder, method: Method, prompt: Prompt, cache: Any) -> Prefill:
        head = self._heads[key] or self._captured_head(decoder, method, prompt)
        self._heads[key] = head
        self._heads.move_to_end(key)
        for static, (_, given) in zip(head.inputs, _named_inputs(prompt), strict=True):
            static.copy_(given)
        if head.graph is not None:
            head.graph.replay()
        # The host waits here, if at all, while the tail is not on its way yet.
        work = head.work.forked(None)
        decision = work.decide()
        known = decision in head.tails
        if not known:
            head.tails[decision] = self._captured_tail(head, work)
            self._forget(head.tails)
        tail = head.tails[decision]
        head.tails.move_to_end(decision)
        tail.graph.replay()
        self.counts["replayed" if known else "captured"] += 1
        outcome, layers = tail.copied()
        compat.fill_cache(cache, layers)
        said_before = head.work.report()
        decided = {name: said for name, said in work.report().items() if said != said_before.get(name)}
        return replace(outcome, report={**outcome.report, **decided}).delivered(prompt, method, cache)

    def _key(self, decoder: compat.Decoder, method: Method, prompt: Prompt) -> Hashable:
        """What a graph depends on; None if there can be none."""
        hidden = prompt.hidden_BNC
        plain = prompt.reduced is None and prompt.added_BNF is None and prompt.index_BN is None
        # Quotas of images and markers are numbers of the host.
        shares = any(part.view_budget != JOINT or part.pospad for part in method.parts)
        capturable = method.capturable and not shares
        if not (plain and capturable and min(prompt.lengths) == hidden.shape[1]):
            return None
        if self.capture is capture_on_cuda and hidden.device.type != "cuda":
            return None
        given = tuple((name, value.shape, value.dtype, value.device) for name, value in _named_inputs(prompt))
        # Weights that were moved (`model.to`) are no longer where the graph reads them.
        ends: tuple[Any, ...] = decoder.embed_tokens, decoder.norm
        weights = tuple(module.weight.data_ptr() for module in ends)
        key = id(decoder), weights, method, prompt.layout.spans, prompt.layout.crops, prompt.width, given
        return None if key in self._never else key

    def _captured_head(self, decoder: compat.Decoder, method: Method, prompt: Prompt) -> _Head:
        if self._pool is None and self.capture is capture_on_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        inputs = {name: value.clone() for name, value in _named_inputs(prompt)}
        static = replace(
            prompt,
            hidden_BNC=inputs["hidden"],
            positions_BN=inputs.get("positions"),
            facts={name: inputs[f"fact {name}"] for name in prompt.facts},
            # A method that draws by the number of its sample would draw the same in every replay.
            samples=SampleIds((), by_chance=True),
        )
        decides = method.decision_layer(len(decoder.layers))
        if decides is None:  # nothing to record yet
            return _Head(list(inputs.values()), None, Prefilling(decoder, method, static, compat.new_cache()))
        last: int = decides

        def to_the_decision() -> Prefilling:
            work = Prefilling(decoder, method, static, compat.new_cache())
            work.before_decoder()
            with work.scoring():
                work.through(range(last))
                work.layer(last)
            return work

        graph, work = self.capture(to_the_decision, self._pool)
        return _Head(list(inputs.values()), graph, work)

    def _captured_tail(self, head: _Head, decided: Prefilling) -> _Tail:
        decides = decided.method.decision_layer(len(decided.decoder.layers))

        def behind_it() -> _Left:
            work = decided.forked(compat.forked_cache(head.work.cache))
            if decides is None:
                work.before_decoder()
            else:
                work.select()
            with work.scoring():
                work.through(range(0 if decides is None else decides + 1, len(work.decoder.layers)))
            return _Left.of(work.outcome(), compat.cache_layers(work.cache))

        graph, left = self.capture(behind_it, self._pool)
        return _Tail(graph, left)

    def _forget(self, known: OrderedDict[Hashable, Any]) -> None:
        while len(known) > self.limit:
            known.popitem(last=False)


def _named_inputs(prompt: Prompt) -> list[tuple[str, Tensor]]:
    """The tensors of a prompt that differ from one of its shape."""
    positions = [] if prompt.positions_BN is None else [("positions", prompt.positions_BN)]
    facts = [(f"fact {name}", prompt.facts[name]) for name in sorted(prompt.facts)]
    return [("hidden", prompt.hidden_BNC), *positions, *facts]
