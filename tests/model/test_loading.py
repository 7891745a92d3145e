"""Checkpoints in every supported form load completely, and every broken one says what is wrong in one line."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, LlavaForConditionalGeneration

from llava.model.builder import load_pretrained_model
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.locate import is_hub_name
from llava.model.names import translate_name
from llava.utils import UserError
from tests.conftest import ROOT
from tests.model.tiny import (
    IMAGE_SIDE,
    TEXT_FIELDS,
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


@pytest.fixture(scope="module")
def source():
    return tiny_model(seed=4)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A local path must never ask the hub."""

    def refuse(name, *args, **kwargs):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def load(folder, **kwargs):
    return load_pretrained_model(str(folder), None, "tiny-llava", device="cpu", **kwargs)


def assert_same(model, source):
    ours, theirs = model.state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("tower_inside", [True, False], ids=["tower inside", "tower folder"])
@pytest.mark.parametrize("form", ["safetensors", "safetensors-sharded", "bin", "bin-sharded"])
def test_original_layout(tmp_path, source, form, tower_inside):
    folder = write_original(tmp_path / "llava", source, form, tower_inside)
    tokenizer, model, image_processor, context_len = load(folder)
    assert_same(model, source)
    assert tokenizer is None and context_len == 2048 and not model.training
    assert image_processor.crop_size["height"] == IMAGE_SIDE
    assert model.get_vision_tower().image_processor is image_processor
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    ids = torch.tensor([[1, -200, 5, 6]])
    with torch.no_grad():
        expected = source(ids, images=tiny_images(1)).logits
        torch.testing.assert_close(model(ids, images=tiny_images(1)).logits, expected, atol=1e-5, rtol=1e-5)


def test_flat_config_is_not_replaced_by_the_7b_defaults(tmp_path, source):
    # AutoConfig reads this file without an error and returns a decoder of 32 layers of width 4096.
    config = load(write_original(tmp_path, source))[1].config
    for name, value in TEXT_FIELDS.items():
        if name != "rope_theta":
            assert getattr(config.text_config, name) == value, name
    assert config.text_config.rope_parameters["rope_theta"] == TEXT_FIELDS["rope_theta"]
    for name, value in VISION_FIELDS.items():
        assert getattr(config.vision_config, name) == value, name
    assert config.vision_feature_layer == -2 and config.vision_feature_select_strategy == "default"
    assert config.image_aspect_ratio == "pad" and config.mm_use_im_start_end is False


def test_config_fields_reach_the_model(tmp_path, source):
    fields = {
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -1,
        "tokenizer_model_max_length": 77,
        "max_sequence_length": 123,
        "image_grid_pinpoints": [[28, 56]],
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    _, model, _, context_len = load(write_original(tmp_path, source, **fields))
    assert context_len == 123 and model.config.tokenizer_model_max_length == 77
    assert model.get_vision_tower().select_feature == "cls_patch" and model.get_vision_tower().select_layer == -1
    assert model.config.image_grid_pinpoints == [[28, 56]]
    assert model.config.text_config.rope_parameters["rope_type"] == "linear"


def test_a_tower_folder_may_be_a_whole_clip_model_anywhere(tmp_path, source):
    folder = write_original(tmp_path / "llava", source, tower_inside=False, mm_vision_tower=str(tmp_path / "clip"))
    (folder / "vision_tower").rename(tmp_path / "clip")
    write_json(tmp_path / "clip" / "config.json", {"model_type": "clip", "vision_config": VISION_FIELDS})
    assert_same(load(folder)[1], source)


def test_a_tower_saved_by_transformers(tmp_path, source):
    folder = write_original(tmp_path / "llava", source, tower_inside=False)
    source.model.vision_tower.save_pretrained(folder / "vision_tower")
    assert_same(load(folder)[1], source)


def test_a_whole_clip_model_saved_by_transformers(tmp_path, source):
    folder = write_original(tmp_path / "llava", source, tower_inside=False)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION_FIELDS).to_dict()))
    clip.vision_model.load_state_dict(source.model.vision_tower.state_dict())
    clip.save_pretrained(folder / "vision_tower")
    assert_same(load(folder)[1], source)


