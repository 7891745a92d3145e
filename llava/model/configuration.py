"""`LlavaConfig`: transformers' configuration of LLaVA, and its translation from a checkpoint's config.json.

Reads the original layout of LLaVA 1.5 and 1.6 (flat config.json, vision tower inside the weights or in a folder of its
own) and the llava-hf layout of both. Importing this module makes `AutoConfig` read the original checkpoints too: left
alone, transformers takes their `model_type: llava` for its own class and returns the defaults of the 7B model, whatever
the file says. Every mistake in a folder becomes a `UserError` that names the file. Builds no model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, MistralConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import parse_grid_pinpoints
from llava.model.fields import DECODER, LLAVA, VISION, check_pinpoints, usable
from llava.model.locate import read_checkpoint_json as read_json  # noqa: F401 - part of what this module offers
from llava.model.names import translate_name as translate_name
from llava.model.names import translate_tower_name as translate_tower_name
from llava.model.projector import DEFAULT_PROJECTOR, projector_depth
from llava.model.towers import KNOWN_TOWERS as KNOWN_TOWERS
from llava.model.towers import build_config, find_tower, tower_config, tower_name
from llava.utils import UserError, kind_of

# Model types of config.json; in the llava-hf layout the decoder's own type is in text_config.
LLAVA_MODEL_TYPES = ("llava", "llava_llama", "llava_mistral", "llava_next")
DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig}
TOWER_TYPES = ("clip_vision_model",)
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
# LLaVA's own fields of a flat config.json begin like this.
LLAVA_FIELDS = (
    "mm_",
    "image_",
    "tokenizer_",
    "anyres_",
    "use_mm",
    "tune_mm",
    "freeze_mm",
    "unfreeze_mm",
    "max_sequence",
)
# In a llava-hf config.json of ours: LLaVA's own list of (width, height), in its order.
PINPOINTS_WH = "mm_image_grid_pinpoints_wh"
# LLaVA's tile sizes of 1.6, where a llava-hf config leaves them to transformers' defaults.
DEFAULT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class LlavaConfig(transformers.LlavaConfig):
    """Transformers' `LlavaConfig` (`text_config`, `vision_config`, ...) with LLaVA's own fields beside it
    (`mm_vision_tower`, `image_aspect_ratio`, `mm_use_im_start_end`, ...).

    `from_pretrained` and `AutoConfig.from_pretrained` accept the original layout and llava-hf's.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The configuration of a checkpoint, as `load_pretrained_model` would use it.

        Raises:
            UserError: the folder has no usable config.json, or the vision tower that it names cannot be found.
        """
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir():
            # A hub name or a file: transformers knows revisions, tokens and caches.
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls._translated(read_json(folder / "config.json"), folder, kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a config.json's content. Flat ones are translated; llava-hf's stay as they are, because
        `AutoConfig` comes here for every user of transformers' LLaVA.

        Raises:
            UserError: see `from_pretrained`.
        """
        if "text_config" in config_dict or "hidden_size" not in config_dict:
            return super().from_dict(config_dict, **kwargs)
        # AutoConfig tells where the file lies: a relative vision tower is looked for there.
        place = str(kwargs.pop("name_or_path", None) or ".")
        folder = Path(place if os.path.isdir(place) else os.path.dirname(place))
        kwargs.pop("_from_auto", None)
        return cls._translated(config_dict, folder, kwargs)

    @classmethod
    def _translated(cls, raw: dict[str, Any], folder: Path, kwargs: dict[str, Any]) -> Any:
        config = read_config(raw, folder / "config.json", bool(kwargs.pop("local_files_only", False)))
        # Transformers' protocol: keywords that are fields replace them, the others may be handed back.
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        for name in [name for name in kwargs if hasattr(config, name)]:
            setattr(config, name, kwargs.pop(name))
        return (config, kwargs) if wants_unused else config


class _LlavaLlamaConfig(LlavaConfig):
    """Model type of checkpoints trained by newer LLaVA code; read as `LlavaConfig`."""

    model_type = "llava_llama"


class _LlavaMistralConfig(LlavaConfig):
    """Model type of LLaVA on Mistral; read as `LlavaConfig`."""

    model_type = "llava_mistral"


for _config in (LlavaConfig, _LlavaLlamaConfig, _LlavaMistralConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)


def is_llava_hf_config(raw: Mapping[str, Any]) -> bool:
    """llava-hf configs nest the decoder's fields; the original ones are flat."""
    return "text_config" in raw


def read_config(raw: Mapping[str, Any], path: Path, local_files_only: bool = False) -> LlavaConfig:
    """The configuration alone, for who does not load weights. Arguments as in `llava_config`.

    Raises:
        UserError: see `llava_config`, or the vision tower is not there.
    """
    if is_llava_hf_config(raw):
        return llava_config(raw, path, None)
    check_config(raw, path)
    name = tower_name(raw, path)
    folder = find_tower(name, path, weights_inside=True, local_files_only=local_files_only)
    return llava_config(raw, path, tower_config(name, folder))


