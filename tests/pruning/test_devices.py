"""Layers of one decoder on several devices: what a method remembers or is told follows the tokens.

Torch's device "meta" stands for a second accelerator. Its tensors have shapes and a device, but no values, and mixing
it with the CPU is an error; the engine only needs the shapes, because all counts are on the host. Reading such a tensor
is an error too, so these tests also show that the host never waits for the device (but for the slope of AutoPrune).
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

from llava.pruning import get_method
from tests.pruning.models import Batch, random_llama

SECOND = 1  # first layer on the second device

METHODS = {
    "autoprune": {"target_tokens": 8, "slope": 0.2},  # without values no information can be read
    "sparsevlm": {"target_tokens": 8},
    "fastv": {"target_tokens": 30},
    # Not in front of the first layer there: what it says could not come back.
    "pdrop": {"target_tokens": 20, "layers": "3/5"},
    "divprune": {"target_tokens": 8},
    "entropyprune": {"target_tokens": 30},
    # The first transition is that of the last layer on the first device.
    "transprune": {"target_tokens": 20, "layers": "3/5", "accumulate": "1/2/3/4/5"},
    "adaptinfer": {"target_tokens": 16, "layers": "1/3/4"},
    "sparsevlm_v2": {"target_tokens": 16, "layers": "1/3/4"},
    "todre": {"target_tokens": 8, "exit_layer": 4},
    "divprune+information_horizon": {"divprune.target_tokens": 12, "target_tokens": 9},
    "visionzip": {"target_tokens": 8},
    "vflowopt": {"target_tokens": 8},
    "catp": {"target_tokens": 10},
    "2:fastervlm:0.5;4:fastv:0.5": {},
    "1:fastervlm:0.5;3:divprune:0.5;4:random:0.5": {},
}


def split(model):
    """The decoder with its last layers on the second device, inputs moved there as accelerate's hooks do."""

    def move(module, args, kwargs):
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))

    for layer in model.model.layers[SECOND:]:
        layer.to("meta").register_forward_pre_hook(move, with_kwargs=True)
    model.model.norm.to("meta")
    return model.model


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
@pytest.mark.parametrize("name", METHODS)
def test_split_decoder(name, rows, positions):
    method = get_method(name).from_options({**METHODS[name], "positions": positions})
    inputs = Batch(random_llama()).together(rows)

    def prefill(decoder):
        with method.attach(decoder) as run, torch.no_grad():
            run.set_visual(inputs["layout"], inputs["cls"], facts=inputs["facts"])
            output = decoder(inputs_embeds=inputs["embeds"], attention_mask=inputs["mask"])
        return output.last_hidden_state, [trace.tokens_out for trace in run.traces]

    expected, tokens = prefill(random_llama().model)
    hidden, split_tokens = prefill(split(random_llama()))
    assert hidden.device.type == "meta" and hidden.shape == expected.shape
    assert split_tokens == tokens and tokens[0][-1] < tokens[0][0] or name in ("divprune", "visionzip")