def test_llava_hf_layout_and_our_own_save(tmp_path, source):
    native = LlavaForConditionalGeneration(source.config)
    native.load_state_dict(source.state_dict())
    native.save_pretrained(tmp_path / "hf")
    _, model, processor, _ = load(tmp_path / "hf")
    assert_same(model, source)
    assert processor.crop_size["height"] == IMAGE_SIDE and model.config.mm_use_im_start_end is False
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again")[1], source)


def test_our_own_save_keeps_llavas_fields(tmp_path, source):
    folder = write_original(tmp_path / "llava", source, tokenizer_model_max_length=50, image_grid_pinpoints=[[28, 56]])
    load(folder)[1].save_pretrained(tmp_path / "again")
    config = load(tmp_path / "again")[1].config
    assert config.image_aspect_ratio == "pad" and config.tokenizer_model_max_length == 50
    assert config.image_grid_pinpoints == [[28, 56]] and config.text_config.pad_token_id == 0


def test_from_pretrained_reads_the_original_layout(tmp_path, source):
    # Transformers' own would skip the renames for a class it does not know and leave lm_head random.
    folder = write_original(tmp_path, source)
    model = LlavaLlamaForCausalLM.from_pretrained(folder, device="cpu", dtype=torch.float32, low_cpu_mem_usage=True)
    assert_same(model, source)
    assert model.name_or_path == str(folder)


def test_the_newline_token_is_loaded_where_the_merge_type_uses_it(tmp_path):
    source = tiny_model(mm_patch_merge_type="spatial_unpad")
    model = load(write_original(tmp_path, source, mm_patch_merge_type="spatial_unpad"))[1]
    assert_same(model, source)
    assert model.model.image_newline.std() > 0 and model.config.mm_patch_merge_type == "spatial_unpad"


@pytest.mark.parametrize(
    ("asked", "file_rule", "merge_type", "rule"),
    [
        (None, None, "spatial_unpad", "effective"),
        ("spatial", None, "spatial", "fill"),
        ("flat", None, "flat", "effective"),
        ("spatial", "effective", "spatial", "effective"),
    ],
)
def test_merge_type_is_an_option_of_loading(tmp_path, asked, file_rule, merge_type, rule):
    source = tiny_model(mm_patch_merge_type="spatial_unpad")
    fields = {"mm_patch_merge_type": "spatial_unpad"} | ({"anyres_resolution_rule": file_rule} if file_rule else {})
    model = load(write_original(tmp_path, source, **fields), mm_patch_merge_type=asked)[1]
    assert (model.merge_type(), model.config.anyres_resolution_rule) == (merge_type, rule)
    assert model.config.mm_patch_merge_type == merge_type


def test_merge_types_that_cannot_be_are_refused(tmp_path, source):
    folder = write_original(tmp_path, source)
    with pytest.raises(UserError, match="'spatial_unpad' needs a checkpoint with image_newline"):
        load(folder, mm_patch_merge_type="spatial_unpad")
    with pytest.raises(UserError, match="'diagonal': expected one of flat, spatial, spatial_unpad"):
        load(folder, mm_patch_merge_type="diagonal")


def test_computed_buffers_and_an_unused_newline_token_are_left_out(tmp_path, source):
    folder = write_original(tmp_path, source)
    weights = original_names(source.state_dict())
    weights["model.image_newline"] = torch.ones(32)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write_weights(folder, weights, "safetensors")
    assert_same(load(folder)[1], source)


