"""Seeded mutations of every small file of a checkpoint: what is not refused in one line can be used.

Everything runs in this process, so any other error fails the test with its seed.
"""

from __future__ import annotations

import copy
import json
import os
import random
import warnings

import huggingface_hub
import pytest
import torch
from PIL import Image

from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_image_processor, load_pretrained_model
from llava.model.configuration import LlavaConfig
from llava.model.reading import look_up
from llava.model.tokenizer import load_tokenizer
from llava.utils import UserError
from tests.fuzzing import mutate_bytes
from tests.model.test_adapters import lora, write_lora
from tests.model.tiny import tiny_config, tiny_model, write_json, write_original, write_tokenizer

MUTATIONS = int(os.environ.get("LLAVA_FUZZ", "120"))
LOADS = MUTATIONS // 4
VALUES = [
    None, True, False, 0, 1, -1, 2.5, 10**9, 10**12, 10**400, -(10**30), 1e308, float("nan"), float("inf"), "", "x",
    "\x1b[31m", "a\0b", "../../x", [], [1], [[1, 2], [3, 4]], [None], {}, {"a": 1}, {"height": 9}, ["x"] * 40, "7",
    "\u2581" * 300, [[[[[[[[1]]]]]]]], "mlp9x_gelu", "anyres", "spatial_unpad", "linear", "float16", "\U0001f642",
]  # fmt: skip


def mutate_value(content: bytes, draw: random.Random) -> bytes:
    """One or two values, however deep, replaced by others or taken out."""
    value = json.loads(content)
    for _ in range(draw.randint(1, 2)):
        places = []
        waiting = [value]
        while waiting:
            part = waiting.pop()
            for key in list(part) if isinstance(part, dict) else range(len(part)):
                places.append((part, key))
                if isinstance(part[key], dict | list):
                    waiting.append(part[key])
        if places:
            part, key = draw.choice(places)
            if draw.random() < 0.1 and isinstance(part, dict):
                del part[key]
            else:
                part[key] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(value).encode()


def mutate(content: bytes, name: str, seed: int) -> bytes:
    draw = random.Random(f"{name}{seed}")
    if name.endswith(".json") and seed % 3:
        return mutate_value(content, draw)
    return mutate_bytes(content, draw)


def survives(work, seed, counts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            work()
            counts["fine"] += 1
        except UserError as error:
            counts["refused"] += 1
            text = str(error)
            assert "\n" not in text and "\0" not in text and 0 < len(text) < 2000, (seed, text)
        except BaseException as error:
            raise AssertionError(f"mutation {seed}: {type(error).__name__}: {error}") from error


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    source = tiny_model(seed=41, text={"vocab_size": 512})
    folder = write_original(root / "llava", source, "safetensors-sharded", vocab_size=512)
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder, tiny_config())
    tokenizer.save_pretrained(root / "json")
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0})
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    write_json(folder / "added_tokens.json", {"<extra>": 360})
    write_lora(root / "lora", source, lora(source), alpha_pattern={"layers.0.self_attn.q_proj": 3})
    return root


@pytest.mark.parametrize(
    ("name", "rounds"),
    [
        ("config.json", 3 * LOADS),
        ("vision_tower/config.json", LOADS),
        ("vision_tower/preprocessor_config.json", LOADS),
        ("model.safetensors.index.json", LOADS),
        ("generation_config.json", LOADS),
        ("tokenizer_config.json", LOADS),
    ],
)
def test_loading_and_answering(checkpoint, name, rounds):
    folder, counts = checkpoint / "llava", {"fine": 0, "refused": 0}
    original = (folder / name).read_bytes()
    picture = Image.new("RGB", (50, 31), (200, 30, 60))

    def use():
        tokenizer, model, processor, length = load_pretrained_model(str(folder), None, "llava", device="cpu")
        assert isinstance(length, int) and length > 0
        images = process_images([picture], processor, model.config)
        ids = tokenizer_image_token("a <image> b", tokenizer, return_tensors="pt")[None].clamp(max=511)
        images = [image.float() for image in images] if isinstance(images, list) else images.float()
        with torch.no_grad():
            model.generate(ids, images=images, image_sizes=[(50, 31)], max_new_tokens=1, do_sample=False)

    try:
        for seed in range(rounds):
            (folder / name).write_bytes(mutate(original, name, seed))
            survives(use, f"{name} {seed}", counts)
    finally:
        (folder / name).write_bytes(original)
    assert counts["refused"] > rounds // 10, counts
    # Of an index or the tower's configuration nearly every value counts.
    assert counts["fine"] > 0 or name in ("model.safetensors.index.json", "vision_tower/config.json"), counts


