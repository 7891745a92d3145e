"""Every small file of a checkpoint: configuration, tokenizer, preprocessing, generation, index and adapter settings.

What is accepted must also work: a picture is prepared, a prompt tokenized and two tokens are generated.
"""

import copy
from pathlib import Path

import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.configuration import LlavaConfig
from tests.fuzzing import Target
from tests.model.layouts import NEXT_FIELDS, write_llava_hf
from tests.model.test_adapters import lora, projector, write_config, write_lora, write_tower, write_vicuna
from tests.model.tiny import tiny_model, write_json, write_original, write_tokenizer

PICTURE = Image.new("RGB", (60, 40), "red")


def _use(model_path: str, base: str | None = None) -> None:
    torch.manual_seed(0)
    tokenizer, model, processor, _ = load_pretrained_model(model_path, base, "tiny-llava", device="cpu")
    pixels = process_images([PICTURE], processor, model.config)
    prompt = "USER: <image>\nWhat  is it? ASSISTANT:" if tokenizer is not None else None
    ids = torch.tensor([1, IMAGE_TOKEN_INDEX, 5])
    if prompt is not None:
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        ids = torch.where(ids < model.config.text_config.vocab_size, ids, 5)  # more pieces than the tiny table has rows
    with torch.inference_mode():
        output = model.generate(
            ids[None], images=pixels, image_sizes=[PICTURE.size], do_sample=False, max_new_tokens=2, min_new_tokens=1
        )
    if tokenizer is not None:
        tokenizer.batch_decode(output, skip_special_tokens=True)


def _original(folder: Path):
    write_original(folder, tiny_model(seed=4), "safetensors-sharded")
    write_tokenizer(folder)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    names = ["config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"]
    names += ["vision_tower/config.json", "vision_tower/preprocessor_config.json", "config.json"]
    return names, lambda: _use(str(folder))


def _next(folder: Path):
    write_original(folder, tiny_model(seed=4, mm_patch_merge_type="spatial_unpad"), **copy.deepcopy(NEXT_FIELDS))
    return ["config.json"], lambda: _use(str(folder))


def _llava_hf(version: str):
    def build(folder: Path):
        fields = {"mm_patch_merge_type": "spatial_unpad"} if version == "1.6" else {}
        write_llava_hf(folder, tiny_model(seed=4, **fields), version=version)
        return ["config.json", "preprocessor_config.json", "generation_config.json"], lambda: _use(str(folder))

    return build


def _tokenizer(folder: Path):
    write_original(folder, tiny_model(seed=4))
    write_tokenizer(folder)
    from transformers import LlamaTokenizer

    LlamaTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    written = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    names = [name for name in written if (folder / name).is_file()]
    return [*names, "tokenizer.model"], lambda: _use(str(folder))


def _adapter(folder: Path):
    source = tiny_model(seed=8)
    write_vicuna(folder / "base", source, "safetensors")
    write_tower(folder / "lora" / "vision_tower", source)
    write_config(folder / "lora")
    write_lora(folder / "lora", source, lora(source))
    trained = {f"base_model.model.{name}": tensor for name, tensor in projector(source).items()}
    torch.save(trained, folder / "lora" / "non_lora_trainables.bin")
    names = ["lora/adapter_config.json", "lora/config.json", "base/config.json", "base/generation_config.json"]
    return names, lambda: _use(str(folder / "lora"), str(folder / "base"))


def _configuration(folder: Path):
    write_original(folder, tiny_model(seed=4))
    return ["config.json", "vision_tower/config.json"], lambda: LlavaConfig.from_pretrained(str(folder))


TARGETS = [
    Target("checkpoint", _original, 0.6),
    Target("checkpoint 1.6", _next, 0.3),
    Target("llava-hf", _llava_hf("1.5"), 0.3),
    Target("llava-hf 1.6", _llava_hf("1.6"), 0.3),
    Target("tokenizer", _tokenizer, 0.4),
    Target("adapter", _adapter, 0.3),
    Target("configuration", _configuration, 0.5),
]
