"""Hub names: from every kind of published repository exactly the files are fetched that loading needs.

The repositories have the file lists of the published ones, with small random contents. The hub is an imitation of
`huggingface_hub.snapshot_download` that keeps a cache as the hub's client does: a snapshot of links to blobs.
"""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

from llava.model import downloads, towers
from llava.model.builder import load_pretrained_model
from llava.model.locate import locate
from llava.utils import UserError
from tests.conftest import ROOT
from tests.model.layouts import NEXT_FIELDS
from tests.model.tiny import (
    LLAVA_FIELDS,
    TEXT_FIELDS,
    VISION_FIELDS,
    original_names,
    tiny_model,
    write_json,
    write_tokenizer,
    write_tower_config,
)

CLIP = "openai/clip-vit-large-patch14-336"
# What lies beside the weights in the original repositories. Sizes do not matter, names do.
BESIDE = (".gitattributes", "README.md")
CLIP_FILES = (*BESIDE, "merges.txt", "tf_model.h5", "tokenizer.json", "tokenizer_config.json", "vocab.json")


def shard_files(kind, count):
    stem, suffix = {"bin": ("pytorch_model", "bin"), "safetensors": ("model", "safetensors")}[kind]
    return [f"{stem}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)], f"{stem}.{suffix}.index.json"


def write_shards(folder, tensors, kind, count):
    from safetensors.torch import save_file

    files, index = shard_files(kind, count)
    weight_map = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensors[name] for name, place in weight_map.items() if place == file}
        (save_file if kind == "safetensors" else torch.save)(part, folder / file)
    write_json(folder / index, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def extras(folder, *names):
    for name in (*BESIDE, *names):
        (folder / name).write_bytes(b"not needed")


class Hub:
    """`repositories/<owner>/<name>/` as the server has them, `cache/` as the client keeps them."""

    def __init__(self, root):
        self.root, self.fetched, self.local_only = root, {}, []

    def repository(self, name):
        folder = self.root / "repositories" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def snapshot_download(self, repo_id, *, allow_patterns=None, local_files_only=False):
        self.local_only.append(local_files_only)
        source = self.root / "repositories" / repo_id
        if not source.is_dir():
            raise OSError("Repository not found. See the logs.")
        cache = self.root / "cache" / f"models--{repo_id.replace('/', '--')}"
        snapshot = cache / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True, exist_ok=True)
        (cache / "blobs").mkdir(exist_ok=True)
        for file in source.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                self.fetched.setdefault(repo_id, set()).add(file.name)
                if not (snapshot / file.name).exists():
                    blob = cache / "blobs" / f"{abs(hash(file.name)):x}"
                    blob.write_bytes(file.read_bytes())
                    (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        return str(snapshot)


@pytest.fixture(scope="module")
def source():
    return tiny_model(seed=21)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(towers.KNOWN_TOWERS, CLIP, VISION_FIELDS)
    return hub


def write_clip(hub, source, with_safetensors=False):
    from safetensors.torch import save_file

    folder = hub.repository(CLIP)
    tower = {f"vision_model.{k}": v.contiguous() for k, v in source.model.vision_tower.state_dict().items()}
    tower["text_model.final_layer_norm.weight"] = torch.ones(4)
    torch.save(tower, folder / "pytorch_model.bin")
    if with_safetensors:
        save_file(tower, folder / "model.safetensors")
    write_tower_config(folder)
    for name in CLIP_FILES:
        (folder / name).write_bytes(b"{}")


def split(source):
    tensors = original_names(source.state_dict())
    tower = {k: v for k, v in tensors.items() if "vision_tower" in k}
    projector = {k: v for k, v in tensors.items() if "mm_projector" in k}
    return {k: v for k, v in tensors.items() if k not in tower}, tower, projector


def write_config(folder, **fields):
    config = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], **TEXT_FIELDS, **LLAVA_FIELDS}
    write_json(folder / "config.json", config | {"mm_vision_tower": CLIP} | fields)
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})