def test_tied_embeddings_need_no_head(tmp_path):
    source = tiny_model(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    source.tie_weights()
    folder = write_original(tmp_path, source, tie_word_embeddings=True)
    weights = original_names(source.state_dict())
    del weights["lm_head.weight"]
    write_weights(folder, weights, "safetensors")
    model = load(folder)[1]
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_names_of_the_real_checkpoints():
    # As listed by liuhaotian/llava-v1.5-7b, liuhaotian/llava-v1.6-vicuna-7b and llava-hf/llava-1.5-7b-hf.
    for theirs, ours in {
        "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.31.mlp.up_proj.weight": "model.language_model.layers.31.mlp.up_proj.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
        "language_model.model.layers.0.self_attn.q_proj.weight": (
            "model.language_model.layers.0.self_attn.q_proj.weight"
        ),
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.post_layernorm.weight": "model.vision_tower.post_layernorm.weight",
        "multi_modal_projector.linear_1.weight": "model.multi_modal_projector.linear_1.weight",
        "model.image_newline": "model.image_newline",
        "image_newline": "model.image_newline",
        "model.mm_projector.4.weight": "model.multi_modal_projector.linear_3.weight",
        "model.mm_projector.weight": "model.multi_modal_projector.linear_1.weight",
    }.items():
        assert translate_name(theirs) == ours
        assert translate_name(ours) == ours


# --- options ---


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "bf16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
    ],
)
def test_dtype(tmp_path, source, options, dtype):
    folder = write_original(tmp_path, source)
    model = load(folder, **options)[1]
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        ids = torch.tensor([[1, -200, 5]])
        out = model.generate(ids, images=tiny_images(1), max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 2)


def test_half_precision_storage_loads_as_float32_exactly(tmp_path, source):
    folder = write_original(tmp_path, source)
    halves = {name: t.half() for name, t in original_names(source.state_dict()).items()}
    write_weights(folder, halves, "safetensors")
    model = load(folder)[1]
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, halves["lm_head.weight"].float())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, None])
def test_device_maps_without_an_accelerator(tmp_path, source, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    model = load_pretrained_model(str(write_original(tmp_path, source)), None, "tiny", device_map=device_map)[1]
    assert model.device.type == "cpu" and model.dtype == torch.float32
    # No hooks between the modules where there is nothing to distribute.
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


def test_half_precision_is_the_default_of_accelerators(monkeypatch):
    from llava.model.builder import _placement_options

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _placement_options("auto", None, None, None)["dtype"] == torch.float16
    assert _placement_options("auto", "cuda:0", None, None)["dtype"] == torch.float16
    assert _placement_options("cpu", None, None, None)["dtype"] == torch.float32
    assert _placement_options("auto", "cpu", None, None) == {
        "device_map": {"": torch.device("cpu")},
        "dtype": torch.float32,
    }


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation(tmp_path, source, implementation):
    model = load(write_original(tmp_path, source), attn_implementation=implementation)[1]
    assert model.get_decoder().config._attn_implementation == implementation
    assert model.model.vision_tower.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"dtypo": "float16"}, "unknown option.*dtypo; valid ones: dtype, torch_dtype"),
        ({"attn_implementation": "fastest"}, "cannot be loaded this way"),
        ({"load_8bit": True, "load_4bit": True}, "choose one"),
    ],
)
def test_bad_options(tmp_path, source, options, message):
    with pytest.raises(UserError, match=message):
        load(write_original(tmp_path, source), **options)


def test_bad_devices(tmp_path):
    with pytest.raises(UserError, match="device 'toaster'"):
        load_pretrained_model(str(tmp_path), None, "x", device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="'cuda' is not available here"):
            load_pretrained_model(str(tmp_path), None, "x", device="cuda")


def test_quantization_without_bitsandbytes_says_what_to_install(tmp_path, source, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    for option in ("load_8bit", "load_4bit"):
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            load(write_original(tmp_path, source), **{option: True})


def test_generation_settings(tmp_path, source):
    folder = write_original(tmp_path, source)
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [2, 7], "temperature": 0.9, "top_p": 0.6, "max_length": 4096},
    )
    generation = load(folder)[1].generation_config
    assert generation.eos_token_id == [2, 7] and generation.bos_token_id == 1 and generation.pad_token_id == 0
    # The file's sampling settings must not apply behind the caller's back.
    assert generation.top_p in (None, 1.0) and generation.temperature in (None, 1.0)
    assert generation.max_length in (None, 20)


