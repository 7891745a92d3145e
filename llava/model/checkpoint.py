"""Checkpoint folders: configuration, weight files and weight names, translated to transformers' LLaVA.

Reads the original LLaVA-1.5 layout (flat config.json, `model.mm_projector.0.weight`, vision tower inside
the weights or in a folder of its own) and the llava-hf layout. Every mistake in a folder becomes a
`UserError` that names the file. Builds no model and touches no device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.utils import UserError

LLAVA_MODEL_TYPES = ("llava", "llava_llama")
REQUIRED_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
OPTIONAL_TEXT_FIELDS = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "pretraining_tp",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
SELECT_STRATEGY = {"patch": "default", "cls_patch": "full"}

# Original and llava-hf names -> names of transformers' LlavaForConditionalGeneration; the first match is
# used.
NAME_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # original LLaVA
        (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
        (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
        (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
        # llava-hf as it lies on disk
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^vision_tower\.(vision_model\.)?", "model.vision_tower."),
        # already transformers' own
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    )
)
# Tensors that old checkpoints store and that are computed, or that this arrangement of tiles does not use.
IGNORED_NAMES = re.compile(
    r"(rotary_emb\.inv_freq|embeddings\.position_ids)$"
    # LLaVA-1.6's newline token: the "spatial" arrangement (see `assemble`) has none.
    r"|^(model\.)?image_newline$"
)
# What a full CLIP checkpoint holds beside its vision tower.
CLIP_TEXT_NAMES = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)")


def translate_name(name: str) -> str | None:
    """The model's name for a checkpoint tensor; None for tensors that are left out on purpose."""
    if IGNORED_NAMES.search(name):
        return None
    for pattern, replacement in NAME_RULES:
        new_name, found = pattern.subn(replacement, name)
        if found:
            return new_name
    return name


def translate_tower_name(name: str) -> str | None:
    """The model's name for a tensor of a separate CLIP checkpoint; None for its text half and computed
    buffers.
    """
    if CLIP_TEXT_NAMES.search(name) or IGNORED_NAMES.search(name):
        return None
    return "model.vision_tower." + name.removeprefix("vision_model.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; every way to fail is a `UserError` naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is the folder a complete LLaVA checkpoint?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; copy or download it again") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not valid JSON (line {error.lineno}: {error.msg}); copy or download it again"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


# --- configuration ------------------------------------------------------------------------------------------


def is_llava_hf_config(raw: Mapping[str, Any]) -> bool:
    """llava-hf configs nest the decoder's fields; the original ones are flat."""
    return "text_config" in raw


def vision_config_from_folder(folder: Path) -> CLIPVisionConfig:
    """The tower's configuration from a CLIP folder (full CLIP or vision model only)."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") == "clip":
        raw = {"model_type": "clip_vision_model", **dict(raw.get("vision_config") or {})}
        raw["model_type"] = "clip_vision_model"
    if raw.get("model_type") != "clip_vision_model":
        raise UserError(f"{path}: vision tower of type {raw.get('model_type')!r}; only CLIP towers are supported")
    return _build(CLIPVisionConfig, raw, path)


def llava_config(raw: Mapping[str, Any], path: Path, vision_config: CLIPVisionConfig | None) -> LlavaConfig:
    """Transformers' `LlavaConfig` with LLaVA's own fields kept beside it.

    The original layout is translated field by field: given a flat file, `AutoConfig` silently returns the
    7B decoder whatever the file says.

    Args:
        raw: content of config.json.
        path: that file, for messages.
        vision_config: the tower's configuration; not needed for the llava-hf layout.

    Raises:
        UserError: a field is missing or has a value that is not supported.
    """
    model_type = raw.get("model_type")
    if model_type not in LLAVA_MODEL_TYPES:
        raise UserError(
            f"{path}: model_type {model_type!r} is not a LLaVA model with a Llama decoder "
            f"(expected one of {', '.join(LLAVA_MODEL_TYPES)})"
        )
    if is_llava_hf_config(raw):
        return _llava_hf_config(raw, path)
    missing = [name for name in REQUIRED_TEXT_FIELDS if raw.get(name) is None]
    if missing:
        raise UserError(f"{path}: missing field(s) {', '.join(missing)}; is this the config of a LLaVA checkpoint?")
    projector = raw.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise UserError(f"{path}: mm_projector_type {projector!r} is not supported, only 'mlp2x_gelu' (LLaVA 1.5)")
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in SELECT_STRATEGY:
        raise UserError(f"{path}: mm_vision_select_feature {feature!r}, expected one of {', '.join(SELECT_STRATEGY)}")
    assert vision_config is not None
    text = {name: raw[name] for name in REQUIRED_TEXT_FIELDS}
    text |= {name: raw[name] for name in OPTIONAL_TEXT_FIELDS if raw.get(name) is not None}
    return _build(
        LlavaConfig,
        {
            "text_config": _build(LlamaConfig, text, path),
            "vision_config": vision_config,
            "image_token_index": IMAGE_TOKEN_INDEX,
            "image_seq_length": (vision_config.image_size // vision_config.patch_size) ** 2,
            "projector_hidden_act": "gelu",
            "vision_feature_select_strategy": SELECT_STRATEGY[feature],
            "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
            "multimodal_projector_bias": True,
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
            **_llava_fields(raw),
        },
        path,
    )


def _llava_hf_config(raw: Mapping[str, Any], path: Path) -> LlavaConfig:
    text = raw["text_config"]
    if not isinstance(text, dict) or text.get("model_type", "llama") != "llama":
        kind = text.get("model_type") if isinstance(text, dict) else text
        raise UserError(f"{path}: text_config of type {kind!r} is not supported, only 'llama'")
    vision = raw.get("vision_config") or {}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(f"{path}: vision tower of type {vision['model_type']!r}; only CLIP towers are supported")
    config = _build(LlavaConfig.from_dict, {"config_dict": dict(raw)}, path)
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(f"{path}: vision_feature_layer must be one layer, got {config.vision_feature_layer}")
    feature = {strategy: name for name, strategy in SELECT_STRATEGY.items()}[config.vision_feature_select_strategy]
    defaults = {
        # llava-hf configs do not say it, but LLaVA-1.5 was trained on images padded to a square.
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": feature,
    }
    for name, value in defaults.items():
        if name not in raw:
            setattr(config, name, value)
    return config


def _llava_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA's own fields, under their own names: scripts and `process_images` read them from
    `model.config`.
    """
    own = ("mm_", "image_", "tokenizer_", "anyres_", "use_mm", "tune_mm", "freeze_mm", "unfreeze_mm", "max_sequence")
    fields = {name: value for name, value in raw.items() if name.startswith(own)}
    fields.setdefault("mm_use_im_start_end", False)
    # Explicit because LLaVA's own default is True, which would add a token that LLaVA 1.5 does not have.
    fields.setdefault("mm_use_im_patch_token", False)
    for name in ("image_token_index", "image_seq_length", "image_token_id"):
        fields.pop(name, None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if raw.get(name) is not None:
            fields[name] = raw[name]
    return fields


def _build(make: Any, fields: dict[str, Any], path: Path) -> Any:
    try:
        return make(**fields)
    except Exception as error:
        # Configuration classes validate their fields with several exception types.
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a usable configuration ({reason})") from None