def write_llava_1_5(hub, source, name="liuhaotian/llava-v1.5-7b", shards=2):
    folder, (own, _, projector) = hub.repository(name), split(source)
    write_shards(folder, own, "bin", shards)
    torch.save(projector, folder / "mm_projector.bin")
    write_config(folder)
    write_tokenizer(folder)
    write_json(folder / "special_tokens_map.json", {"unk_token": "<unk>"})
    extras(folder)
    return name


def write_vicuna(hub, source, kind="bin"):
    folder, (own, _, projector) = hub.repository("lmsys/vicuna-7b-v1.5"), split(source)
    write_shards(folder, {k: v for k, v in own.items() if k not in projector}, kind, 2)
    write_json(folder / "config.json", {"model_type": "llama", **TEXT_FIELDS})
    write_tokenizer(folder)
    extras(folder)
    return "lmsys/vicuna-7b-v1.5"


def assert_same(model, tensors):
    found = original_names(model.state_dict())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def load(name, base=None, **kwargs):
    return load_pretrained_model(name, base, "llava", device="cpu", **kwargs)


@pytest.mark.parametrize("shards", [2, 3], ids=["7B", "13B"])
@pytest.mark.parametrize("clip_has_safetensors", [False, True])
def test_llava_1_5(hub, source, shards, clip_has_safetensors):
    name = write_llava_1_5(hub, source, shards=shards)
    write_clip(hub, source, clip_has_safetensors)
    tokenizer, model, _, _ = load(name)
    assert_same(model, original_names(source.state_dict()))
    assert tokenizer is not None
    files, index = shard_files("bin", shards)
    small = {"config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.model"}
    assert hub.fetched[name] == {*files, index, *small, "tokenizer_config.json"}
    weights = {"pytorch_model.bin", "model.safetensors", "tf_model.h5"} & hub.fetched[CLIP]
    assert weights == {"model.safetensors" if clip_has_safetensors else "pytorch_model.bin"}


def test_llava_1_5_from_the_cache_alone(hub, source):
    name = write_llava_1_5(hub, source)
    write_clip(hub, source)
    assert_same(load(name, local_files_only=True)[1], original_names(source.state_dict()))
    assert all(hub.local_only)


@pytest.mark.parametrize(
    ("name", "listed", "wanted"),
    [
        (
            "liuhaotian/llava-v1.5-13b",
            ["config.json", "mm_projector.bin", "pytorch_model.bin.index.json", *shard_files("bin", 3)[0], "README.md"],
            shard_files("bin", 3)[0],
        ),
        (
            "liuhaotian/llava-v1.6-vicuna-13b",
            ["config.json", "model.safetensors.index.json", *shard_files("safetensors", 6)[0], "training_args.bin"],
            shard_files("safetensors", 6)[0],
        ),
        (
            "mistralai/Mistral-7B-Instruct-v0.2",
            ["model.safetensors.index.json", *shard_files("safetensors", 3)[0], *shard_files("bin", 3)[0]]
            + ["pytorch_model.bin.index.json", "consolidated.safetensors"],
            shard_files("safetensors", 3)[0],
        ),
        ("openai/clip-vit-large-patch14", ["config.json", "model.safetensors", "pytorch_model.bin", "x.h5"], None),
    ],
)
@pytest.mark.parametrize("index_says", ["", "{}"])
def test_empty_files_of_the_published_names(hub, name, listed, wanted, index_says):
    for file in listed:
        (hub.repository(name) / file).write_text(index_says if file.endswith(".json") else "")
    locate(name, "checkpoint")
    found = {file for file in hub.fetched[name] if not file.endswith(".json")}
    assert found == set(wanted or ["model.safetensors"])


