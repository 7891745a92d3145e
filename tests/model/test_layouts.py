"""The same weights in every published layout: bit-identical state, the same configuration, the same answers."""

from __future__ import annotations

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

from llava.mm_utils import process_images
from llava.model import configuration as checkpoint
from llava.model.builder import load_pretrained_model
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_mistral import LlavaMistralForCausalLM
from llava.pruning import get_method
from llava.utils import UserError
from tests.model.layouts import MISTRAL_FIELDS, NEXT_FIELDS, PINPOINTS, write_llava_hf
from tests.model.tiny import (
    VISION_FIELDS,
    original_names,
    tiny_images,
    tiny_model,
    write_json,
    write_original,
    write_tokenizer,
    write_tower_config,
    write_weights,
)

PROMPT = torch.tensor([[1, 5, -200, 9, 11]])
SIZES_WH = [(60, 25), (20, 70), (50, 50)]


@pytest.fixture(scope="module")
def source():
    return tiny_model(seed=12)


@pytest.fixture(scope="module")
def source_next():
    return tiny_model(seed=13, mm_patch_merge_type="spatial_unpad")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(name, *args, **kwargs):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def load(folder, **kwargs):
    return load_pretrained_model(str(folder), None, "tiny", device="cpu", **kwargs)


def pictures():
    generator = np.random.default_rng(3)
    return [Image.fromarray(generator.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in SIZES_WH]


def answers(folder):
    """Greedy ids of three pictures, preprocessed as the loaded configuration says."""
    _, model, processor, _ = load(folder)
    images = process_images(pictures(), processor, model.config)
    return model.generate(
        PROMPT.expand(3, -1), images=images, image_sizes=SIZES_WH, max_new_tokens=6, do_sample=False, eos_token_id=None
    )


def assert_same_state(model, source):
    found, expected = model.state_dict(), source.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# --- LLaVA 1.5 ---


@pytest.mark.parametrize(
    ("style", "form"), [("old", "safetensors-sharded"), ("old", "bin-sharded"), ("new", "safetensors")]
)
def test_llava_hf_1_5(tmp_path, source, style, form):
    original = write_original(tmp_path / "original", source, "bin-sharded", tower_inside=False)
    hf = write_llava_hf(tmp_path / "hf", source, style, form)
    for folder in (original, hf):
        model = load(folder)[1]
        assert type(model) is LlavaLlamaForCausalLM
        assert_same_state(model, source)
    assert torch.equal(answers(hf), answers(original))


def test_both_layouts_say_the_same_about_llava(tmp_path, source):
    one = load(write_original(tmp_path / "original", source))[1].config
    other = load(write_llava_hf(tmp_path / "hf", source))[1].config
    for name in (
        "image_aspect_ratio",
        "mm_patch_merge_type",
        "mm_projector_type",
        "mm_use_im_start_end",
        "mm_use_im_patch_token",
        "mm_vision_select_layer",
        "mm_vision_select_feature",
        "mm_hidden_size",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "anyres_resolution_rule",
    ):
        assert getattr(one, name) == getattr(other, name), name


def test_appended_rows_never_become_answers(tmp_path, source):
    # llava-hf appends 64 rows; here they would win every step.
    original = write_original(tmp_path / "original", source)
    hf = write_llava_hf(tmp_path / "hf", source, extra_rows=6)
    model = load(hf)[1]
    words = source.config.text_config.vocab_size
    assert model.config.text_config.vocab_size == words + 6
    with torch.no_grad():
        assert model(PROMPT, images=tiny_images(1)).logits[0, -1].argmax().item() >= words
    assert torch.equal(answers(hf), answers(original))


def test_a_word_behind_the_image_token_stays_a_word(tmp_path, source):
    folder = write_llava_hf(tmp_path / "hf", tiny_model(seed=1, text={"vocab_size": 96}), extra_rows=400)
    tokenizer, model, _, _ = load(write_tokenizer(folder))
    first, last = model.config.image_token_index, model.config.text_config.vocab_size
    words = {i for i in tokenizer.get_vocab().values() if first < i} - set(tokenizer.all_special_ids)
    suppressed = set(model.generation_config.suppress_tokens)
    assert words and not words & suppressed
    assert suppressed == set(range(first, last)) - words


def test_image_settings_inside_the_processors_file(tmp_path, source):
    folder = write_llava_hf(tmp_path / "hf", source, processor_file="processor_config.json")
    raw = json.loads((folder / "processor_config.json").read_text())
    raw["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    write_json(folder / "processor_config.json", raw)
    assert list(load(folder)[2].image_mean) == [0.1, 0.2, 0.3]


# --- LLaVA 1.6 ---


@pytest.mark.parametrize("style", ["old", "new"])
def test_llava_hf_1_6(tmp_path, source_next, style):
    original = write_original(tmp_path / "original", source_next, "safetensors-sharded", **NEXT_FIELDS)
    hf = write_llava_hf(tmp_path / "hf", source_next, style, version="1.6")
    for folder in (original, hf):
        model = load(folder)[1]
        assert_same_state(model, source_next)
        assert model.config.image_aspect_ratio == "anyres" and model.config.mm_patch_merge_type == "spatial_unpad"
        assert [list(pair) for pair in model.config.image_grid_pinpoints] == PINPOINTS
    assert torch.equal(answers(hf), answers(original))


@pytest.mark.parametrize("native", ["1.5", "1.6"])
def test_folders_that_transformers_itself_saved(tmp_path, source, source_next, native):
    model = source if native == "1.5" else source_next
    config = model.config
    if native == "1.6":
        config = LlavaNextConfig(
            text_config=config.text_config,
            vision_config=config.vision_config,
            image_token_index=config.image_token_index,
            image_grid_pinpoints=PINPOINTS,
        )
    theirs = (LlavaForConditionalGeneration if native == "1.5" else LlavaNextForConditionalGeneration)(config)
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert_same_state(load(tmp_path / "hf")[1], model)


def test_the_tower_of_1_6_is_in_the_weights_and_its_name_needs_no_download(tmp_path, source_next, monkeypatch):
    name = "openai/clip-vit-large-patch14-336"
    monkeypatch.setitem(checkpoint.KNOWN_TOWERS, name, VISION_FIELDS)
    folder = write_original(tmp_path, source_next, **NEXT_FIELDS, mm_vision_tower=name)
    for file in (folder / "vision_tower").iterdir():
        file.unlink()
    _, model, processor, _ = load(folder)
    assert_same_state(model, source_next)
    # The numbers of CLIP's own preprocessor_config.json.
    assert processor.crop_size["height"] == VISION_FIELDS["image_size"] and processor.resample == 3
    assert list(processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]
    assert list(processor.image_std) == [0.26862954, 0.26130258, 0.27577711]


def test_a_newline_that_nothing_uses_is_left_out(tmp_path, source):
    folder = write_original(tmp_path, source, mm_patch_merge_type="flat")
    write_weights(folder, original_names(source.state_dict()) | {"model.image_newline": torch.ones(32)}, "safetensors")
    assert_same_state(load(folder)[1], source)


@pytest.mark.parametrize(
    ("listed", "read"),
    [
        # A list that holds every shape both ways is LLaVA's own, copied: LLaVA's order decides between equals.
        ([[28, 56], [56, 28]], [[28, 56], [56, 28]]),
        # transformers means (height, width), LLaVA (width, height).
        ([[28, 56], [28, 84]], [[56, 28], [84, 28]]),
    ],
)
def test_pinpoints_are_width_first(tmp_path, source_next, listed, read):
    folder = write_llava_hf(tmp_path, source_next, version="1.6")
    raw = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", raw | {"image_grid_pinpoints": listed})
    assert load(folder)[1].config.image_grid_pinpoints == read
    write_json(folder / "config.json", raw | {"image_grid_pinpoints": "(1x1),(2x2)"})
    with pytest.raises(UserError, match="image_grid_pinpoints must be pairs of numbers"):
        load(folder)


# --- Mistral ---


def mistral_folder(folder, model, layout):
    if layout == "original":
        return write_original(folder, model, "safetensors-sharded", **NEXT_FIELDS, **MISTRAL_FIELDS)
    text = {"model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None}
    return write_llava_hf(folder, model, version="1.6", text=text)


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_mistral_is_llama_under_another_name(tmp_path, source_next, layout):
    # Without a window the two architectures compute the same: Llama with these weights is the reference.
    _, mistral, _, _ = load(mistral_folder(tmp_path / "mistral", source_next, layout))
    _, llama, _, _ = load(write_original(tmp_path / "llama", source_next, **NEXT_FIELDS, rope_theta=1000000.0))
    assert type(mistral) is LlavaMistralForCausalLM and isinstance(mistral, LlavaLlamaForCausalLM)
    assert type(mistral.get_decoder()).__name__ == "MistralModel"
    assert mistral.config.text_config.sliding_window is None
    assert mistral.config.text_config.rope_parameters["rope_theta"] == 1000000.0
    assert_same_state(mistral, source_next)
    call = {"images": tiny_images(1), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = llama(PROMPT, images=tiny_images(1)).logits
        torch.testing.assert_close(mistral(PROMPT, images=tiny_images(1)).logits, expected, atol=1e-5, rtol=1e-5)
    for name in ("autoprune", "fastv"):
        found = []
        for model in (mistral, llama):
            with get_method(name)(target_tokens=8).attach(model) as run:
                found.append((model.generate(PROMPT, **call), run.traces[-1].tokens_out))
        assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1], name


def test_a_sliding_window_stays_and_is_not_pruned(tmp_path, source):
    folder = write_original(tmp_path, source, **{**MISTRAL_FIELDS, "sliding_window": 8})
    model = load(folder)[1]
    assert model.config.text_config.sliding_window == 8
    call = {"images": tiny_images(1), "max_new_tokens": 2, "do_sample": False}
    assert model.generate(PROMPT, **call).shape == (1, 2)
    with pytest.raises(ValueError, match=r"MistralModel cannot be pruned: .*sliding_window=8"):
        get_method("fastv")(target_tokens=8).attach(model).__enter__()
    with get_method("dense")().attach(model):
        assert model.generate(PROMPT, **call).shape == (1, 2)


# --- projectors ---


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("linear", lambda: nn.Linear(24, 32)),
        ("mlp1x_gelu", lambda: nn.Sequential(nn.Linear(24, 32))),
        ("mlp2x_gelu", lambda: nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32))),
        (
            "mlp3x_gelu",
            lambda: nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)),
        ),
    ],
)
def test_projectors(tmp_path, source, kind, layers):
    torch.manual_seed(0)
    projector = layers()
    folder = write_original(tmp_path, source, mm_projector_type=kind)
    weights = {k: v for k, v in original_names(source.state_dict()).items() if "mm_projector" not in k}
    weights |= {f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()}
    write_weights(folder, weights, "safetensors")
    model = load(folder)[1]
    with torch.no_grad():
        expected = projector(source.get_vision_tower()(tiny_images(2)))
        torch.testing.assert_close(model.encode_images(tiny_images(2)), expected, atol=1e-5, rtol=1e-5)
    assert model.generate(PROMPT, images=tiny_images(1), max_new_tokens=2, do_sample=False).shape[0] == 1
    model.save_pretrained(tmp_path / "again")
    assert_same_state(load(tmp_path / "again")[1], model)


def test_the_identity_projector_needs_equal_widths(tmp_path, source):
    weights = {k: v for k, v in original_names(source.state_dict()).items() if "mm_projector" not in k}
    folder = write_original(tmp_path / "narrow", source, mm_projector_type="identity")
    write_weights(folder, weights, "safetensors")
    with pytest.raises(UserError, match="config.json: not a usable configuration .projector 'identity' needs a tower"):
        load(folder)
    wide = tiny_model(seed=3, vision={"hidden_size": 32})
    folder = write_original(tmp_path / "wide", wide, mm_projector_type="identity")
    weights = {k: v for k, v in original_names(wide.state_dict()).items() if "mm_projector" not in k}
    write_weights(folder, weights, "safetensors")
    write_tower_config(folder / "vision_tower")
    tower = json.loads((folder / "vision_tower" / "config.json").read_text())
    write_json(folder / "vision_tower" / "config.json", tower | {"hidden_size": 32})
    model = load(folder)[1]
    features = model.get_vision_tower()(tiny_images(1))
    assert torch.equal(model.encode_images(tiny_images(1)), features)
