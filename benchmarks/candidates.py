"""What is measured: transformers' own decoder, a pruned run, and the floor under it, as callables; and their counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks.geometry import RandomPrompt
from benchmarks.parts import Clock, cut, selection
from benchmarks.published import Published, published_prefill, run_published
from llava import compat
from llava.pruning import get_method
from llava.pruning.engine.graphs import PrefillGraphs, capture_on_cuda
from llava.pruning.engine.recorder import dense_traces
from llava.pruning.engine.run import PruningRun
from llava.pruning.engine.trace import Trace
from llava.pruning.method import PruningMethod
from llava.pruning.methods.autoprune.curve import planned_counts
from llava.utils import UserError

MIB = 2**20


def build_method(name: str, budget: int, **options: Any) -> PruningMethod:
    """A method at a budget; `UserError` for unknown names and options."""
    try:
        return get_method(name).from_options({"target_tokens": budget, **options})
    except (KeyError, ValueError) as error:
        raise UserError(f"--methods: {error}") from None


def needs_no_tower(method: PruningMethod) -> PruningMethod:
    """The method, if it can prune a prompt of random embeddings, which no vision tower has seen.

    Raises:
        UserError: it needs the tower for more than CLS attention.
    """
    if method.merges_in_tower:
        what = "merges inside the vision tower"
    elif facts := method.vision_facts(24):  # names do not depend on the depth
        what = f"asks the vision tower for {', '.join(facts)}"
    else:
        return method
    raise UserError(f"--methods: {method.name} {what}, and here is a decoder alone; benchmarks.first_token measures it")


@dataclass(frozen=True)
class Graphed:
    """A setting of the benchmarks: a method whose prefills replay CUDA graphs where they can."""

    method: PruningMethod
    graphs: PrefillGraphs

    def attach(self, model: nn.Module) -> PruningRun:
        """As of the method."""
        return self.method.attach(model, self.graphs)


Setting = PruningMethod | Published | Graphed


def run_pruned(model: nn.Module, setting: Setting, prompt: RandomPrompt) -> tuple[Any, list[Trace]]:
    """One pruned prefill of the decoder: its output and the traces."""
    planned_counts.cache_clear()  # every sample has another slope; here they are all the same
    if isinstance(setting, Published):
        return run_published(model, setting.method, prompt)
    with setting.attach(model) as run:
        run.set_visual(prompt.layout, prompt.cls_BV if run.needs_cls_attention else None)
        output = model.model(inputs_embeds=prompt.embeds_BNC, use_cache=True)
    return output, run.traces


def dense_prefill(model: nn.Module, prompt: RandomPrompt) -> Callable[[], Any]:
    """transformers' own decoder on all tokens; nothing of ours is attached."""
    return lambda: model.model(inputs_embeds=prompt.embeds_BNC, use_cache=True)


def pruned_prefill(model: nn.Module, setting: Setting, prompt: RandomPrompt) -> Callable[[], Any]:
    """The decoder with a method attached; attaching and telling where the visual tokens are included."""
    if isinstance(setting, Published):
        return published_prefill(model, setting.method, prompt)
    return lambda: run_pruned(model, setting, prompt)


def replayed(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one CUDA graph that is replayed; its result stays in the graph's memory."""
    with torch.inference_mode():
        work()
        torch.cuda.synchronize()
        graph, result = capture_on_cuda(work, None)

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def layer_widths(traces: Sequence[Trace]) -> tuple[int, ...]:
    """Tokens that each layer computes on in a batch: those of its longest row."""
    rows = [[trace.text_tokens + count for count in trace.tokens_in] for trace in traces]
    return tuple(max(column) for column in zip(*rows, strict=True))


def floor_prefill(model: nn.Module, widths: Sequence[int], prompt: RandomPrompt) -> Callable[[], Any]:
    """The same layers on the first `widths[l]` tokens each: no scores, no choice, no gathering, one mask for all.

    What these numbers of tokens cost with these layers, whoever chose them.
    """
    decoder = model.model

    def run() -> tuple[torch.Tensor, Any]:
        hidden = prompt.embeds_BNC
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        cos, sin = decoder.rotary_emb(hidden, positions)
        cache = compat.new_cache()
        whole = compat.causal_mask(decoder.config, hidden, None)
        width, mask = 0, None
        for layer, wanted in zip(decoder.layers, widths, strict=True):
            if wanted != width:
                width = wanted
                hidden = hidden[:, :width]
                if isinstance(whole, torch.Tensor) and whole.ndim == 4:
                    mask = whole[:, :, :width, :width]
                elif whole is not None:
                    mask = compat.causal_mask(decoder.config, hidden, None)
                rotary = cos[:, :width], sin[:, :width]
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=None,
                past_key_values=cache,
                use_cache=True,
            )
        return decoder.norm(hidden), cache

    return run


def traces_of(model: nn.Module, method: Setting | None, prompt: RandomPrompt) -> list[Trace]:
    """What happens to each row; None is dense."""
    if method is None:
        batch = len(prompt.embeds_BNC)
        return dense_traces(model.model, prompt.layout, (prompt.tokens,) * batch, prompt.embeds_BNC.element_size())
    with torch.inference_mode():
        return run_pruned(model, method, prompt)[1]


def count_row(traces: Sequence[Trace]) -> dict[str, Any]:
    """Tokens, FLOPs and bytes of a batch: what does not depend on the machine."""
    flops, dense = sum(t.flops() for t in traces), sum(t.dense_flops() for t in traces)
    slopes = [t.slope for t in traces if t.slope is not None]
    return {
        "batch": len(traces),
        "visual": traces[0].visual_tokens,
        "nominal": fmean(t.mean_tokens("nominal") for t in traces),
        "processed": fmean(t.mean_tokens("processed") for t in traces),
        "slope": fmean(slopes) if slopes else None,
        "flops": flops,
        "flops_of_dense": flops / dense,
        "selection_flops_of_dense": sum(t.selection_flops() for t in traces) / dense,
        "kv_mib": sum(t.kv_bytes() for t in traces) / MIB,
    }


def choice_seconds(model: nn.Module, method: Setting, prompt: RandomPrompt, rounds: int = 3) -> float | None:
    """Median seconds that scores and choices take in a prefill; moving what is kept and the masks of the new lengths
    are not in it. None for what does not tell them apart.
    """
    if isinstance(method, Published | Graphed):
        return None
    with torch.inference_mode(), method.attach(model) as run:
        seconds = []
        for _ in range(rounds):
            clock = Clock(prompt.embeds_BNC.device)
            run.set_visual(prompt.layout, prompt.cls_BV if run.needs_cls_attention else None)
            with cut([selection(run)], clock.part):
                model.model(inputs_embeds=prompt.embeds_BNC, use_cache=True)
            seconds.append(clock.seconds["selection"])
        return sorted(seconds)[rounds // 2]