def check_config(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse what is no LLaVA on Llama or Mistral, before anything is searched or downloaded for it.

    Raises:
        UserError: another model, or a field is missing or has a value that is not supported.
    """
    model_type = raw.get("model_type")
    if model_type not in LLAVA_MODEL_TYPES:
        raise UserError(
            f"{path}: model_type {kind_of(model_type)} is not a LLaVA model with a Llama or Mistral decoder "
            f"(expected one of {', '.join(LLAVA_MODEL_TYPES)}); --model-path must be a LLaVA checkpoint"
        )
    usable(raw, LLAVA, path)
    nested = is_llava_hf_config(raw)
    # An original checkpoint without this field has LLaVA's first projector.
    projector = raw.get("mm_projector_type") or (DEFAULT_PROJECTOR if nested else "linear")
    if projector_depth(projector) is None:
        raise UserError(
            f"{path}: mm_projector_type {kind_of(projector)} is not supported, only linear, identity and mlpNx_gelu "
            "(LLaVA 1.5 and 1.6: mlp2x_gelu)"
        )
    if nested:
        for part, shape, types in (("text_config", DECODER, tuple(DECODERS)), ("vision_config", VISION, TOWER_TYPES)):
            fields = raw.get(part) or {}
            kind = fields.get("model_type", types[0]) if isinstance(fields, dict) else fields
            if not isinstance(kind, str) or kind not in types:
                what = "vision tower" if part == "vision_config" else part
                raise UserError(f"{path}: {what} of type {kind_of(kind)} is not supported, only {', '.join(types)}")
            usable(fields, shape, path, part)
        return
    missing = [name for name in REQUIRED_TEXT_FIELDS if raw.get(name) is None]
    if missing:
        raise UserError(f"{path}: missing field(s) {', '.join(missing)}; is this the config of a LLaVA checkpoint?")
    usable({name: value for name, value in raw.items() if value is not None}, DECODER, path)
    for name in ("mm_resampler_type", "s2"):
        if raw.get(name):
            raise UserError(f"{path}: {name} {kind_of(raw[name])} is not supported: this is not LLaVA 1.5 or 1.6")
    feature = raw.get("mm_vision_select_feature") or "patch"
    if feature not in SELECT_STRATEGY:
        expected = ", ".join(SELECT_STRATEGY)
        raise UserError(f"{path}: mm_vision_select_feature {kind_of(feature)}, expected one of {expected}")


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
        config = _llava_hf_config(raw, path)
    else:
        assert vision_config is not None
        config = _original_config(raw, path, vision_config)
    _check_together(config, path)
    return config


def _check_together(config: LlavaConfig, path: Path) -> None:
    """What would show only with the first picture."""
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        name = "mm_vision_select_layer"
        raise UserError(f"{path}: {name} {layer} is out of range for a vision tower of {layers} layers")
    if getattr(config, "image_aspect_ratio", None) == "anyres":
        pinpoints = getattr(config, "image_grid_pinpoints", None) or []
        try:
            pairs = parse_grid_pinpoints(pinpoints)
        except Exception:  # a text that Python's parser gives up on, or a list of anything
            pairs = None
        if pairs is None:
            raise UserError(f"{path}: image_grid_pinpoints must be pairs of numbers, got {kind_of(str(pinpoints))}")
        check_pinpoints(pairs, config.vision_config.image_size, path)


def _original_config(raw: Mapping[str, Any], path: Path, vision_config: CLIPVisionConfig) -> LlavaConfig:
    return build_config(
        LlavaConfig,
        {
            "text_config": _text_config(raw, path),
            "vision_config": vision_config,
            "image_token_index": IMAGE_TOKEN_INDEX,
            "image_seq_length": (vision_config.image_size // vision_config.patch_size) ** 2,
            "projector_hidden_act": "gelu",
            "vision_feature_select_strategy": SELECT_STRATEGY[raw.get("mm_vision_select_feature") or "patch"],
            "vision_feature_layer": -2 if raw.get("mm_vision_select_layer") is None else raw["mm_vision_select_layer"],
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
    if text.get("pad_token_id") == -1:  # none, in the first conversions of Llama
        del text["pad_token_id"]
    if mistral and "sliding_window" in raw:
        # null is a value here: no window. Left out, transformers would take 4096.
        text["sliding_window"] = raw["sliding_window"]
    return build_config(DECODERS["mistral" if mistral else "llama"], text, path)


def _llava_hf_config(raw: Mapping[str, Any], path: Path) -> LlavaConfig:
    next_fields: dict[str, Any] = {}
    if raw["model_type"] == "llava_next":
        next_fields = {
            "model_type": "llava",
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": raw.get(PINPOINTS_WH)
            or _pinpoints_wh(raw.get("image_grid_pinpoints") or DEFAULT_PINPOINTS, path),
        }
    config = build_config(LlavaConfig.from_dict, {"config_dict": {**raw, **next_fields}}, path)
    if not isinstance(config.vision_feature_layer, int):
        layers = kind_of(config.vision_feature_layer)
        raise UserError(f"{path}: vision_feature_layer must be one layer, got {layers}")
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
    except (TypeError, ValueError, OverflowError):
        got = kind_of(pinpoints)
        raise UserError(f"{path}: image_grid_pinpoints must be pairs of numbers, got {got}") from None
    symmetric = all([b, a] in pairs for a, b in pairs)
    return pairs if symmetric else [[b, a] for a, b in pairs]


def _llava_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA's own fields, under their own names: scripts and `process_images` read them from
    `model.config`.
    """
    fields = {name: value for name, value in raw.items() if name.startswith(LLAVA_FIELDS)}
    fields.setdefault("mm_use_im_start_end", False)
    # Explicit because LLaVA's own default is True, which would add a token that LLaVA 1.5 does not have.
    fields.setdefault("mm_use_im_patch_token", False)
    fields.setdefault("mm_projector_type", "linear")
    fields.setdefault("mm_patch_merge_type", "flat")
    for name in ("image_token_index", "image_seq_length", "image_token_id"):
        fields.pop(name, None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if raw.get(name) not in (None, -1):
            fields[name] = raw[name]
    return fields