def test_llava_1_6_needs_no_tower_repository(hub):
    source = tiny_model(seed=22, mm_patch_merge_type="spatial_unpad")
    name, tensors = "liuhaotian/llava-v1.6-vicuna-7b", original_names(source.state_dict())
    folder = hub.repository(name)
    write_shards(folder, tensors, "safetensors", 3)
    write_config(folder, **NEXT_FIELDS)
    write_tokenizer(folder)
    (folder / "trainer_state.json").write_text("{}")
    extras(folder, "training_args.bin")
    assert_same(load(name)[1], tensors)
    files, index = shard_files("safetensors", 3)
    assert {*files, index} <= hub.fetched[name] and "training_args.bin" not in hub.fetched[name]
    assert CLIP not in hub.fetched


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_projector_only(hub, source, kind):
    name, projector = "liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5", split(source)[2]
    folder = hub.repository(name)
    torch.save(projector, folder / "mm_projector.bin")
    write_config(folder)
    (folder / "trainer_state.json").write_text("{}")
    extras(folder)
    write_clip(hub, source)
    base = write_vicuna(hub, source, kind)
    assert_same(load(name, base)[1], original_names(source.state_dict()))
    assert set(shard_files(kind, 2)[0]) <= hub.fetched[base] and "mm_projector.bin" in hub.fetched[name]
    with pytest.raises(UserError, match="a projector only: pass --model-base"):
        load(name)


def write_lora(hub, source, adapter="adapter_model.bin"):
    name, projector = "liuhaotian/llava-v1.5-7b-lora", split(source)[2]
    folder = hub.repository(name)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    torch.save(tensors, folder / adapter)
    torch.save({f"base_model.model.{k}": v for k, v in projector.items()}, folder / "non_lora_trainables.bin")
    settings = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    write_json(folder / "adapter_config.json", settings)
    write_config(folder)
    (folder / "trainer_state.json").write_text("{}")
    extras(folder)
    return name


def test_lora(hub, source):
    name = write_lora(hub, source)
    write_clip(hub, source)
    base = write_vicuna(hub, source)
    model = load(name, base)[1]
    expected = original_names(source.state_dict())
    key = "model.layers.0.self_attn.q_proj.weight"
    expected[key] = expected[key] + torch.full((32, 32), 4.0)
    assert torch.allclose(original_names(model.state_dict())[key], expected[key], atol=1e-5)
    assert {"adapter_model.bin", "non_lora_trainables.bin", "adapter_config.json"} <= hub.fetched[name]


def test_lora_without_its_base_is_refused_before_anything_large_is_fetched(hub, source):
    name = write_lora(hub, source)
    with pytest.raises(UserError, match=r"pass --model-base .*\(lmsys/vicuna-7b-v1.5\)"):
        load(name)
    assert not any(file.endswith(".bin") for file in hub.fetched[name])


def test_a_llava_as_the_base(hub, source):
    """LLaVA-1.5 repositories as `--model-base`: their shards are fetched too."""
    name, base = write_lora(hub, source), write_llava_1_5(hub, source)
    write_clip(hub, source)
    load(name, base)
    assert set(shard_files("bin", 2)[0]) <= hub.fetched[base]


