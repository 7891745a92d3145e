"""The names that LLaVA's users import and what they ask of a model; configurations read on their own."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig

from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralForCausalLM, load_pretrained_model
from llava.model.builder import _quantization_options
from llava.model.names import translate_name
from llava.utils import UserError
from tests.model.layouts import MISTRAL_FIELDS, NEXT_FIELDS, write_llava_hf
from tests.model.tiny import TEXT_FIELDS, VISION_FIELDS, tiny_model, write_original


@pytest.fixture(scope="module")
def source():
    return tiny_model(seed=5)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("names"), source)


def test_a_model_answers_llavas_questions(folder):
    model = load_pretrained_model(str(folder), None, "llava", device="cpu")[1]
    assert isinstance(model, LlavaLlamaForCausalLM) and isinstance(model.config, LlavaConfig)
    assert model.config.mm_use_im_start_end is False and model.config.mm_use_im_patch_token is False
    assert model.config.mm_vision_tower == "vision_tower" and model.config.image_aspect_ratio == "pad"
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    tower = model.get_vision_tower()
    assert tower.is_loaded and tower.num_patches == 16 and tower.hidden_size == VISION_FIELDS["hidden_size"]
    assert model.get_model() is model.model
    assert model.get_model().get_input_embeddings() is model.get_input_embeddings()
    assert issubclass(LlavaMistralForCausalLM, transformers.PreTrainedModel)


@pytest.mark.parametrize("read", [LlavaConfig.from_pretrained, AutoConfig.from_pretrained])
@pytest.mark.parametrize("fields", [{}, {"model_type": "llava_llama"}, {**NEXT_FIELDS, **MISTRAL_FIELDS}])
def test_configurations_of_the_original_layout(tmp_path, source, read, fields):
    config = read(write_original(tmp_path, source, **fields))
    assert isinstance(config, LlavaConfig)
    # Not transformers' 7B defaults.
    assert config.text_config.hidden_size == TEXT_FIELDS["hidden_size"]
    assert config.vision_config.image_size == VISION_FIELDS["image_size"]
    assert config.text_config.model_type == ("mistral" if "mistral" in fields.get("model_type", "") else "llama")
    assert config.mm_patch_merge_type == fields.get("mm_patch_merge_type", "flat")


def test_configurations_of_llava_hf(tmp_path, source):
    folder = write_llava_hf(tmp_path, source, version="1.6")
    config = LlavaConfig.from_pretrained(folder)
    assert config.mm_patch_merge_type == "spatial_unpad" and config.text_config.hidden_size == 32
    # Other users of transformers get what they always got.
    assert type(AutoConfig.from_pretrained(folder)) is transformers.LlavaNextConfig


def test_the_names_are_registered_without_a_conflict():
    # Without exist_ok this is where LLaVA's own code stops: "'llava' is already used by a Transformers config".
    for model_type in ("llava", "llava_llama", "llava_mistral"):
        registered = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
        assert issubclass(registered, LlavaConfig) and registered.model_type == model_type


def test_a_published_tower_is_known_by_name(tmp_path, source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    folder = write_original(tmp_path, source, mm_vision_tower="openai/clip-vit-large-patch14-336")
    vision = LlavaConfig.from_pretrained(folder).vision_config
    # config.json of openai/clip-vit-large-patch14-336.
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1024, 4096, 24)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 336, 14)
    assert vision.hidden_act == "quick_gelu" and vision.layer_norm_eps == 1e-5


def test_hub_names_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="liuhaotian/llava-v1.5-7b: no such folder, and .*offline.*pass the folder"):
        load_pretrained_model("liuhaotian/llava-v1.5-7b", None, "llava", device="cpu", local_files_only=True)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_settings(monkeypatch, bits):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    found = _quantization_options(bits == 8, bits == 4, torch.float16)["quantization_config"]
    assert isinstance(found, BitsAndBytesConfig)
    assert (found.load_in_8bit, found.load_in_4bit) == (bits == 8, bits == 4)
    if bits == 4:
        # LLaVA's builder: nf4, double quantization, computed in float16.
        assert found.bnb_4bit_quant_type == "nf4" and found.bnb_4bit_use_double_quant
        assert found.bnb_4bit_compute_dtype == torch.float16
    # What stays in full precision are modules of this model under these names.
    stored = (
        "lm_head.weight",
        "model.mm_projector.0.weight",
        "model.img_adapter.adapter.0.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
    )
    modules = {part for name in stored for part in translate_name(name).split(".")}
    assert set(found.llm_int8_skip_modules) <= modules


def test_quantized_loading_gets_the_settings(folder, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    asked = {}

    def fake(cls, path, **options):
        asked.update(options)
        raise ValueError("enough seen")

    monkeypatch.setattr(LlavaLlamaForCausalLM, "from_pretrained", classmethod(fake))
    with pytest.raises(UserError, match="cannot be loaded this way: enough seen"):
        load_pretrained_model(str(folder), None, "llava", load_4bit=True, device="cpu")
    assert asked["quantization_config"].load_in_4bit and asked["dtype"] == torch.float32
    assert {t.dtype for t in asked["state_dict"].values()} == {torch.float32}
