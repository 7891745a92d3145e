"""What stops people in their first hour with a published checkpoint is told early, with what to do."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys

import huggingface_hub
import numpy as np
import pytest
import torch

from llava.model import machine, towers, weights
from llava.model.builder import load_pretrained_model
from llava.utils import UserError
from tests.model.test_adapters import ALPHA, lora, write_lora
from tests.model.tiny import (
    IMAGE_SIDE,
    VISION_FIELDS,
    original_names,
    tiny_model,
    write_json,
    write_original,
    write_tokenizer,
)

KNOWN = "openai/clip-vit-large-patch14-336"
LAST = "clip-vit-large-patch14-336"


@pytest.fixture(scope="module")
def source():
    return tiny_model(seed=31)


@pytest.fixture(autouse=True)
def small_clip(monkeypatch):
    monkeypatch.setitem(towers.KNOWN_TOWERS, KNOWN, VISION_FIELDS)

    def offline(*args, **kwargs):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)


def load(folder, base=None, **kwargs):
    return load_pretrained_model(str(folder), None if base is None else str(base), "llava", device="cpu", **kwargs)


def edit(path, **fields):
    write_json(path, json.loads(path.read_text()) | fields)


def assert_same(model, source):
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# --- the vision tower ---


@pytest.mark.parametrize("name", [f"/data/models/{LAST}", f"../models/{LAST}/", f"someone/{LAST}", f"a/b/{LAST}"])
def test_a_tower_that_is_inside_is_known_by_the_end_of_its_name(tmp_path, source, name, caplog):
    folder = write_original(tmp_path / "llava", source, mm_vision_tower=name)
    (folder / "vision_tower").rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert_same(load(folder)[1], source)
    assert f"{name}: no such vision tower; its weights are in the checkpoint" in caplog.text and KNOWN in caplog.text


def test_a_tower_that_is_inside_and_not_known_is_refused(tmp_path, source):
    folder = write_original(tmp_path / "llava", source, mm_vision_tower="/data/my-own-clip")
    with pytest.raises(UserError, match=f"/data/my-own-clip: no such folder.* at {folder}/my-own-clip, or write"):
        load(folder)


@pytest.mark.parametrize("place", [KNOWN, LAST])
@pytest.mark.parametrize("name", [f"/data/models/{LAST}", f"../models/{LAST}", KNOWN])
def test_the_way_that_needs_no_edit(tmp_path, source, name, place, caplog):
    folder = write_original(tmp_path / "llava", source, tower_inside=False, mm_vision_tower=name)
    (folder / "vision_tower").rename(tmp_path / "clip")
    with pytest.raises(UserError, match=rf"put a copy of the tower \(or a link to one\) at {folder}/{KNOWN}, or"):
        load(folder)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(tmp_path / "clip")
    with caplog.at_level(logging.WARNING):
        assert_same(load(folder)[1], source)
    assert ("the vision tower is taken from" in caplog.text) == (place != name)


def test_the_tower_is_missed_before_anything_is_converted(tmp_path, source, monkeypatch):
    def refuse(*args):
        raise AssertionError("converted")

    monkeypatch.setattr(weights, "convert_weights", refuse)
    monkeypatch.setattr("llava.model.reading.convert_weights", refuse)
    folder = write_original(tmp_path / "llava", source, tower_inside=False, mm_vision_tower=KNOWN)
    with pytest.raises(UserError, match="put a copy of the tower"):
        load(folder, dtype="float16")
    edit(folder / "config.json", mm_vision_tower="vision_tower")
    write_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"hello")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load(folder, dtype="float16")


def tower_lora(source, own_folder):
    """LoRA matrices on the decoder and on the tower's attention, under the names that peft writes."""
    matrices = lora(source)
    generator = torch.Generator().manual_seed(6)
    for name, weight in original_names(source.state_dict()).items():
        if "vision_tower" in name and name.endswith(("q_proj.weight", "fc1.weight")):
            rows, columns = weight.shape
            down, up = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
            matrices[name.removesuffix(".weight")] = (down, up)
    assert sum("vision_tower" in name for name in matrices) == 8
    return matrices


