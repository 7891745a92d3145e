"""Every broken checkpoint says what is wrong, in one line that names the file."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.utils import UserError
from tests.model.tiny import original_names, tiny_model, write_json, write_original, write_tokenizer, write_weights


@pytest.fixture(scope="module")
def source():
    return tiny_model(seed=4)


def load(folder):
    return load_pretrained_model(str(folder), None, "tiny-llava", device="cpu")


def drop(name):
    return lambda folder: (folder / name).unlink()


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def edit(name, **fields):
    def change(folder):
        data = json.loads((folder / name).read_text())
        write_json(folder / name, {k: v for k, v in (data | fields).items() if v != "absent"})

    return change


def forget_shard(index):
    def change(folder):
        data = json.loads((folder / index).read_text())
        data["weight_map"] = {k: v for k, v in data["weight_map"].items() if "00001" in v}
        write_json(folder / index, data)

    return change


BROKEN = {
    "no config": ("safetensors", True, drop("config.json"), "config.json: no such file"),
    "corrupt config": ("safetensors", True, overwrite("config.json", b'{"a": 1,\n}'), r"config.json:2: malformed JSON"),
    "binary config": ("safetensors", True, overwrite("config.json", b"\xff\xfe\x00"), "config.json: not UTF-8 text"),
    "config is a list": ("safetensors", True, overwrite("config.json", b"[]"), "must be a JSON object, found an empty"),
    "not llava": ("safetensors", True, edit("config.json", model_type="llama"), "model_type 'llama' is not a LLaVA"),
    "missing field": ("safetensors", True, edit("config.json", hidden_size="absent"), "missing field.* hidden_size"),
    "no tower named": ("safetensors", True, edit("config.json", mm_vision_tower="absent"), "field mm_vision_tower"),
    "impossible value": (
        "safetensors",
        True,
        edit("config.json", num_attention_heads=5),
        "config.json: not a usable configuration",
    ),
    "negative size": (
        "safetensors",
        True,
        edit("config.json", intermediate_size=-1),
        "config.json: not a usable configuration",
    ),
    "other projector": (
        "safetensors",
        True,
        edit("config.json", mm_projector_type="honeybee"),
        "mm_projector_type 'honeybee' is not supported",
    ),
    "other feature": (
        "safetensors",
        True,
        edit("config.json", mm_vision_select_feature="all"),
        "mm_vision_select_feature 'all'",
    ),
    "no tower folder": (
        "safetensors",
        True,
        edit("config.json", mm_vision_tower="/nowhere/clip"),
        "/nowhere/clip: no such folder; .*config.json names it as mm_vision_tower: put a copy .*/llava/clip, or write",
    ),
    "tower of another kind": (
        "safetensors",
        True,
        edit("vision_tower/config.json", model_type="siglip_vision_model"),
        "vision tower of type 'siglip_vision_model'",
    ),
    "no tower config": ("safetensors", True, drop("vision_tower/config.json"), "vision_tower/config.json: no such"),
    "no tower weights": (
        "safetensors",
        False,
        drop("vision_tower/model.safetensors"),
        "vision_tower: no weights found",
    ),
    "processor of another size": (
        "safetensors",
        True,
        edit("vision_tower/preprocessor_config.json", crop_size=30),
        "crop_size is 30 pixels but the vision tower takes 28",
    ),
    "no weights": ("safetensors", True, drop("model.safetensors"), "no weights found"),
    "truncated safetensors": ("safetensors", True, truncate("model.safetensors"), "model.safetensors: weights cannot"),
    "empty safetensors": ("safetensors", True, overwrite("model.safetensors", b""), "model.safetensors: weights"),
    "truncated bin": ("bin", True, truncate("pytorch_model.bin"), "pytorch_model.bin: weights cannot be read"),
    "garbage bin": ("bin", True, overwrite("pytorch_model.bin", b"hello"), "pytorch_model.bin: weights cannot be"),
    "missing shard": (
        "bin-sharded",
        True,
        drop("pytorch_model-00002-of-00002.bin"),
        "pytorch_model-00002-of-00002.bin: no such file, but pytorch_model.bin.index.json lists it",
    ),
    "empty index": (
        "safetensors-sharded",
        True,
        overwrite("model.safetensors.index.json", b"{}"),
        "model.safetensors.index.json: has no weight_map",
    ),
    "shard missing from the index": (
        "safetensors-sharded",
        True,
        forget_shard("model.safetensors.index.json"),
        "missing .*; the folder's index does not list model-00002-of-00002.safetensors: copy or download it again",
    ),
    "truncated shard": (
        "safetensors-sharded",
        True,
        truncate("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors: weights cannot be read",
    ),
    "corrupt header": (
        "safetensors",
        True,
        overwrite("model.safetensors", (8).to_bytes(8, "little") + b"{garbage"),
        "model.safetensors: weights cannot be read",
    ),
    "corrupt index": (
        "bin-sharded",
        True,
        overwrite("pytorch_model.bin.index.json", b"{,"),
        "pytorch_model.bin.index.json:1: malformed JSON",
    ),
    "tokenizer without its model": (
        "safetensors",
        True,
        overwrite("tokenizer_config.json", b'{"tokenizer_class": "LlamaTokenizer"}'),
        "tokenizer.model: no such file .nor tokenizer.json., but the folder has tokenizer_config.json",
    ),
    "processor without a mean": (
        "safetensors",
        True,
        edit("vision_tower/preprocessor_config.json", image_mean=None),
        "vision_tower/preprocessor_config.json: not a usable image processor .*; copy or download it again",
    ),
    "processor with one deviation": (
        "safetensors",
        True,
        edit("vision_tower/preprocessor_config.json", image_std=[0.5]),
        "vision_tower/preprocessor_config.json: not a usable image processor .*image_std must have 3 entries",
    ),
    "resampler": ("safetensors", True, edit("config.json", mm_resampler_type="perceiver"), "mm_resampler_type 'perc"),
    "corrupt tokenizer": ("safetensors", True, overwrite("tokenizer.model", b"hello"), "tokenizer cannot be read"),
    "corrupt generation config": (
        "safetensors",
        True,
        overwrite("generation_config.json", b"{"),
        "generation_config.json:1: malformed JSON",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_told_in_one_line(tmp_path, source, name):
    form, tower_inside, damage, message = BROKEN[name]
    folder = write_original(tmp_path / "llava", source, form, tower_inside)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_needs_a_package_says_which(tmp_path, source, monkeypatch):
    def refuse(*args, **kwargs):
        raise ImportError("LlamaTokenizer requires the protobuf library")

    monkeypatch.setattr("llava.model.tokenizer.LlamaTokenizer.from_pretrained", refuse)
    with pytest.raises(UserError, match="needs a package: LlamaTokenizer requires the protobuf library"):
        load(write_tokenizer(write_original(tmp_path, source)))


def test_tokenizer_settings_that_cannot_be_used_are_told_at_loading(tmp_path, source):
    folder = write_tokenizer(write_original(tmp_path, source))
    edit("tokenizer_config.json", model_max_length="long")(folder)
    with pytest.raises(UserError, match=f"{folder}/tokenizer_config.json: .*model_max_length must be a number above 0"):
        load(folder)


@pytest.mark.parametrize("tower_inside", [True, False])
def test_missing_and_unexpected_weights_are_listed(tmp_path, source, tower_inside):
    folder = write_original(tmp_path, source, tower_inside=tower_inside)
    weights = original_names(source.state_dict())
    if not tower_inside:
        weights = {k: v for k, v in weights.items() if "vision_tower" not in k}
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    weights["model.norm.weight"] = torch.zeros(7)
    write_weights(folder, weights, "safetensors")
    with pytest.raises(UserError) as caught:
        load(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "2 missing (lm_head.weight, model.language_model.layers.1.mlp.up_proj.weight)" in text
    assert "1 unexpected (model.language_model.layers.9.mlp.up_proj.weight)" in text
    assert "1 of wrong shape (model.language_model.norm.weight [7] instead of [32])" in text


def test_long_lists_of_names_are_cut(tmp_path, source):
    folder = write_original(tmp_path, source)
    weights = {k: v for k, v in original_names(source.state_dict()).items() if "model.layers." not in k}
    write_weights(folder, weights, "safetensors")
    with pytest.raises(UserError, match=r"27 missing \(.*, and 15 more\)"):
        load(folder)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path, source):
    folder = write_original(tmp_path, source)
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert load(folder)[1].config.text_config.vocab_size == source.config.text_config.vocab_size


def test_pickles_cannot_run_code(tmp_path, source):
    class Bomb:
        def __reduce__(self):
            return sys.exit, (99,)

    folder = write_original(tmp_path, source, "bin")
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": Bomb()}, file, protocol=2)
    with pytest.raises(UserError, match="pytorch_model.bin: weights cannot be read"):
        load(folder)


def test_command_lines_say_it_in_one_line_and_exit_with_2(tmp_path, source, capsys):
    from llava.eval.model_vqa_loader import main

    folder = write_original(tmp_path / "llava", source, "safetensors-sharded")
    truncate("model-00001-of-00002.safetensors")(folder)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "image": "a.png", "text": "What?"}) + "\n")
    flags = {"model-path": folder, "question-file": tmp_path / "q.jsonl", "image-folder": tmp_path}
    flags |= {"answers-file": tmp_path / "a.jsonl", "device": "cpu"}
    with pytest.raises(SystemExit) as stopped:
        main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and len(lines) == 1
    assert "model-00001-of-00002.safetensors: weights cannot be read" in lines[0] and "copy or download" in lines[0]
