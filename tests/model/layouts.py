"""Writers of llava-hf checkpoint folders with the key names and config fields of the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava.model.llava_llama import LlavaLlamaForCausalLM
from tests.model.tiny import IMAGE_SIDE, TEXT_FIELDS, VISION_FIELDS, write_json, write_weights

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
# What llava-v1.6-vicuna-7b's config.json says beside 1.5's fields.
NEXT_FIELDS: dict[str, Any] = {
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": PINPOINTS,
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_resampler_type": None,
    "mm_vision_tower_lr": 2e-06,
    "tokenizer_model_max_length": 4096,
    "unfreeze_mm_vision_tower": True,
    "use_mm_proj": True,
}
MISTRAL_FIELDS: dict[str, Any] = {
    "architectures": ["LlavaMistralForCausalLM"],
    "model_type": "llava_mistral",
    "rope_theta": 1000000.0,
    "sliding_window": None,
}


def llava_hf_names(state: dict[str, torch.Tensor], style: str) -> dict[str, torch.Tensor]:
    """`style` "old": as published (`language_model.model.*`); "new": as transformers 5's modules are called."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("model.vision_tower."):
            name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
        if style == "old":
            if name.startswith("lm_head."):
                name = f"language_model.{name}"
            name = name.replace("model.language_model.", "language_model.model.", 1)
            for part in ("vision_tower.", "multi_modal_projector.", "image_newline"):
                if name.startswith(f"model.{part}"):
                    name = name.removeprefix("model.")
        renamed[name] = tensor.detach().clone().contiguous()
    return renamed


def write_llava_hf(
    folder: Path,
    model: LlavaLlamaForCausalLM,
    style: str = "old",
    form: str = "safetensors-sharded",
    version: str = "1.5",
    text: dict[str, Any] | None = None,
    extra_rows: int = 0,
    processor_file: str = "preprocessor_config.json",
) -> Path:
    """A folder like llava-hf/llava-1.5-7b-hf or llava-hf/llava-v1.6-vicuna-7b-hf.

    Args:
        extra_rows: rows appended to the embedding table and the head for `<image>`, `<pad>` and alignment. They are
            large enough to win every choice if nobody rules them out.
    """
    weights = llava_hf_names(model.state_dict(), style)
    vocab = TEXT_FIELDS["vocab_size"]
    if extra_rows:
        for name in weights:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                more = torch.full((extra_rows, weights[name].shape[1]), 30.0)
                more[1::2] *= -1
                weights[name] = torch.cat((weights[name], more))
    write_weights(folder, weights, form)
    kind, name = {
        "1.5": ("llava", "LlavaForConditionalGeneration"),
        "1.6": ("llava_next", "LlavaNextForConditionalGeneration"),
    }[version]
    config = {
        "architectures": [name],
        "ignore_index": -100,
        "image_token_index": vocab,
        "model_type": kind,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", **TEXT_FIELDS, "vocab_size": vocab + extra_rows, **(text or {})},
        "torch_dtype": "float16",
        "vision_config": {"model_type": "clip_vision_model", "vocab_size": 32000, **VISION_FIELDS},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": vocab + extra_rows,
    }
    if version == "1.6":
        config |= {"image_grid_pinpoints": PINPOINTS, "use_image_newline_parameter": True}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    processor = {
        "crop_size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor" if version == "1.5" else "LlavaNextImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": IMAGE_SIDE},
    }
    if processor_file == "processor_config.json":
        processor = {"image_processor": processor, "processor_class": "LlavaProcessor"}
    write_json(folder / processor_file, processor)
    return folder
