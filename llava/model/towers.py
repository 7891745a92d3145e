"""The vision tower that a checkpoint names: where it is, and its configuration.

LLaVA 1.5 keeps the tower in a folder or repository of its own; 1.6 carries the tower's weights and needs the name for
its shape alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from llava.model.fields import VISION, usable
from llava.model.locate import locate, read_checkpoint_json
from llava.utils import UserError, describe_error, kind_of

logger = logging.getLogger(__name__)

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


def tower_name(raw: Mapping[str, Any], path: Path) -> str:
    """Folder or hub name of the vision tower that an original config.json names."""
    name = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not name:
        raise UserError(f"{path}: missing field mm_vision_tower (folder or hub name of the CLIP tower)")
    if not isinstance(name, str) or not name.isprintable() or len(name) > 500:
        raise UserError(
            f"{path}: mm_vision_tower {kind_of(name)} is no name of a folder or of a hub repository (the CLIP tower)"
        )
    return name


def known_tower(name: str) -> str | None:
    """The published tower with the same last path component: training writes the path on its own machine."""
    last = _last(name)
    return next((known for known in KNOWN_TOWERS if _last(known) == last), None)


def find_tower(name: str, path: Path, weights_inside: bool, local_files_only: bool = False) -> Path | None:
    """The vision tower's folder; None for a published tower whose configuration is known and whose weights are not
    needed.

    Looked for beside config.json first, under the name and under its last component; then as any checkpoint.

    Args:
        name: what config.json names.
        path: that config.json.
        weights_inside: the checkpoint itself has the tower's weights: only the tower's small files are needed.
        local_files_only: never use the network.

    Raises:
        UserError: the tower is not there; says where to put it.
    """
    known, last = known_tower(name), _last(name)
    near = path.parent / name
    if not os.path.isabs(name) and os.path.isdir(near):
        return near
    if weights_inside and name in KNOWN_TOWERS:
        return None
    if not os.path.isdir(os.path.expanduser(name)):
        for place in (known, last):
            if place and place != name and os.path.isdir(path.parent / place):
                logger.warning("%s: no such folder; the vision tower is taken from %s", name, path.parent / place)
                return path.parent / place
    try:
        return locate(name, "vision tower", not weights_inside, local_files_only)
    except UserError as error:
        if weights_inside and known is not None:
            logger.warning(
                "%s: no such vision tower; its weights are in the checkpoint, and by its name it has the shape of %s",
                name,
                known,
            )
            return None
        wanted = path.parent / (known or (last if os.path.isabs(os.path.expanduser(name)) else name))
        raise UserError(
            f"{error}; {path} names it as mm_vision_tower: put a copy of the tower (or a link to one) at {wanted}, "
            "or write the path of a local copy there"
        ) from None


def tower_config(name: str, folder: Path | None) -> CLIPVisionConfig:
    """Configuration of a tower that `find_tower` found."""
    if folder is None:
        return CLIPVisionConfig(**KNOWN_TOWERS[known_tower(name)])
    return vision_config_from_folder(folder)


def vision_config_from_folder(folder: Path) -> CLIPVisionConfig:
    """The tower's configuration from a CLIP folder (full CLIP or vision model only)."""
    path = folder / "config.json"
    raw = read_checkpoint_json(path)
    if raw.get("model_type") == "clip":
        if not isinstance(raw.get("vision_config") or {}, dict):
            raise UserError(f"{path}: vision_config must be an object; copy or download it again")
        raw = {**dict(raw.get("vision_config") or {}), "model_type": "clip_vision_model"}
    if raw.get("model_type") != "clip_vision_model":
        kind = ascii(raw.get("model_type"))[:80]
        raise UserError(f"{path}: vision tower of type {kind}; only CLIP towers are supported")
    return build_config(CLIPVisionConfig, usable(raw, VISION, path), path)


def build_config(make: Any, fields: dict[str, Any], path: Path) -> Any:
    """A configuration of transformers, which validates its fields with several exception types."""
    try:
        return make(**fields)
    except Exception as error:
        reason = describe_error(error)[:300]
        raise UserError(f"{path}: not a usable configuration ({reason})") from None


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