def test_configurations(checkpoint):
    path, counts = checkpoint / "llava" / "config.json", {"fine": 0, "refused": 0}
    original = path.read_bytes()
    try:
        for seed in range(1000, 1000 + 5 * MUTATIONS):
            path.write_bytes(mutate(original, path.name, seed))
            survives(lambda: LlavaConfig.from_pretrained(path.parent), seed, counts)
            survives(lambda: look_up(str(path.parent), None, True), seed, counts)
    finally:
        path.write_bytes(original)
    assert min(counts.values()) > 20, counts


def test_nested_configurations(checkpoint, tmp_path):
    raw = LlavaConfig.from_pretrained(checkpoint / "llava").to_dict()
    for fields in (raw, raw | {"model_type": "llava_next", "image_grid_pinpoints": [[28, 56], [56, 28]]}):
        counts = {"fine": 0, "refused": 0}
        original = json.dumps({k: v for k, v in fields.items() if v is not None}).encode()
        for seed in range(2 * MUTATIONS):
            (tmp_path / "config.json").write_bytes(mutate(original, "nested", seed))
            survives(lambda: look_up(str(tmp_path), None, True), seed, counts)
        assert min(counts.values()) > 5, counts


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_the_towers_files(checkpoint, name):
    folder, counts = checkpoint / "llava", {"fine": 0, "refused": 0}
    path, config = folder / "vision_tower" / name, tiny_config()
    original = path.read_bytes()
    try:
        for seed in range(2 * MUTATIONS):
            path.write_bytes(mutate(original, name, seed))
            if name == "config.json":
                survives(lambda: look_up(str(folder), None, True), seed, counts)
            else:
                survives(lambda: load_image_processor(folder, path.parent, config), seed, counts)
    finally:
        path.write_bytes(original)
    assert min(counts.values()) > 5, counts


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("llava", "tokenizer.model"),
        ("llava", "tokenizer_config.json"),
        ("llava", "special_tokens_map.json"),
        ("llava", "added_tokens.json"),
        ("json", "tokenizer.json"),
        ("json", "tokenizer_config.json"),
    ],
)
def test_tokenizers(checkpoint, place, name):
    folder, counts = checkpoint / place, {"fine": 0, "refused": 0}
    original = (folder / name).read_bytes()

    def use():
        tokenizer = load_tokenizer(folder, tiny_config())
        ids = tokenizer_image_token("USER: <image>\nWhat  is it? ASSISTANT:", tokenizer)
        assert all(isinstance(i, int) for i in ids)
        tokenizer.decode([i for i in ids if i >= 0])

    try:
        for seed in range(MUTATIONS):
            (folder / name).write_bytes(mutate(original, name, seed))
            survives(use, f"{name} {seed}", counts)
    finally:
        (folder / name).write_bytes(original)
    assert counts["fine"] > 0, counts


def test_adapter_settings(checkpoint):
    path, counts = checkpoint / "lora" / "adapter_config.json", {"fine": 0, "refused": 0}
    base, original = str(checkpoint / "llava"), path.read_bytes()
    try:
        for seed in range(MUTATIONS):
            path.write_bytes(mutate(original, path.name, seed))
            survives(lambda: look_up(str(path.parent), base, True), seed, counts)
    finally:
        path.write_bytes(original)
    assert min(counts.values()) > 5, counts


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weight_files(tmp_path, form):
    folder = write_original(tmp_path / "llava", tiny_model(seed=42), form)
    path = next(folder.glob("*.safetensors" if form == "safetensors" else "*.bin"))
    original, counts = path.read_bytes(), {"fine": 0, "refused": 0}
    for seed in range(MUTATIONS):
        draw = random.Random(seed)
        head = draw.random() < 0.7 and form == "safetensors"
        content = mutate_bytes(original[:4000], draw) + original[4000:] if head else mutate_bytes(original, draw)
        path.write_bytes(content)
        survives(lambda: load_pretrained_model(str(folder), None, "x", device="cpu", dtype="bfloat16"), seed, counts)
    assert counts["refused"] > 5, counts