def test_a_single_pickle_beside_a_projector(hub, source):
    name, (own, _, projector) = "someone/small-llava", split(source)
    folder = hub.repository(name)
    torch.save(own, folder / "pytorch_model.bin")
    torch.save(projector, folder / "mm_projector.bin")
    write_config(folder)
    write_clip(hub, source)
    assert_same(load(name)[1], original_names(source.state_dict()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[" * 5000, "nested too deeply"),
        ("config.json", b'{"model_type": "llama"}', "model_type 'llama' is not a LLaVA"),
        ("tokenizer.model", b"hello", "tokenizer cannot be read"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id must be a whole number"),
    ],
)
def test_small_files_are_looked_at_before_weights_are_fetched(hub, source, name, content, message):
    repository = write_llava_1_5(hub, source)
    write_clip(hub, source)
    (hub.repository(repository) / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(repository)
    assert not any(file.endswith(".bin") for file in hub.fetched[repository])


def test_a_tower_that_is_not_there_stops_before_weights_are_fetched(hub, source):
    name = write_llava_1_5(hub, source)
    with pytest.raises(UserError, match=f"put a copy of the tower .* at .*/{CLIP}, or write"):
        load(name)
    assert not any(file.endswith(".bin") for file in hub.fetched[name])


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../../x.bin", "a/../../x.bin", "..\\x.bin", "*.bin", "", "a\0b", 7, None, ["x"], "./x", "x" * 999],
)
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_an_index_names_only_files_in_its_folder(hub, source, name, kind):
    repository = write_llava_1_5(hub, source)
    write_clip(hub, source)
    folder = hub.repository(repository)
    index = shard_files(kind, 2)[1]
    raw = {"weight_map": {"lm_head.weight": name}}
    write_json(folder / index, raw)
    for place in (repository, str(folder)):
        with pytest.raises(UserError, match=f"{index}: weight_map names .*which is no file in its folder") as caught:
            load(place)
        assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_shards_in_subfolders_are_read(tmp_path, source):
    from tests.model.tiny import write_original

    folder = write_original(tmp_path / "llava", source, "safetensors-sharded")
    (folder / "part").mkdir()
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    for file in sorted(set(raw["weight_map"].values())):
        (folder / file).rename(folder / "part" / file)
    write_json(index, {"weight_map": {k: f"part/{v}" for k, v in raw["weight_map"].items()}})
    assert_same(load(str(folder))[1], original_names(source.state_dict()))


# --- deadlines ---


def test_a_download_has_a_deadline(hub, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: released.wait(30))
    monkeypatch.setenv(downloads.DEADLINE_VARIABLE, "0.3")
    started = time.monotonic()
    with pytest.raises(UserError, match="owner/model: the checkpoint was not fetched .* no end after 0 s.*LLAVA_DOWN"):
        load("owner/model")
    assert time.monotonic() - started < 5
    released.set()


def test_a_download_that_stands_still_is_given_up(hub, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(downloads, "STALLED_S", 0.3)
    with pytest.raises(downloads.DownloadTimeout, match="nothing has arrived for 0 s"):
        downloads.within(60, lambda: released.wait(30), poll_s=0.05)
    released.set()


def test_a_download_that_grows_is_waited_for(hub, tmp_path, monkeypatch):
    blobs = tmp_path / "cache" / "models--owner--model" / "blobs"
    blobs.mkdir(parents=True)
    monkeypatch.setattr(downloads, "STALLED_S", 0.4)

    def trickle():
        for i in range(12):
            (blobs / "x.incomplete").write_bytes(b"x" * (i + 1))
            time.sleep(0.1)
        return "done"

    assert downloads.within(60, trickle, poll_s=0.05) == "done"


def test_errors_of_a_download_arrive(hub):
    with pytest.raises(KeyError, match="why"):
        downloads.within(5, lambda: {}["why"])
    with pytest.raises(UserError, match="nobody/nothing: no such folder, and .* Repository not found"):
        load("nobody/nothing")


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
def test_bad_deadlines(hub, monkeypatch, value):
    monkeypatch.setenv(downloads.DEADLINE_VARIABLE, value)
    with pytest.raises(UserError, match="LLAVA_DOWNLOAD_DEADLINE must be a number of seconds above 0"):
        downloads.within(5, lambda: None)


def test_the_process_ends_although_the_download_goes_on():
    """Python waits for every thread of a pool at exit, which would be for ever here."""
    code = """
import concurrent.futures, sys, time, huggingface_hub
def stuck(*args, **kwargs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(time.sleep, [60, 60]))
huggingface_hub.snapshot_download = stuck
from llava.model.locate import locate
from llava.utils import UserError
try:
    locate("owner/model", "checkpoint")
except UserError as error:
    print(error)
    sys.exit(2)
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), downloads.DEADLINE_VARIABLE: "0.5"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, env=environment)
    assert run.returncode == 2 and "was not fetched from the hub in time" in run.stdout, run.stderr
