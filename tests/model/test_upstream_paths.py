"""Import paths of LLaVA's own package that scripts in the wild use: they lead somewhere, or say where to go."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava.upstream import ABSENT, MOVED
from tests.conftest import ROOT


@pytest.mark.parametrize("module", MOVED)
def test_every_name_leads_to_something(module):
    found = importlib.import_module(module)
    assert found.__all__ == list(MOVED[module])
    for name in MOVED[module]:
        assert getattr(found, name).__name__ in (name, "LlavaLlamaForCausalLM")


def test_classes_are_the_package_s_own():
    from llava.model import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model import llava_llama
    from llava.model.llava_arch import LlavaMetaForCausalLM

    assert llava_llama.LlavaLlamaForCausalLM is LlavaLlamaForCausalLM and llava_llama.LlavaConfig is LlavaConfig
    assert issubclass(LlavaLlamaForCausalLM, LlavaMetaForCausalLM)
    with pytest.raises(AttributeError, match="has no 'LlavaLlamaModel' .there are: LlavaConfig, LlavaLlama"):
        llava_llama.LlavaLlamaModel  # noqa: B018
    with pytest.raises(ImportError):
        exec("from llava.model.llava_arch import unpad_image")


@pytest.mark.parametrize("module", [*ABSENT, "llava.train.train", "llava.train.llava_trainer"])
def test_what_is_not_here_says_what_to_do(module):
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(module)
    assert str(error.value).startswith(module) or module.startswith("llava.train")
    assert "not part of autoprune-llava: " in str(error.value) and "\n" not in str(error.value)


def test_modules_that_nobody_has_are_not_found_as_ever():
    with pytest.raises(ModuleNotFoundError, match="^No module named 'llava.nonsense'$"):
        importlib.import_module("llava.nonsense")


def test_on_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "llava.serve.controller"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode and done.stderr.count("\n") == 1 and "llava.serve.cli" in done.stderr


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """Folder of a random CLIP tower: 4 layers, 2 x 2 patches."""
    folder = str(tmp_path_factory.mktemp("tower"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_a_tower_by_itself(tower, feature):
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    config = SimpleNamespace(mm_vision_tower=tower, mm_vision_select_layer=-2, mm_vision_select_feature=feature)
    built = build_vision_tower(config, delay_load=True)
    assert isinstance(built, CLIPVisionTower) and not built.is_loaded and built.num_patches == 4
    built.load_model()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = CLIPVisionModel.from_pretrained(tower)(pixels, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if feature == "patch" else expected
    torch.testing.assert_close(built(pixels), expected)
    torch.testing.assert_close(built([pixels[0]])[0], expected[:1])
    assert built.hidden_size == 16 and built.image_processor.crop_size["height"] == 28
    assert built.to(torch.float64).dtype == torch.float64 and not any(p.requires_grad for p in built.parameters())


def test_a_projector_takes_the_weights_of_a_projector_file():
    from llava.model.multimodal_projector.builder import build_vision_projector

    config = SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_hidden_size=4, hidden_size=6)
    weights = {"0.weight": torch.randn(6, 4), "0.bias": torch.randn(6)}
    weights |= {"2.weight": torch.randn(6, 6), "2.bias": torch.randn(6)}
    built = build_vision_projector(config)
    built.load_state_dict(weights)
    x = torch.randn(3, 4)
    hidden = torch.nn.functional.gelu(x @ weights["0.weight"].T + weights["0.bias"])
    torch.testing.assert_close(built(x), hidden @ weights["2.weight"].T + weights["2.bias"])
    assert list(build_vision_projector(SimpleNamespace(mm_hidden_size=4, hidden_size=6)).state_dict()) == [
        "weight",
        "bias",
    ]
    config.mm_projector_type = "identity"
    assert build_vision_projector(config)(x) is x
    config.mm_projector_type = "resampler"
    with pytest.raises(ValueError, match="unknown projector type: resampler"):
        build_vision_projector(config)


def test_the_evaluator_of_textvqa():
    from llava.eval.m4c_evaluator import EvalAIAnswerProcessor, TextVQAAccuracyEvaluator

    assert EvalAIAnswerProcessor()("The two Cats.") == "2 cats"
    people = ["stop"] * 2 + ["halt"] * 8
    # Leave-one-out over ten answers: 8 subsets with two of "stop", 2 with one.
    expected = (8 * 2 / 3 + 2 * 1 / 3) / 10
    scored = TextVQAAccuracyEvaluator().eval_pred_list(
        [{"pred_answer": "Stop", "gt_answers": people}, {"pred_answer": "halt", "gt_answers": people}]
    )
    assert scored == pytest.approx((expected + 1) / 2)