def test_tokenizer_comes_with_the_checkpoint(tmp_path, source):
    folder = write_tokenizer(write_original(tmp_path, source))
    tokenizer = load(folder)[0]
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2 and tokenizer.pad_token == "<unk>"


def test_a_missing_tokenizer_is_a_warning(tmp_path, source, caplog):
    with caplog.at_level(logging.WARNING):
        assert load(write_original(tmp_path, source))[0] is None
    assert "no tokenizer" in caplog.text and str(tmp_path) in caplog.text


def test_tokens_without_rows_in_the_table_are_refused(tmp_path, source):
    folder = write_tokenizer(write_original(tmp_path, source, mm_use_im_start_end=True))
    with pytest.raises(UserError, match="<im_start>, <im_end> but the embedding table has no rows"):
        load(folder)


# --- paths and hub names ---


@pytest.mark.parametrize(
    "path",
    ["/nowhere/llava-v1.5-7b", "./absent", "../absent", "~/no/llava", "llava-v1.5-7b", "a/b/c", "tests/absent"],
)
def test_local_paths_never_reach_the_hub(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: no such folder")


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; the checkpoint must be the folder"):
        load(tmp_path / "model.safetensors")


def test_what_looks_like_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("liuhaotian/llava-v1.5-7b") and is_hub_name("openai/clip-vit-large-patch14-336")
    (tmp_path / "liuhaotian").mkdir()
    assert not is_hub_name("liuhaotian/llava-v1.5-7b")
    for name in ("/a/b", "./a", "../a/b", "~/a", "a", "a/b/c", "a/b/", "a\\b", "a b/c", "models/"):
        assert not is_hub_name(name), name


def test_hub_names_are_fetched_and_failures_told(tmp_path, source, monkeypatch):
    folder = write_original(tmp_path / "llava", source, "bin", False, mm_vision_tower="openai/tower")
    asked = []

    def fake(name, allow_patterns, local_files_only):
        asked.append((name, tuple(allow_patterns), local_files_only))
        if name == "openai/tower":
            return str(folder / "vision_tower")
        if name == "liuhaotian/llava-v1.5-7b":
            return str(folder)
        raise OSError("Repository not found. See the logs.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert_same(load("liuhaotian/llava-v1.5-7b", local_files_only=True)[1], source)
    assert {a[0] for a in asked} == {"liuhaotian/llava-v1.5-7b", "openai/tower"} and all(a[2] for a in asked)
    with pytest.raises(UserError, match="nobody/nothing: no such folder, and .* Repository not found"):
        load("nobody/nothing")


def test_tower_weights_inside_need_only_the_towers_small_files(tmp_path, source, monkeypatch):
    folder = write_original(tmp_path / "llava", source, mm_vision_tower="openai/tower")
    (folder / "vision_tower").rename(tmp_path / "clip")
    write_tower_config(tmp_path / "clip")
    asked = []

    def fake(name, allow_patterns, local_files_only):
        asked.append(allow_patterns)
        return str(tmp_path / "clip")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert_same(load(folder)[1], source)
    assert len(asked) == 1 and not any("safetensors" in p or "bin" in p for p in asked[0])


# --- memory ---


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_of_the_right_precision_are_mapped_not_copied(tmp_path, source, form):
    folder = write_original(tmp_path, source, form)
    parameter = load(folder)[1].lm_head.weight
    # A mapped tensor shares the storage of its whole file; a copy has one of its own size.
    mapped = any(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert mapped and parameter.dtype == torch.float32


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_conversion_lets_go_of_the_file(tmp_path, source, form, monkeypatch):
    # Pieces of one tensor each: the result must not depend on where they are cut.
    monkeypatch.setattr("llava.model.weights.PIECE_BYTES", 1)
    folder = write_original(tmp_path, source, form)
    model = load(folder, dtype="bfloat16")[1]
    assert not any(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name
