"""The engine on a CUDA device: the same survivors as on the CPU, half precision, waits, CUDA graphs, the candidates."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from llava.pruning import AutoPrune, VisualLayout, get_method
from llava.pruning.engine.graphs import PrefillGraphs
from tests.pruning.models import Batch, generate, random_llama
from tests.pruning.test_golden_decoder import CASES, GOLDEN, load_decoder
from tests.pruning.test_graphs import METHODS, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
flash = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash_attn"),
)


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


@pytest.mark.parametrize(
    ("name", "graphs"), [(name, False) for name in CASES] + [(name, True) for name in list(CASES)[:4]]
)
def test_gpu_keeps_what_the_published_code_kept(name, graphs):
    case, arrays = CASES[name], np.load(GOLDEN / "decoder_cases.npz")
    model = load_decoder(case["checkpoint"], case["layer_repeat"], "sdpa").cuda()
    embeds = torch.from_numpy(arrays[f"{name}/inputs_embeds"]).float()[None].cuda()
    layout = VisualLayout.from_spans([[(case["v_start"], case["v_start"] + case["v_num"])]])
    cls = torch.from_numpy(arrays[f"{name}/image_attns"]).cuda()
    method = AutoPrune(target_tokens=case["target_token_num"], x0=case["x0"], k0=case["k0"], gamma=case["gamma"])
    with method.attach(model, PrefillGraphs() if graphs else None) as run, torch.inference_mode():
        for _ in range(3 if graphs else 1):
            run.set_visual(layout, cls)
            model.model(inputs_embeds=embeds, use_cache=True)
    for trace in run.traces:
        assert [kept.tolist() for kept in trace.kept] == [
            [max(identity, -1) for identity in layer["ids"]] for layer in case["layers"]
        ]
    assert not graphs or run.graphs.counts["replayed"] == 1


@pytest.mark.parametrize("attention", ["sdpa", flash])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, attention):
    model = random_llama(attention).to("cuda", dtype)
    inputs = on_gpu(Batch(model).together([0, 1]), dtype)
    _, logits, traces = generate(model, AutoPrune(target_tokens=8), inputs)
    assert torch.isfinite(logits.float()).all() and traces[0].tokens_out[0] == 20


def waits(work: Any) -> list[str]:
    """What makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(one.message) for one in found if "called a synchronizing" in str(one.message)]


@pytest.mark.parametrize("graphs", [False, True])
def test_prefill_waits_for_the_device_once(graphs):
    """The schedule depends on data: one transfer of the mutual information to the host, nothing else."""
    model = random_llama().cuda()
    # A single sample: the lengths of padded rows are read from the attention mask, unless the layout has them.
    alone = on_gpu(Batch(model).alone(0))
    with AutoPrune(target_tokens=8).attach(model, PrefillGraphs() if graphs else None) as run, torch.inference_mode():

        def prefill() -> None:
            run.set_visual(alone["layout"], alone["cls"])
            model(inputs_embeds=alone["embeds"])

        for _ in range(3):  # lazy initializations; graphs are captured
            prefill()
        assert len(waits(prefill)) == 1
    assert not graphs or run.graphs.counts["replayed"] == 2


@pytest.mark.parametrize(
    ("name", "batch", "dtype"),
    [(name, 1, torch.float32) for name in METHODS]
    + [("autoprune", 3, torch.float32), ("fixed slope", 3, torch.bfloat16), ("fixed slope", 1, torch.float16)],
)
def test_replayed_prefills_are_those_that_were_run(name, batch, dtype):
    model, method = random_llama().to("cuda", dtype), METHODS[name]

    def outputs(graphs: PrefillGraphs | None) -> list[tuple[Any, Any, list[Any]]]:
        found = []
        for embeds, layout, cls in prompts(batch, 6):
            with torch.inference_mode(), method.attach(model, graphs) as run:
                run.set_visual(layout, [vector.cuda() for vector in cls] if run.needs_cls_attention else None)
                output = model(inputs_embeds=embeds.to("cuda", dtype), use_cache=True)
                found.append((output.logits[:, -1], output.past_key_values, run.traces))
        return found

    graphs = PrefillGraphs()
    wanted, got = outputs(None), outputs(graphs)
    alike = all(len({trace.slope for trace in traces}) == 1 for *_, traces in wanted)
    if batch == 1 or alike:  # else rows drop at different places, which the host has to write down
        assert graphs.counts["eager"] == 1
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for (logits, cache, traces), (own_logits, own_cache, own_traces) in zip(wanted, got, strict=True):
        assert [t.to_dict(kept=True)["kept"] for t in own_traces] == [t.to_dict(kept=True)["kept"] for t in traces]
        torch.testing.assert_close(own_logits, logits, **close)
        torch.testing.assert_close(own_cache.layers[-1].keys, cache.layers[-1].keys, **close)


def test_what_cannot_be_captured_is_told_and_runs_as_always(caplog):
    model = random_llama().cuda()
    method = get_method("sparsevlm")(target_tokens=24)
    real, counts = method.select, []

    class Reading(type(method)):
        def select(self, view, memory):
            counts.append(view.relevance_BV.sum().item() if view.relevance_BV is not None else 0)  # the host waits
            return real(view, memory)

    graphs = PrefillGraphs()
    for embeds, layout, _ in prompts(1, 4):
        with torch.inference_mode(), Reading(target_tokens=24).attach(model, graphs) as run:
            run.set_visual(layout)
            assert torch.isfinite(model(inputs_embeds=embeds.cuda()).logits).all()
    assert graphs.counts == {"eager": 4, "captured": 0, "replayed": 0}
    assert caplog.text.count("run without CUDA graphs") == 1
