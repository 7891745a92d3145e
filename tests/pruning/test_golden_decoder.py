"""The engine with AutoPrune against runs of the published code, embeddings to decoded tokens."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava.pruning import AutoPrune, VisualLayout
from llava.pruning.methods.autoprune.curve import fit_to_budget, retention_curve
from tests.conftest import GOLDEN

CASES = json.loads((GOLDEN / "decoder_cases.json").read_text())


@lru_cache
def load_decoder(checkpoint: str, repeat: int, attention: str) -> LlamaForCausalLM:
    """The decoder of a golden checkpoint, its layers repeated ``repeat`` times."""
    flat = json.loads((GOLDEN / checkpoint / "config.json").read_text())
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
    )
    config = LlamaConfig(
        **{name: flat[name] for name in fields},
        num_hidden_layers=flat["num_hidden_layers"] * repeat,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=attention,
    )
    weights = {}
    for name, weight in load_file(GOLDEN / checkpoint / "model.safetensors").items():
        if "vision_tower" in name or "mm_projector" in name:
            continue
        head, _, tail = name.partition("layers.")
        if not tail:
            weights[name] = weight.float()
            continue
        index, _, rest = tail.partition(".")
        for copy in range(repeat):
            weights[f"{head}layers.{int(index) + copy * flat['num_hidden_layers']}.{rest}"] = weight.float()
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


# Large cases run once, on sdpa.
RUNS = [(name, "sdpa") for name in CASES] + [(name, "eager") for name, case in CASES.items() if case["v_num"] <= 256]


@pytest.mark.parametrize(("name", "attention"), RUNS)
def test_decoder_case(name, attention, golden):
    case, arrays = CASES[name], golden("decoder_cases")[1]
    model = load_decoder(case["checkpoint"], case["layer_repeat"], attention)
    embeds = torch.from_numpy(arrays[f"{name}/inputs_embeds"]).float()[None]
    start, count = case["v_start"], case["v_num"]
    method = AutoPrune(target_tokens=case["target_token_num"], x0=case["x0"], k0=case["k0"], gamma=case["gamma"])
    visual = (VisualLayout.from_spans([[(start, start + count)]]), torch.from_numpy(arrays[f"{name}/image_attns"]))
    with method.attach(model) as run, torch.no_grad():
        run.set_visual(*visual)
        full = model(inputs_embeds=embeds, use_cache=True)
        run.set_visual(*visual)
        final = model.model(inputs_embeds=embeds, use_cache=True).last_hidden_state
        run.set_visual(*visual)
        output = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )

    trace = run.traces[-1]
    assert len(run.traces) == 3
    for layer, (recorded, kept) in enumerate(zip(case["layers"], trace.kept, strict=True)):
        assert kept.tolist() == [max(identity, -1) for identity in recorded["ids"]], f"layer {layer}"
        assert full.past_key_values.get_seq_length(layer) == recorded["kv_len"]
    assert trace.tokens_out == [layer["v_token_num"] for layer in case["layers"]]
    assert trace.tokens_in == [count, *trace.tokens_out[:-1]]
    assert trace.mutual_information["layer0"] == pytest.approx(case["mi0_sum_heads_over_T"], abs=1e-5)
    assert trace.mutual_information["layer1"] == pytest.approx(case["mi1_sum_heads"], abs=1e-5)
    assert trace.slope == pytest.approx(case["dynamic_k"], abs=1e-5)
    shares = fit_to_budget(
        retention_curve(len(case["layers"]), case["dynamic_k"], case["x0"]),
        case["k_after_layer0"],
        case["target_token_num"],
    )
    assert shares.tolist() == pytest.approx(case["keep_percent"], abs=1e-6)

    assert output.sequences[0].tolist() == case["decode_ids"]
    close = {"atol": 2e-4, "rtol": 0}
    torch.testing.assert_close(
        torch.stack(output.logits, 1)[0], torch.from_numpy(arrays[f"{name}/decode_logits"]), **close
    )
    assert final.shape[1] == full.logits.shape[1] == case["layers"][-1]["seq_len_after"]
    for ours, what in ((final, "final_hidden"), (full.logits, "prefill_logits")):
        recorded = torch.from_numpy(arrays[f"{name}/{what}"])  # of long sequences only the last rows
        torch.testing.assert_close(ours[0, -len(recorded) :], recorded, **close)


@pytest.mark.parametrize("name", ["dec01", "dec10_one_text", "dec16_k_zero"])
def test_hidden_states_between_layers(name, golden):
    case, arrays = CASES[name], golden("decoder_cases")[1]
    model = load_decoder(case["checkpoint"], case["layer_repeat"], "sdpa")
    embeds = torch.from_numpy(arrays[f"{name}/inputs_embeds"]).float()[None]
    start, count = case["v_start"], case["v_num"]
    method = AutoPrune(target_tokens=case["target_token_num"], x0=case["x0"], k0=case["k0"], gamma=case["gamma"])
    with method.attach(model) as run, torch.no_grad():
        run.set_visual(
            VisualLayout.from_spans([[(start, start + count)]]), torch.from_numpy(arrays[f"{name}/image_attns"])
        )
        states = model.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    assert len(states) == len(case["layers"]) + 1
    for layer, facts in enumerate(case["layers"][:-1]):
        entering_next = states[layer + 1][0]
        assert len(entering_next) == facts["seq_len_after"]
        recorded = torch.from_numpy(arrays[f"{name}/layer{layer}_hidden_last"])
        torch.testing.assert_close(entering_next[-1], recorded, atol=2e-4, rtol=0)
