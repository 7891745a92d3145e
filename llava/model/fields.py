"""What the fields of a checkpoint's JSON files must look like, and how far the weights bear them out.

Fields that are not named here are kept as they are and mean nothing to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava.jsonfiles import MAX_DIGITS
from llava.schema import (
    ANYTHING,
    FLAG,
    TEXT,
    WHOLE,
    Fields,
    Kind,
    ListOf,
    MapOf,
    Problem,
    between,
    check,
    one_of,
    optional,
)
from llava.utils import UserError

MAX_TILES = 100
"""Tiles of one image under `image_grid_pinpoints`; LLaVA-1.6 has 4."""
POSITIVE = between(0, 1e30)
COUNT = between(1, 10**7, WHOLE)
# A list of layers is made from this number before any weight is looked at.
LAYERS = between(1, 1000, WHOLE)
# Some published configs say "no limit" with a number beyond 64 bits.
LENGTH = Kind(
    "a whole number of at least 1",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 10**MAX_DIGITS,
)


class OneOrMore:
    """One value of a shape, or a list of such values."""

    def __init__(self, shape: Any):
        self.shape = shape

    def problem(self, value: Any) -> Problem | None:
        return ListOf(self.shape, least=1).problem(value) if isinstance(value, list) else self.shape.problem(value)


TOKEN = between(-1, 10**7, WHOLE)  # -1: none, in the first conversions of Llama
TOKENS = {
    "bos_token_id?": optional(OneOrMore(TOKEN)),
    "eos_token_id?": optional(OneOrMore(TOKEN)),
    "pad_token_id?": optional(TOKEN),
}
_NULLABLE = {
    "head_dim": COUNT,
    "num_key_value_heads": COUNT,
    "rope_theta": between(1e-3, 1e30),
    "rope_scaling": MapOf(ANYTHING),
    "rope_parameters": MapOf(ANYTHING),
    "pretraining_tp": COUNT,
    "sliding_window": COUNT,
}
_DECODER = {
    "hidden_act": TEXT,
    "max_position_embeddings": between(1, 10**9, WHOLE),
    "initializer_range": POSITIVE,
    "rms_norm_eps": between(0, 1),
    "attention_bias": FLAG,
    "attention_dropout": between(0, 1),
    "mlp_bias": FLAG,
    "use_cache": FLAG,
    "tie_word_embeddings": FLAG,
}
_SIZES = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": COUNT,
}
DECODER = Fields(
    {f"{name}?": optional(shape) for name, shape in _NULLABLE.items()}
    | {f"{name}?": shape for name, shape in (_DECODER | _SIZES).items()}
    | TOKENS
)
VISION = Fields(
    {
        f"{name}?": shape
        for name, shape in {
            "hidden_size": COUNT,
            "intermediate_size": COUNT,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": COUNT,
            "image_size": between(1, 10**5, WHOLE),
            "patch_size": between(1, 10**4, WHOLE),
            "projection_dim": COUNT,
            "num_channels": between(1, 100, WHOLE),
            "hidden_act": TEXT,
            "layer_norm_eps": between(0, 1),
            "attention_dropout": between(0, 1),
            "initializer_factor": POSITIVE,
            "initializer_range": POSITIVE,
        }.items()
    }
)
LLAVA = Fields(
    {
        f"{name}?": optional(shape)
        for name, shape in {
            "image_aspect_ratio": TEXT,
            "image_grid_pinpoints": Kind("a list or its text", lambda value: isinstance(value, list | str)),
            "image_token_index": between(-(10**7), 10**7, WHOLE),
            "anyres_resolution_rule": one_of("fill", "effective"),
            "max_sequence_length": COUNT,
            "mm_image_adapter": ListOf(COUNT, least=2, most=100),
            "mm_patch_merge_type": TEXT,
            "mm_projector_type": TEXT,
            "mm_use_im_patch_token": FLAG,
            "mm_use_im_start_end": FLAG,
            "mm_vision_select_feature": TEXT,
            "mm_vision_select_layer": between(-1000, 1000, WHOLE),
            "multimodal_projector_bias": FLAG,
            "projector_hidden_act": TEXT,
            "tie_word_embeddings": FLAG,
            "tokenizer_model_max_length": LENGTH,
            "tokenizer_padding_side": one_of("left", "right"),
            "vision_feature_select_strategy": one_of("default", "full"),
        }.items()
    }
)
GENERATION = Fields(TOKENS)
# Ids between the vocabulary and an added token would be filled up, one by one.
ADDED_TOKENS = MapOf(between(0, 10**6, WHOLE))
SPECIAL_TOKENS = MapOf(ANYTHING)


class _AddedTokensDecoder:
    """Ids of added tokens, as the keys of an object."""

    def problem(self, value: Any) -> Problem | None:
        problem = MapOf(MapOf(ANYTHING)).problem(value)
        if problem is None and not all(re.fullmatch(r"[0-9]{1,6}", key) for key in value):
            return "", "must have ids below a million for keys"
        return problem


TOKENIZER = Fields(
    {
        "added_tokens_decoder?": optional(_AddedTokensDecoder()),
        "tokenizer_class?": optional(TEXT),
        "legacy?": optional(FLAG),
        "add_bos_token?": optional(FLAG),
        "add_eos_token?": optional(FLAG),
        "model_max_length?": optional(
            Kind("a number above 0", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v > 0)
        ),
        "padding_side?": optional(one_of("left", "right")),
    }
)
_SIDE = between(1, 10**5, WHOLE)


class _Size:
    """A side in pixels, as a number or in an object."""

    def problem(self, value: Any) -> Problem | None:
        return (MapOf(optional(_SIDE), least=1) if isinstance(value, dict) else _SIDE).problem(value)


_COLOR = ListOf(between(-1e6, 1e6), 3, 3)
PREPROCESSOR = Fields(
    {
        f"{name}?": optional(shape)
        for name, shape in {
            "crop_size": _Size(),
            "size": _Size(),
            "image_mean": _COLOR,
            "image_std": _COLOR,
            "rescale_factor": between(0, 1e6),
            "resample": between(0, 5, WHOLE),
            "do_resize": FLAG,
            "do_center_crop": FLAG,
            "do_normalize": FLAG,
            "do_rescale": FLAG,
            "do_convert_rgb": FLAG,
        }.items()
    }
)
ADAPTER = Fields(
    {
        "peft_type?": TEXT,
        "base_model_name_or_path?": optional(TEXT),
        "lora_alpha?": between(-1e6, 1e6),
        "alpha_pattern?": optional(MapOf(between(-1e6, 1e6))),
        "use_rslora?": optional(FLAG),
    }
)


def usable(fields: Any, shape: Any, path: Path, part: str = "") -> Any:
    """`fields`, if it has this shape.

    Args:
        fields: content of a configuration, or of a part of it.
        shape: one of this module's.
        path: the file.
        part: name of the part in the file.

    Raises:
        UserError: names file and field.
    """
    return check(fields, shape, f"{path}: not a usable configuration{': ' + part if part else ''}")


# --- against the weights ---------------------------------------------------------------------------------------

# Deeper than any model; longer numbers are no indices.
_INDEX = r"(\d{1,6})"
_STACKS = {
    "num_hidden_layers": re.compile(rf"^model\.language_model\.layers\.{_INDEX}\."),
    "num_hidden_layers of the vision tower": re.compile(rf"^model\.vision_tower\.encoder\.layers\.{_INDEX}\."),
    "layers of mm_projector_type": re.compile(rf"^model\.multi_modal_projector\.linear_{_INDEX}\."),
}


def check_depths(
    names: Iterable[str], decoder_layers: int, tower_layers: int, projector_layers: int, path: Path
) -> None:
    """Demand that the weights have as many layers as the configuration says, before a model of that depth is built.

    Fewer layers than weights are left to the comparison of all names, which lists them.

    Args:
        names: translated names of all weights.
        decoder_layers: as configured; so are the other two.
        tower_layers: of the vision tower.
        projector_layers: linear layers of the projector.
        path: config.json, for the message.

    Raises:
        UserError: the configuration asks for layers that the weights do not have.
    """
    names = list(names)
    said = (decoder_layers, tower_layers, projector_layers)
    for (field, pattern), wanted in zip(_STACKS.items(), said, strict=True):
        found = {int(match.group(1)) for match in map(pattern.match, names) if match}
        # Some missing layers are told by name; a number out of all proportion is told as such.
        if wanted > 2 * len(found) + 64:
            raise UserError(f"{path}: {field} is {wanted}, but the weights have {len(found)}; correct config.json")


def check_pinpoints(pairs: Iterable[tuple[int, int]], side: int, path: Path) -> None:
    """Demand resolutions that can be tiled.

    Args:
        pairs: (width, height) in pixels.
        side: of the vision tower's images, in pixels.
        path: config.json, for the message.

    Raises:
        UserError: none at all, below one pixel, or more than `MAX_TILES` tiles.
    """
    pairs = list(pairs)
    if not pairs or len(pairs) > 10_000:
        raise UserError(f"{path}: image_grid_pinpoints must name 1 to 10,000 resolutions, found {len(pairs)}")
    for width, height in pairs:
        if min(width, height) < 1 or width * height > MAX_TILES * side * side:
            raise UserError(
                f"{path}: image_grid_pinpoints names {width} x {height} pixels; a resolution may have up to "
                f"{MAX_TILES} tiles of {side} x {side}"
            )


def check_generation(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The token ids of a generation_config.json.

    Raises:
        UserError: they are none.
    """
    usable(raw, GENERATION, path)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: raw[name] for name in names if raw.get(name, -1) != -1}
