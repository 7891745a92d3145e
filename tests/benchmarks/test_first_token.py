"""Time to first token: that the candidates do the same work, what runs in the tower, and that the parts add up."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks import first_token
from benchmarks.candidates import build_method
from benchmarks.first_token import DENSE, PARTS, candidates
from benchmarks.geometry import GEOMETRIES, geometry
from benchmarks.whole_model import random_image_prompt, random_llava, tower_watched, transformers_own
from llava.model.vision import encode_crops
from llava.pruning.vision import TowerValue, VisionFact
from tests.benchmarks.running import CPU, arguments, printed
from tests.eval.helpers import fails_with_one_line

SHAPE = geometry("tiny")


@pytest.fixture(scope="module")
def model():
    return random_llava(SHAPE, CPU, torch.float32, "sdpa")


@pytest.fixture(scope="module")
def prompt():
    return random_image_prompt(SHAPE, 2, CPU, torch.float32)


def test_the_towers_make_the_visual_tokens_of_their_geometries(model):
    crops = {name: divmod(shape.visual, shape.tower.patches) for name, shape in GEOMETRIES.items()}
    assert crops == {
        "llava-1.5-7b": (1, 0), "llava-1.5-13b": (1, 0), "llava-next-7b": (5, 0), "cpu-1024x24": (1, 0), "tiny": (3, 0),
        "qwen2.5-vl-3b": (1, 0), "cpu-qwen-1024x24": (1, 0),
    }  # fmt: skip
    # CLIP ViT-L/14 at 336 pixels has 303.5 million weights; less embeddings and norms 24 layers of 12.6 million.
    large = GEOMETRIES["llava-1.5-7b"].tower
    assert large.layers * (4 * large.hidden**2 + 2 * large.hidden * large.ffn) == pytest.approx(303.5e6, rel=0.01)
    tower = model.model.vision_tower
    assert len(tower.encoder.layers) == 4 and tower.embeddings.num_patches == SHAPE.tower.patches == 16


def test_the_dense_model_is_transformers_own_around_the_same_modules(model, prompt):
    own = transformers_own(model)
    assert type(own) is LlavaForConditionalGeneration
    assert own.model is model.model and own.lm_head is model.lm_head
    assert not any(parameter.is_meta for parameter in own.parameters())


@pytest.mark.parametrize("visual", [16, 48])
def test_all_dense_candidates_give_the_same_logits(model, visual):
    """One crop or three: the same tokens in the same order."""
    prompt = random_image_prompt(SHAPE, 2, CPU, torch.float32, visual)
    found = candidates(model, prompt, {})
    with torch.inference_mode():
        theirs, ours = (candidate.work()() for candidate in found.values())
    assert theirs.shape == (2, SHAPE.vocabulary)
    torch.testing.assert_close(ours, theirs)
    traces, _ = found["dense", None, "llava"].facts()
    assert [trace.visual_tokens for trace in traces] == [visual] * 2


def test_what_a_pass_does(model, prompt):
    found = candidates(model, prompt, {("autoprune", 8): build_method("autoprune", 8)})
    facts = {key: candidate.facts() for key, candidate in found.items()}
    # transformers' tower runs to its end; ours stops at the selected layer, with or without a method.
    assert [tower["tower_layers"] for _, tower in facts.values()] == [4, 3, 3]
    assert [tower["extra_rows"] for _, tower in facts.values()] == [0, 0, 1], "AutoPrune scores the CLS row alone"
    traces, _ = facts["autoprune", 8, "llava"]
    assert len(traces) == 2 and traces[0].mean_tokens("nominal") == pytest.approx(8, abs=1)
    assert not model.model.vision_tower.encoder.layers[0].mlp._forward_hooks


def test_rows_of_all_tokens_are_told_from_the_one_row(model, prompt):
    tower, pixels = model.model.vision_tower, prompt.pixels.flatten(0, 1)
    facts = {"received": VisionFact(TowerValue.RECEIVED_ATTENTION)}
    with torch.inference_mode(), tower_watched(tower) as seen:
        encode_crops(tower, pixels, -2, facts=facts)
    assert seen == {"tower_layers": 3, "extra_rows": SHAPE.tower.patches + 1}


def test_parts_are_all_of_a_pass(model, prompt, monkeypatch):
    """By a clock that ticks once per look: every tick belongs to exactly one part."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("benchmarks.parts.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    found = candidates(model, prompt, {("autoprune", 8): build_method("autoprune", 8)})
    parts = {key: candidate.seconds_by_part() for key, candidate in found.items()}
    # A part with another inside has a tick before and one after it.
    assert parts[DENSE] == {"other": 4, "vision": 2, "projector": 1, "prefill": 1, "head": 1}
    assert parts["dense", None, "llava"] == parts[DENSE]
    own = parts["autoprune", 8, "llava"]
    assert set(own) == set(PARTS) and own["projector"] == own["head"] == 1
    assert own["vision"] > 2 and own["prefill"] > 1 and own["selection"] > 2, "selections in the tower and the decoder"
    assert not vars(model.lm_head).get("forward") and not vars(model).get("encode_visual_tokens")


def test_rows(capsys, tmp_path):
    flags = ("--budgets", "16,8", "--methods", "random", "--batch-sizes", "1,2", "--save", "--results-dir", tmp_path)
    rows = printed(capsys, first_token.main, *arguments(*flags))["rows"]
    kinds = [("dense", None, "transformers"), ("dense", None, "llava"), ("random", 16, "llava"), ("random", 8, "llava")]
    assert [(r["batch"], r["method"], r["budget"], r["model"]) for r in rows] == [
        (batch, *kind) for batch in (1, 2) for kind in kinds
    ]
    for row in rows:
        assert row["p10"] <= row["ms"] <= row["p90"] and row["rounds"] == 2
        assert row["vision_percent"] == pytest.approx(100 * row["vision"] / sum(row[part] for part in PARTS))
        assert row["tower_layers"] == (4 if row["model"] == "transformers" else 3)
        assert row["processed"] == (row["budget"] or 48)
    assert len(list(tmp_path.glob("first_token--tiny-float32-sdpa-48-visual-tokens--*.json"))) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_parts_by_events(capsys):
    flags = arguments("--budgets", "8", "--device", "cuda", "--warmup", 2)
    for row in printed(capsys, first_token.main, *flags)["rows"]:
        assert row["dtype"] == "bfloat16" and all(row[part] > 0 for part in PARTS if part != "selection")
        assert (row["selection"] > 0) == (row["method"] == "autoprune")


def test_bad_input(capsys):
    for flags, named in (
        (("--budgets", "8", "--visual-tokens", "50"), ("--visual-tokens", "50", "16")),
        (("--budgets", "49"), ("--budgets", "49", "48")),
        (("--budgets", "8", "--batch-sizes", "two"), ("--batch-sizes", "two")),
    ):
        fails_with_one_line(first_token.main, arguments(*flags), capsys, *named)
