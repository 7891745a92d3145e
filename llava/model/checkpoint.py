"""Checkpoint folders: configuration and weight names, translated to transformers' LLaVA.

Reads the original layout of LLaVA 1.5 and 1.6 (flat config.json, `model.mm_projector.0.weight`, vision tower inside
the weights or in a folder of its own) and the llava-hf layout of both. Every mistake in a folder becomes a
`UserError` that names the file. Builds no model and touches no device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.configuration import LlavaConfig
from llava.model.locate import locate_vision_tower
from llava.model.projector import DEFAULT_PROJECTOR, projector_depth
from llava.utils import UserError

# Model types of config.json; in the llava-hf layout the decoder's own type is in text_config.
LLAVA_MODEL_TYPES = ("llava", "llava_llama", "llava_mistral", "llava_next")
DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig}
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
# LLaVA's tile sizes of 1.6, where a llava-hf config leaves them to transformers' defaults.
DEFAULT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# The towers of all published LLaVA 1.5 and 1.6 checkpoints. 1.6 carries the tower's weights and needs the name for
# these numbers alone, which is no reason for a download.
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": CLIP_LARGE | {"image_size": 336},
    "openai/clip-vit-large-patch14": CLIP_LARGE | {"image_size": 224},
}



def _projector_name(found: re.Match[str]) -> str:
    return f"model.multi_modal_projector.linear_{int(found.group(1)) // 2 + 1}."


# Original and llava-hf names -> names of transformers' LlavaForConditionalGeneration; the first match is
# used.
NAME_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # original LLaVA
        # "mlpNx_gelu" is a sequence with activations at the odd places; "linear" is one layer.
        (r"^(?:model\.)?mm_projector\.(\d*[02468])\.", _projector_name),
        (r"^(?:model\.)?mm_projector\.(?=weight$|bias$)", "model.multi_modal_projector.linear_1."),
        (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
        # llava-hf as it lies on disk
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^image_newline$", "model.image_newline"),
        # already transformers' own
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    )
)
# Tensors that old checkpoints store and that are computed.
IGNORED_NAMES = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
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
        data = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark in front
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


def tower_name(raw: Mapping[str, Any], path: Path) -> str:
    """Folder or hub name of the vision tower that an original config.json names."""
    name = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: missing field mm_vision_tower (folder or hub name of the CLIP tower)")
    return name


def find_tower(name: str, path: Path, with_weights: bool, local_files_only: bool = False) -> Path | None:
    """The vision tower's folder; None for a published tower whose configuration is known and whose weights are not
    needed.

    Args:
        name: what config.json names.
        path: that config.json: relative names are looked for beside it first.
        with_weights: the checkpoint itself has no weights of the tower.
        local_files_only: never use the network.

    Raises:
        UserError: the tower is not there; says what to write into config.json.
    """
    if name in KNOWN_TOWERS and not with_weights and not (path.parent / name).is_dir():
        return None
    try:
        return locate_vision_tower(name, path.parent, with_weights, local_files_only)
    except UserError as error:
        raise UserError(
            f"{error}; {path} names it as mm_vision_tower: write the path of a local copy there if you have one"
        ) from None


def tower_config(name: str, folder: Path | None) -> CLIPVisionConfig:
    """Configuration of a tower that `find_tower` found."""
    if folder is None:
        return CLIPVisionConfig(**KNOWN_TOWERS[name])
    return vision_config_from_folder(folder)


def read_config(raw: Mapping[str, Any], path: Path, local_files_only: bool = False) -> LlavaConfig:
    """The configuration alone, for who does not load weights. Arguments as in `llava_config`.

    Raises:
        UserError: see `llava_config`, or the vision tower is not there.
    """
    if is_llava_hf_config(raw):
        return llava_config(raw, path, None)
    check_config(raw, path)
    name = tower_name(raw, path)
    return llava_config(raw, path, tower_config(name, find_tower(name, path, False, local_files_only)))


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


def check_config(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse what is no LLaVA on Llama or Mistral, before anything is searched or downloaded for it.

    Raises:
        UserError: another model, or a field is missing or has a value that is not supported.
    """
    model_type = raw.get("model_type")
    if model_type not in LLAVA_MODEL_TYPES:
        raise UserError(
            f"{path}: model_type {model_type!r} is not a LLaVA model with a Llama or Mistral decoder "
            f"(expected one of {', '.join(LLAVA_MODEL_TYPES)}); --model-path must be a LLaVA checkpoint"
        )
    if is_llava_hf_config(raw):
        return
    missing = [name for name in REQUIRED_TEXT_FIELDS if raw.get(name) is None]
    if missing:
        raise UserError(f"{path}: missing field(s) {', '.join(missing)}; is this the config of a LLaVA checkpoint?")
    # A checkpoint without this field has LLaVA's first projector.
    projector = raw.get("mm_projector_type", "linear")
    if not isinstance(projector, str) or projector_depth(projector) is None:
        raise UserError(
            f"{path}: mm_projector_type {projector!r} is not supported, only linear, identity and mlpNx_gelu "
            "(LLaVA 1.5 and 1.6: mlp2x_gelu)"
        )
    for name in ("mm_resampler_type", "s2"):
        if raw.get(name):
            raise UserError(f"{path}: {name} {raw[name]!r} is not supported: this is not LLaVA 1.5 or 1.6")
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in SELECT_STRATEGY:
        raise UserError(f"{path}: mm_vision_select_feature {feature!r}, expected one of {', '.join(SELECT_STRATEGY)}")


