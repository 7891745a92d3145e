"""Decoding on a pruned cache copies what dense decoding on a cache of these lengths copies, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava import compat
from llava.pruning import get_method
from tests.pruning.models import Batch, random_llama

STEPS = 3


class NewTensors(TorchDispatchMode):
    """Every tensor of at least `elements` values that an operation makes in memory of its own: (operation, shape).

    Not in inference mode, where operations that are made of others are seen as one.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.made = elements, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                if tensor.numel() >= self.elements:
                    self.made[str(function.overloadpacket), tuple(tensor.shape)] += 1
        return result


def smallest(cache) -> int:
    """Values in the keys of the shortest layer: far more than a single token has anywhere in a tiny decoder."""
    return min(layer.keys.numel() for layer in cache.layers)


def step(model, cache, elements: int) -> Counter:
    """What a step with one new token per row makes."""
    rows = len(cache.layers[0].keys)
    with NewTensors(elements) as new:
        model.model(inputs_embeds=torch.randn(rows, 1, model.config.hidden_size), past_key_values=cache, use_cache=True)
    return new.made


def dense_step(model, widths, elements: int) -> Counter:
    """What transformers' own decoder makes in a step, every layer at its own length.

    Its masks fit one length only, so it runs on a cache of each length, and every layer counts there where it belongs.
    """
    shape, layers, made = model.config, len(widths), Counter()
    for width, members in Counter(widths).items():
        cache = compat.new_cache()
        for layer in range(layers):
            keys = torch.randn(2, 1, shape.num_key_value_heads, width, shape.head_dim)
            cache.update(*keys, layer)
        for key, times in step(model, cache, elements).items():
            assert times % layers == 0, "the layers do the same"
            made[key] += times // layers * members
    return made


def prefilled(run, model, inputs):
    run.set_visual(inputs["layout"], inputs["cls"], facts=inputs["facts"])
    return model.model(inputs_embeds=inputs["embeds"], attention_mask=inputs["mask"], use_cache=True).past_key_values


@pytest.mark.parametrize("method", ["autoprune", "fastv", "divprune"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_a_step_copies_as_much_as_dense_decoding_on_these_lengths(method, attention, kv_heads):
    model = random_llama(attention, kv_heads=kv_heads)
    inputs = Batch(model).alone(0)
    with get_method(method)(target_tokens=24).attach(model) as run:
        cache = prefilled(run, model, inputs)
        widths = [layer.keys.shape[2] for layer in cache.layers]
        elements = smallest(cache)
        pruned = [step(model, cache, elements) for _ in range(STEPS)]
    (trace,) = run.traces
    assert widths == [trace.text_tokens + kept for kept in trace.tokens_in] and min(widths) < trace.text_tokens + 48
    head = model.config.head_dim
    for number, made in enumerate(pruned):
        assert made == dense_step(model, [width + number for width in widths], elements)
        copies = {shape: times for (operation, shape), times in made.items() if operation == "aten.cat"}
        grown = Counter((1, kv_heads, width + number + 1, head) for width in widths)
        assert copies == {shape: 2 * layers for shape, layers in grown.items()}, "keys and values once each"


@pytest.mark.parametrize("method", ["autoprune", "fastv"])
@torch.no_grad()
def test_rows_of_unequal_length_are_copied_once_too(method):
    """Keys and values of each layer, at the length of its longest row; masks are made, but no other copy."""
    model = random_llama()
    batch = Batch(model)
    inputs = batch.together([0, 1, 2])
    with get_method(method)(target_tokens=16).attach(model) as run:
        cache = prefilled(run, model, inputs)
        kept = [trace.tokens_out for trace in run.traces]
        text = [trace.text_tokens for trace in run.traces]
        widths = [layer.keys.shape[2] for layer in cache.layers]
        elements = smallest(cache)
        made = [step(model, cache, elements) for _ in range(STEPS)]
    # The last layer's cache has what entered it: what the layer before has left.
    assert widths[-1] == max(row[-2] + own for row, own in zip(kept, text, strict=True))
    for number, new in enumerate(made, start=1):
        grown = Counter(("aten.cat", (3, 4, width + number, model.config.head_dim)) for width in widths)
        assert new == {key: 2 * layers for key, layers in grown.items()}


@torch.no_grad()
def test_the_count_sees_copies():
    """What this file would miss would be missed silently."""
    keys = torch.randn(1, 4, 30, 16)
    with NewTensors(keys.numel()) as new:
        keys.clone()
        keys.transpose(1, 2).contiguous()
        keys[:, :, :-1], keys.transpose(1, 2), keys.expand(2, -1, -1, -1)
        keys.index_select(2, torch.arange(30))
        keys.add_(1)
    assert new.made == {
        ("aten.clone", (1, 4, 30, 16)): 1,
        ("aten.clone", (1, 30, 4, 16)): 1,
        ("aten.index_select", (1, 4, 30, 16)): 1,
    }