@pytest.mark.parametrize("own_folder", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_on_the_vision_tower(tmp_path, source, own_folder, dtype):
    matrices = tower_lora(source, own_folder)
    folder = write_lora(tmp_path / "llava-lora", source, matrices)
    base = write_original(tmp_path / "base", source, tower_inside=not own_folder)
    found = original_names(load(folder, base, dtype=dtype)[1].state_dict())
    kind = getattr(torch, dtype)
    for name, weight in original_names(source.state_dict()).items():
        expected = weight.to(kind)
        if (pair := matrices.get(name.removesuffix(".weight"))) is not None:
            down, up = pair
            expected = (expected.double() + ALPHA / len(down) * (up.double() @ down.double())).to(kind)
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=2**-8 if dtype == "bfloat16" else 1e-5)


# --- what git leaves ---

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976634558\n"


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("bin-sharded", "pytorch_model-00001-of-00002.bin"),
        ("safetensors-sharded", "model-00002-of-00002.safetensors"),
        ("safetensors", "model.safetensors"),
        ("bin", "pytorch_model.bin"),
        ("safetensors", "tokenizer.model"),
        ("safetensors", "tokenizer.json"),
        ("safetensors", "config.json"),
        ("safetensors", "vision_tower/model.safetensors"),
    ],
)
def test_lfs_pointers(tmp_path, source, form, name):
    folder = write_original(tmp_path / "llava", source, form, tower_inside="vision" not in name)
    (folder / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=f"{name}: is a Git LFS pointer, not the file itself; run `git lfs install"):
        load(folder)


# --- memory ---


def test_a_load_that_cannot_fit_says_so_first(tmp_path, source, monkeypatch):
    monkeypatch.setattr("llava.model.reading.convert_weights", lambda *args: pytest.fail("converted"))
    folder = write_original(tmp_path / "llava", source)
    needed = sum(2 * tensor.numel() for tensor in source.state_dict().values())
    monkeypatch.setattr(machine, "free_memory", lambda device: needed - 1)
    with pytest.raises(UserError, match="not enough memory: the weights need .* MB in bfloat16") as caught:
        load(folder, dtype="bfloat16")
    assert f"{needed / 1e6:.1f} MB" in str(caught.value) and "close other programs" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_load_that_fits_exactly_is_done(tmp_path, source, monkeypatch):
    needed = sum(2 * tensor.numel() for tensor in source.state_dict().values())
    monkeypatch.setattr(machine, "free_memory", lambda device: needed)
    assert load(write_original(tmp_path / "llava", source), dtype="bfloat16")[1].dtype == torch.bfloat16


def test_mapped_weights_may_be_larger_than_memory(tmp_path, source, monkeypatch, caplog):
    """In the precision they are stored in, weights stay in the file: slow, but it runs."""
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    folder = write_original(tmp_path / "llava", source)
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "read from the disk again and again" in caplog.text
    with pytest.raises(UserError, match="--dtype bfloat16"):
        machine.check_memory(2000, 2000, torch.device("cpu"), torch.float32)
    monkeypatch.setenv(machine.SKIP_VARIABLE, "1")
    assert machine.check_memory(2000, 2000, torch.device("cpu"), torch.float32) is None


def test_what_is_free_is_below_what_the_machine_has():
    import psutil

    free = machine.free_memory(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total + psutil.swap_memory().total


@pytest.mark.parametrize(("limit", "room"), [("1000000", 1000000 - 400000 + 100000), ("max", None), (str(2**63), None)])
def test_limits_of_control_groups(tmp_path, limit, room):
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert machine._group_room(tmp_path, "memory.max", "memory.current", "inactive_file") == room
    assert machine._group_room(tmp_path / "absent", "memory.max", "memory.current", "inactive_file") is None


# --- half precision on a CPU ---


@pytest.mark.parametrize(
    ("features", "dtype", "slow"),
    [
        ({"avx2", "avx512f"}, "bfloat16", True),
        ({"avx2", "avx512f"}, "float16", True),
        ({"avx2", "avx512f"}, "float32", False),
        ({"avx512_bf16"}, "bfloat16", False),
        ({"amx_bf16", "amx_tile"}, "float16", False),
        (None, "float16", False),
    ],
)
def test_slow_half_precision_is_said(tmp_path, source, monkeypatch, caplog, features, dtype, slow):
    monkeypatch.setattr(machine, "cpu_features", lambda: features)
    with caplog.at_level(logging.WARNING):
        load(write_original(tmp_path / "llava", source), dtype=dtype)
    assert (f"{dtype} on this CPU is several times slower than float32" in caplog.text) == slow


# --- progress ---


def test_progress_while_converting(tmp_path, source, monkeypatch, capsys):
    folder = write_original(tmp_path / "llava", source)
    load(folder, dtype="bfloat16")
    assert "converting" not in capsys.readouterr().err, "not for small ones"
    monkeypatch.setattr(weights, "PROGRESS_BYTES", 1)
    load(folder, dtype="bfloat16")
    printed = capsys.readouterr().err
    assert "converting to bfloat16" in printed and "100%" in printed
    load(folder)
    assert "converting" not in capsys.readouterr().err, "nothing to convert"


@pytest.mark.parametrize("legacy", [True, False])
def test_conversion_reads_old_pickles_once(tmp_path, source, monkeypatch, legacy):
    monkeypatch.setattr(weights, "PIECE_BYTES", 1)
    folder = write_original(tmp_path / "llava", source)
    (folder / "model.safetensors").unlink()
    tensors = original_names(source.state_dict())
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    reads, read = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs))
    model = load(folder, dtype="bfloat16")[1]
    for name, tensor in original_names(model.state_dict()).items():
        assert torch.equal(tensor, tensors[name].bfloat16()), name
    assert (len(reads) < 5) == legacy


