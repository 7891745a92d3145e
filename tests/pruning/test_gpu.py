"""The engine on a CUDA device: the same survivors as on the CPU, half precision, device synchronizations."""

from __future__ import annotations

import warnings

import pytest
import torch

from llava.pruning import AutoPrune
from tests.pruning.models import Batch, generate, random_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(inputs: dict, dtype: torch.dtype = torch.float32) -> dict:
    mask = None if inputs["mask"] is None else inputs["mask"].cuda()
    return {
        "embeds": inputs["embeds"].to("cuda", dtype),
        "mask": mask,
        "layout": inputs["layout"],
        "cls": [vector.cuda() for vector in inputs["cls"]],
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gpu_keeps_what_the_cpu_keeps(attention):
    model = random_llama(attention)
    inputs = Batch(model).together([0, 1, 2])
    method = AutoPrune(target_tokens=8, x0=3.0)
    tokens, logits, traces = generate(model, method, inputs)
    gpu_tokens, gpu_logits, gpu_traces = generate(model.cuda(), method, on_gpu(inputs))
    for ours, theirs in zip(gpu_traces, traces, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))
    assert torch.equal(gpu_tokens.cpu(), tokens)
    torch.testing.assert_close(gpu_logits.cpu(), logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = random_llama().to("cuda", dtype)
    inputs = on_gpu(Batch(model).together([0, 1]), dtype)
    _, logits, traces = generate(model, AutoPrune(target_tokens=8), inputs)
    assert torch.isfinite(logits.float()).all() and traces[0].tokens_out[0] == 20


def test_prefill_waits_for_the_device_once():
    """The schedule depends on data: one transfer of the mutual information to the host, nothing else."""
    model = random_llama().cuda()
    with AutoPrune(target_tokens=8).attach(model) as run, torch.inference_mode():
        # A single sample: the lengths of padded rows are read from the attention mask, unless the layout has them.
        alone = on_gpu(Batch(model).alone(0))
        run.set_visual(alone["layout"], alone["cls"])
        model(inputs_embeds=alone["embeds"])  # first call: lazy initializations
        run.set_visual(alone["layout"], alone["cls"])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                model(inputs_embeds=alone["embeds"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1
