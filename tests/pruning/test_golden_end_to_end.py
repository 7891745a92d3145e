"""Pixels to decoded tokens through the loader and the LLaVA model, against runs of the published code."""

from __future__ import annotations

import json

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.pruning import AutoPrune
from tests.conftest import GOLDEN

CASES = json.loads((GOLDEN / "e2e_cases.json").read_text())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*tokenizer.*")
def test_end_to_end_case(name, golden):
    case, arrays = CASES[name], golden("e2e_cases")[1]
    _, model, _, _ = load_pretrained_model(str(GOLDEN / case["checkpoint"]), None, "llava", device="cpu")
    if case["anyres"]:
        model.config.image_aspect_ratio = "anyres"
        model.config.mm_patch_merge_type = "spatial"
    size = case["image_size_wh"]
    call = {
        "images": torch.from_numpy(arrays[f"{name}/pixel_values"]).float(),
        "image_sizes": None if size is None else [tuple(size)],
    }
    if case["has_mask"]:
        call["image_masks"] = [torch.from_numpy(arrays[f"{name}/mask"]).bool()]
    method = AutoPrune(target_tokens=case["target_token_num"], x0=case["x0"], k0=case["k0"], gamma=case["gamma"])
    with method.attach(model) as run:
        output = model.generate(
            torch.from_numpy(arrays[f"{name}/input_ids"]),
            **call,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    trace = run.traces[0]
    for recorded, kept in zip(case["layers"], trace.kept, strict=True):
        assert kept.tolist() == [max(identity, -1) for identity in recorded["ids"]]
    assert trace.visual_tokens == case["returned_v_token_num"] == case["v_num"]
    assert trace.mutual_information["layer0"] == pytest.approx(case["mi0_sum_heads_over_T"], abs=1e-5)
    assert trace.mutual_information["layer1"] == pytest.approx(case["mi1_sum_heads"], abs=1e-5)
    assert trace.slope == pytest.approx(case["dynamic_k"], abs=1e-5)
    assert output.sequences[0].tolist() == case["decode_ids"]
    torch.testing.assert_close(
        torch.stack(output.logits, 1)[0], torch.from_numpy(arrays[f"{name}/decode_logits"]), atol=2e-4, rtol=0
    )