# --- pickles ---


class Bomb:
    def __reduce__(self):
        return sys.exit, (99,)


class Other:
    def __reduce__(self):
        return os.getpid, ()


@pytest.mark.parametrize("bomb", [Bomb(), Other(), np.zeros(3), logging.Formatter()])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_refused_pickle_is_not_called_damaged(tmp_path, source, bomb, zipped):
    folder = write_original(tmp_path / "llava", source, "bin")
    if zipped:
        torch.save({"lm_head.weight": bomb}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": bomb}, protocol=2))
    with pytest.raises(UserError, match=r"pytorch_model.bin: .*would run code \([\w.]+\), so it is refused") as caught:
        load(folder)
    assert "damaged" not in str(caught.value) and "\n" not in str(caught.value)


def odd_tensors(source):
    big = torch.zeros(1).expand(10**6, 10**6)
    head = source.lm_head.weight.data
    return {
        "sparse": (head.to_sparse(), "is sparse"),
        "integers": (head.to(torch.int8), "1 no floating point numbers .lm_head.weight int8"),
        "expanded": (big, "1 of wrong shape .lm_head.weight .1000000, 1000000. instead of"),
        "meta": (torch.empty(96, 32, device="meta"), "is sparse, quantized or empty|weights cannot be read"),
        "scalar": (torch.tensor(1.0), "1 of wrong shape"),
        "complex": (head.to(torch.complex64), "1 no floating point numbers"),
    }


@pytest.mark.parametrize("kind", ["sparse", "integers", "expanded", "meta", "scalar", "complex"])
def test_tensors_that_are_none(tmp_path, source, kind):
    tensor, message = odd_tensors(source)[kind]
    folder = write_original(tmp_path / "llava", source, "bin")
    torch.save(original_names(source.state_dict()) | {"lm_head.weight": tensor}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        load(folder, dtype="bfloat16")


# --- values that no weights bear out ---

HUGE = 10**12
BOMBS = {
    "num_hidden_layers": [10**9, 900, 0, -3, "3", 3.0, True, [3], 10**40],
    "vocab_size": [HUGE, 10**6, 0, "96"],
    "hidden_size": [HUGE, 10**6, -1, 0, {"a": 1}],
    "intermediate_size": [HUGE, 10**7],
    "num_attention_heads": [HUGE, 0, 5],
    "num_key_value_heads": [HUGE, 0, 3],
    "head_dim": [HUGE, 10**6, -8],
    "max_position_embeddings": [HUGE, "long", 0],
    "rms_norm_eps": ["x", -1, float("nan"), [1]],
    "rope_theta": ["x", 0, float("inf")],
    "rope_scaling": ["linear", [1], {"type": "linear", "factor": "x"}, {"type": 5}, {"rope_type": "nothing"}],
    "hidden_act": [5, "nothing"],
    "eos_token_id": ["</s>", {"a": 1}, [[2]], 10**9],
    "pad_token_id": [10**6, "x"],
    "mm_projector_type": ["mlp999x_gelu", f"mlp{'9' * 5000}x_gelu", 5, ["mlp2x_gelu"], "mlp0x_gelu"],
    "mm_vision_select_layer": [99, -99, "x", 1.5, [1]],
    "mm_vision_select_feature": [5, ["patch"], "everything"],
    "mm_vision_tower": [5, ["x"], "", "a\0b", "x" * 5000],
    "mm_use_im_start_end": ["yes", 2],
    "mm_patch_merge_type": ["diagonal", 5],
    "image_aspect_ratio": [5, ["pad"]],
    "tokenizer_model_max_length": [-1, 0, "2048", 1.5, True],
    "max_sequence_length": ["long", -5],
    "model_type": [5, ["llava"], {"a": 1}, None],
    "attention_dropout": [2, "x"],
    "tie_word_embeddings": ["x", 7],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BOMBS.items() for value in values])
def test_fields_of_config_json(tmp_path, source, field, value):
    folder = write_original(tmp_path / "llava", source)
    raw = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        load(folder)
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text and "\0" not in text and len(text) < 3000


@pytest.mark.parametrize(
    "pinpoints",
    [[[10**9, 10**9]], [], None, "x", "[" * 5000, [[28]], [[28, -28]], [["a", "b"]], 5, [[28, 56]] * 20_000, "(1x1)"],
)
def test_resolutions_of_tiles(tmp_path, source, pinpoints):
    folder = write_original(tmp_path / "llava", source, image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    with pytest.raises(UserError, match="config.json: .*image_grid_pinpoints") as caught:
        load(folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 900),
        ("image_size", 10**9),
        ("image_size", 99_999),
        ("patch_size", 10**9),
        ("patch_size", 0),
        ("hidden_size", "x"),
        ("num_attention_heads", 5),
        ("hidden_act", "nothing"),
    ],
)
@pytest.mark.parametrize("whole_clip", [True, False])
def test_fields_of_the_towers_config(tmp_path, source, field, value, whole_clip):
    folder = write_original(tmp_path / "llava", source)
    path = folder / "vision_tower" / "config.json"
    raw = json.loads(path.read_text()) | {field: value}
    write_json(path, {"model_type": "clip", "vision_config": raw} if whole_clip else raw)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_size": 100_000}, "crop_size is 100000 pixels but the vision tower takes 28"),
        ({"crop_size": {"height": IMAGE_SIDE, "width": 90_000}}, "crop_size is 90000 x 28 pixels"),
        ({"size": 100_000}, "size is 100000 pixels, more than 4 times the 28"),
        ({"size": {"shortest_edge": 99_999}}, "size is 99999 pixels"),
        ({"size": 10**12}, "size must be a whole number from 1 to 100000"),
        ({"image_mean": "gray"}, "image_mean must be a list"),
        ({"image_mean": [1, 2, float("nan")]}, "image_mean.* must be a number"),
        ({"image_std": [0.5, 0.5]}, "image_std must have 3 entries, found 2"),
        ({"rescale_factor": "x"}, "rescale_factor must be a number"),
        ({"resample": 77}, "resample must be a whole number from 0 to 5"),
        ({"do_resize": "maybe"}, "do_resize must be true or false"),
    ],
)
def test_fields_of_the_image_processor(tmp_path, source, fields, message):
    folder = write_original(tmp_path / "llava", source)
    edit(folder / "vision_tower" / "preprocessor_config.json", **fields)
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{message}"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj must be a number"),
        ({"alpha_pattern": {"(": 1}}, "'[(]' is no regular expression"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "is too complicated"),
        ({"peft_type": 5}, "peft_type must be a string"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a string"),
        ({"use_rslora": "x"}, "use_rslora must be true or false"),
    ],
)
def test_fields_of_adapter_config(tmp_path, source, fields, message):
    folder = write_lora(tmp_path / "lora", source, lora(source))
    edit(folder / "adapter_config.json", **fields)
    with pytest.raises(UserError, match=f"adapter_config.json: .*{message}"):
        load(folder, write_original(tmp_path / "base", source))


def test_lora_of_rank_zero(tmp_path, source):
    folder = write_lora(tmp_path / "lora", source, lora(source, rank=0))
    with pytest.raises(UserError, match="do not fit the base's weight"):
        load(folder, write_original(tmp_path / "base", source))


@pytest.mark.parametrize("path", ["", "a\0b", "~nobody-here/x", "x" * 5000, "\udc80/x", "/dev/null", "a/\udcff"])
def test_paths_that_cannot_be(path, source):
    with pytest.raises(UserError):
        load_pretrained_model(path, None, "llava", device="cpu")
