"""CUDA graphs of prefills, on the CPU: a stand-in records a function and replays it into the memory of its result.

What it cannot show is in test_gpu.py. Everything else is here: inputs are copied in, decisions are taken anew, what was
handed out does not change any more, whatever comes later.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from llava.pruning import AutoPrune, VisualLayout, get_method
from llava.pruning.engine.graphs import PrefillGraphs
from tests.pruning.models import random_llama

VISUAL, BEFORE, AFTER = 48, 4, 7


def tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """All tensors that can be reached, modules left out, in an order that is the same for equal structures."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, nn.Module | type | str | int | float):
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        value = [value.args, value.keywords]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value), seen)


class Again:
    """A graph that runs its function again and writes what comes out where the first result is."""

    def __init__(self, work, result):
        self.work, self.result = work, result

    def replay(self):
        new, old = list(tensors(self.work(), set())), list(tensors(self.result, set()))
        assert len(new) == len(old) and all(a.shape == b.shape for a, b in zip(new, old, strict=True))
        for here, there in zip(old, new, strict=True):
            if 0 in here.stride():
                assert torch.equal(here, there)  # expanded: numbers that are always the same
            elif here.data_ptr() != there.data_ptr():
                here.copy_(there)


def captured(work, pool):
    """In the place of `capture_on_cuda`."""
    result = work()
    return Again(work, result), result


@pytest.fixture
def graphs():
    return PrefillGraphs(capture=captured)


def prompts(batch: int, count: int, seed: int = 3):
    """Embeddings of different strength, so that mutual information and schedules differ."""
    generator = torch.Generator().manual_seed(seed)
    layout = VisualLayout.from_spans([[(BEFORE, BEFORE + VISUAL)]] * batch)
    for number in range(count):
        embeds = torch.randn(batch, BEFORE + VISUAL + AFTER, 64, generator=generator)
        alike = torch.randn(64, generator=generator)  # pictures of patches that differ more or less
        embeds[:, BEFORE:-AFTER] = embeds[:, BEFORE:-AFTER] * (number % 3 / 2) + alike
        yield embeds, layout, [torch.rand(VISUAL, generator=generator) / 50 for _ in range(batch)]


def outputs(model, method, batch, count, graphs=None):
    found = []
    for embeds, layout, cls in prompts(batch, count):
        with torch.inference_mode(), method.attach(model, graphs) as run:
            run.set_visual(layout, cls if run.needs_cls_attention else None)
            output = model(inputs_embeds=embeds, use_cache=True)
            found.append((output.logits[:, -1], output.past_key_values, run.traces))
    return found


METHODS = {
    "autoprune": AutoPrune(target_tokens=12, k0=1.5, gamma=0.2, x0=3.0),
    "late decision": AutoPrune(target_tokens=12, k0=1.5, gamma=0.2, x0=4.0, mi_layer=2),
    "fixed slope": AutoPrune(target_tokens=12, slope=0.3, x0=3.0),
    **{name: get_method(name)(target_tokens=24) for name in ("fastv", "pdrop", "divprune", "autoprune_plus")},
    "fastervlm": get_method("fastervlm")(target_tokens=24),
    "divprune+autoprune": get_method("divprune+autoprune").from_options({"divprune.target_tokens": 30, "x0": 3.0}),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_replayed_prefills_are_those_that_were_run(name, batch, graphs):
    model, method = random_llama(), METHODS[name]
    wanted = outputs(model, method, batch, 9)
    got = outputs(model, method, batch, 9, graphs)
    assert graphs.counts["eager"] == 1 and graphs.counts["captured"] + graphs.counts["replayed"] == 8
    if name == "autoprune" and batch == 1:  # the schedules are not all the same, and some come again
        assert graphs.counts["captured"] > 1 and len({tuple(t[0].tokens_out) for _, _, t in wanted}) > 1
    # Compared after the last one has run: nothing that was handed out earlier has been written over.
    for (logits, cache, traces), (own_logits, own_cache, own_traces) in zip(wanted, got, strict=True):
        torch.testing.assert_close(own_logits, logits)
        for layer, own_layer in zip(cache.layers, own_cache.layers, strict=True):
            torch.testing.assert_close(own_layer.keys, layer.keys)
            torch.testing.assert_close(own_layer.values, layer.values)
        assert [t.to_dict(kept=True) for t in own_traces] == [t.to_dict(kept=True) for t in traces]


def test_decoding_goes_on_from_a_replayed_prefill(graphs):
    model, method = random_llama(), METHODS["autoprune"]

    def tokens(graphs):
        found = []
        for embeds, layout, cls in prompts(1, 5):
            with method.attach(model, graphs) as run:
                run.set_visual(layout, cls)
                found.append(model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False))
        return torch.cat(found)

    assert torch.equal(tokens(graphs), tokens(None)) and graphs.counts["eager"] == 1


def test_what_cannot_be_captured_runs_as_always(graphs):
    model = random_llama()
    for method in (METHODS["autoprune"], get_method("random")(target_tokens=12)):
        for number, (embeds, layout, cls) in enumerate(prompts(2, 3)):
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            if method.name == "autoprune":
                mask[1, : 1 + number] = 0  # padded
            with torch.inference_mode(), method.attach(model, graphs) as run:
                run.set_visual(layout, cls if run.needs_cls_attention else None)
                model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
    assert graphs.counts == {"eager": 6, "captured": 0, "replayed": 0}


def test_weights_that_were_moved_are_captured_anew(graphs):
    """A graph reads them where they were."""
    model, method = random_llama(), METHODS["fixed slope"]
    outputs(model, method, 1, 3, graphs)
    assert graphs.counts == {"eager": 1, "captured": 1, "replayed": 1}
    kept = [weight.data for weight in model.parameters()]  # so that the new ones lie elsewhere
    for weight in model.parameters():
        weight.data = weight.data * 1.5
    wanted, got = outputs(model, method, 1, 3), outputs(model, method, 1, 3, graphs)
    assert graphs.counts == {"eager": 2, "captured": 2, "replayed": 2} and kept
    for (logits, _, _), (own, _, _) in zip(wanted, got, strict=True):
        torch.testing.assert_close(own, logits)


def test_the_tails_used_longest_ago_are_forgotten():
    graphs = PrefillGraphs(limit=1, capture=captured)
    model, method = random_llama(), METHODS["autoprune"]
    for (own, *_), (wanted, *_) in zip(outputs(model, method, 1, 9, graphs), outputs(model, method, 1, 9), strict=True):
        torch.testing.assert_close(own, wanted)
    assert graphs.counts["captured"] > 2


def test_slope_step_makes_few_schedules():
    model = random_llama()
    exact = {traces[0].slope for *_, traces in outputs(model, METHODS["autoprune"], 1, 12)}
    stepped = AutoPrune(target_tokens=12, k0=1.5, gamma=0.2, x0=3.0, slope_step=0.5)
    slopes = {traces[0].slope for *_, traces in outputs(model, stepped, 1, 12)}
    assert len(slopes) < len(exact) and all((slope / 0.5).is_integer() for slope in slopes)