def llava_config(raw: Mapping[str, Any], path: Path, vision_config: CLIPVisionConfig | None) -> LlavaConfig:
    """`LlavaConfig` with LLaVA's own fields kept beside transformers'.

    Args:
        raw: content of config.json.
        path: that file, for messages.
        vision_config: the tower's configuration; not needed for the llava-hf layout.

    Raises:
        UserError: a field is missing or has a value that is not supported.
    """
    check_config(raw, path)
    if is_llava_hf_config(raw):
        return _llava_hf_config(raw, path)
    assert vision_config is not None
    return _build(
        LlavaConfig,
        {
            "text_config": _text_config(raw, path),
            "vision_config": vision_config,
            "image_token_index": IMAGE_TOKEN_INDEX,
            "image_seq_length": (vision_config.image_size // vision_config.patch_size) ** 2,
            "projector_hidden_act": "gelu",
            "vision_feature_select_strategy": SELECT_STRATEGY[raw.get("mm_vision_select_feature", "patch")],
            "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
            "multimodal_projector_bias": True,
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
            **_llava_fields(raw),
        },
        path,
    )


def _text_config(raw: Mapping[str, Any], path: Path) -> Any:
    mistral = raw["model_type"] == "llava_mistral" or "LlavaMistralForCausalLM" in str(raw.get("architectures"))
    text = {name: raw[name] for name in REQUIRED_TEXT_FIELDS}
    text |= {name: raw[name] for name in OPTIONAL_TEXT_FIELDS if raw.get(name) is not None}
    if mistral and "sliding_window" in raw:
        # null is a value here: no window. Left out, transformers would take 4096.
        text["sliding_window"] = raw["sliding_window"]
    return _build(DECODERS["mistral" if mistral else "llama"], text, path)


def _llava_hf_config(raw: Mapping[str, Any], path: Path) -> LlavaConfig:
    text = raw["text_config"]
    if not isinstance(text, dict) or text.get("model_type", "llama") not in DECODERS:
        kind = text.get("model_type") if isinstance(text, dict) else text
        raise UserError(f"{path}: text_config of type {kind!r} is not supported, only {', '.join(DECODERS)}")
    vision = raw.get("vision_config") or {}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(f"{path}: vision tower of type {vision['model_type']!r}; only CLIP towers are supported")
    next_fields: dict[str, Any] = {}
    if raw["model_type"] == "llava_next":
        next_fields = {
            "model_type": "llava",
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": _pinpoints_wh(raw.get("image_grid_pinpoints") or DEFAULT_PINPOINTS, path),
        }
    config = _build(LlavaConfig.from_dict, {"config_dict": {**raw, **next_fields}}, path)
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(f"{path}: vision_feature_layer must be one layer, got {config.vision_feature_layer}")
    feature = {strategy: name for name, strategy in SELECT_STRATEGY.items()}[config.vision_feature_select_strategy]
    defaults = {
        # llava-hf configs do not say it, but LLaVA-1.5 was trained on images padded to a square.
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
        "mm_projector_type": DEFAULT_PROJECTOR,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": feature,
        "mm_hidden_size": config.vision_config.hidden_size,
    }
    for name, value in defaults.items():
        if name not in raw and name not in next_fields:
            setattr(config, name, value)
    return config


def _pinpoints_wh(pinpoints: Any, path: Path) -> list[list[int]]:
    """LLaVA's `(width, height)` list from a llava-hf one.

    transformers reads the pairs as (height, width). The published lists are LLaVA's own, copied; they hold every
    shape both ways, so the readings differ only in which of two equally good shapes comes first, and LLaVA's order is
    the one that gives LLaVA's answers. A list that is not symmetric means what transformers says.
    """
    try:
        pairs = [[int(a), int(b)] for a, b in pinpoints]
    except (TypeError, ValueError):
        raise UserError(f"{path}: image_grid_pinpoints must be pairs of numbers, got {pinpoints!r}") from None
    symmetric = all([b, a] in pairs for a, b in pairs)
    return pairs if symmetric else [[b, a] for a, b in pairs]


def _llava_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA's own fields, under their own names: scripts and `process_images` read them from
    `model.config`.
    """
    own = ("mm_", "image_", "tokenizer_", "anyres_", "use_mm", "tune_mm", "freeze_mm", "unfreeze_mm", "max_sequence")
    fields = {name: value for name, value in raw.items() if name.startswith(own)}
    fields.setdefault("mm_use_im_start_end", False)
    # Explicit because LLaVA's own default is True, which would add a token that LLaVA 1.5 does not have.
    fields.setdefault("mm_use_im_patch_token", False)
    fields.setdefault("mm_projector_type", "linear")
    fields.setdefault("mm_patch_merge_type", "flat")
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
