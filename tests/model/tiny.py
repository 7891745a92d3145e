"""Random tiny LLaVA models, checkpoints and a tokenizer, made by the tests themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava.model.llava_llama import LlavaLlamaForCausalLM

HIDDEN, VOCAB, IMAGE_SIDE, PATCH = 32, 96, 28, 7
GRID = IMAGE_SIDE // PATCH
PATCHES = GRID * GRID
# An id inside the table, so that transformers' own model can be given the expanded prompt.
NATIVE_IMAGE_ID = VOCAB - 1

TEXT_FIELDS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
VISION_FIELDS: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
    "projection_dim": 24,
}
LLAVA_FIELDS: dict[str, Any] = {
    "mm_vision_tower": "vision_tower",
    "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "tokenizer_padding_side": "right",
}


def tiny_config(**fields: Any) -> LlavaConfig:
    text = {**TEXT_FIELDS, **fields.pop("text", {})}
    vision = {**VISION_FIELDS, **fields.pop("vision", {})}
    return LlavaConfig(
        **{
            "text_config": LlamaConfig(**text),
            "vision_config": CLIPVisionConfig(**vision),
            "image_token_index": NATIVE_IMAGE_ID,
            "image_seq_length": PATCHES,
            "image_aspect_ratio": "pad",
            **fields,
        }
    )


def sharpen(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights large enough that attention is far from uniform and greedy choices are clear."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)


def tiny_model(seed: int = 0, attn_implementation: str = "sdpa", **fields: Any) -> LlavaLlamaForCausalLM:
    config = tiny_config(**fields)
    config._attn_implementation = attn_implementation
    model = LlavaLlamaForCausalLM(config).eval()
    sharpen(model, seed)
    return model


def tiny_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(seed))


# --- checkpoints in the original layout ---


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that LLaVA's own code saves."""
    renamed = {}
    for name, tensor in state.items():
        for new, old in (
            ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("model.language_model.", "model."),
            ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ):
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        renamed[name] = tensor.detach().clone().contiguous()
    return renamed


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1))


def write_tower_config(folder: Path) -> None:
    write_json(folder / "config.json", {"model_type": "clip_vision_model", **VISION_FIELDS})
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": IMAGE_SIDE,
            "size": IMAGE_SIDE,
            "do_resize": True,
            "do_center_crop": True,
            "do_normalize": True,
            "resample": 3,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


def write_weights(folder: Path, weights: dict[str, torch.Tensor], form: str) -> None:
    """`form`: "safetensors", "bin", or either with "-sharded" (two shards and an index)."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, _, sharded = form.partition("-")
    save = save_file if kind == "safetensors" else lambda tensors, path: torch.save(tensors, path)
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    if not sharded:
        save(weights, folder / f"{stem}{suffix}")
        return
    names = sorted(weights)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{i:05d}-of-00002{suffix}"
        save({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_original(
    folder: Path,
    model: LlavaLlamaForCausalLM,
    form: str = "safetensors",
    tower_inside: bool = True,
    **config_fields: Any,
) -> Path:
    """A checkpoint folder as LLaVA 1.5 writes it; the tower's weights inside, or in `vision_tower/` like
    CLIP's own.
    """
    weights = original_names(model.state_dict())
    if not tower_inside:
        prefix = "model.vision_tower.vision_tower."
        tower = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        # A full CLIP checkpoint also holds its text half and a computed buffer.
        tower["text_model.final_layer_norm.weight"] = torch.ones(4)
        tower["logit_scale"] = torch.tensor(1.0)
        tower["vision_model.embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
        write_weights(folder / "vision_tower", tower, form)
        weights = {name: t for name, t in weights.items() if not name.startswith(prefix)}
    write_tower_config(folder / "vision_tower")
    write_weights(folder, weights, form)
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **TEXT_FIELDS,
        **LLAVA_FIELDS,
        **config_fields,
    }
    write_json(folder / "config.json", {k: v for k, v in config.items() if v != "absent"})
    return folder


# --- a sentencepiece tokenizer of Llama's kind ---

CORPUS = (
    "USER: What is the color of the star? Answer the question using a single word or phrase. ASSISTANT: red\n"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. How many circles are there in the picture? What does the sign say?\n"
)


def write_tokenizer(folder: Path, with_config: bool = True, corpus: str = "") -> Path:
    """Train a small byte-fallback BPE model with Llama's settings and write `tokenizer.model`."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text(CORPUS * 20 + corpus)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer.vocab").unlink()
    if with_config:
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<unk>",
                "legacy": False,
                "model_max_length": 2048,
                "padding_side": "right",
            },
        )
    return folder
