"""Checkpoints that hold only what training changed: LoRA matrices and projectors, laid over a base model's weights.

Works on weights by name, before any model is built: low-rank updates are added in float32 and rounded once, so neither
a second model nor a package for adapters is needed, and 8-bit or 4-bit loading quantizes the sum. Knows nothing of
configurations.

LLaVA's files: `adapter_config.json` and `adapter_model.safetensors` or `.bin` (LoRA matrices, written by peft),
`non_lora_trainables.bin` (whatever else was trained: the projector, sometimes the vision tower), `mm_projector.bin`
(the first training stage).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.model.checkpoint import read_json, translate_name
from llava.model.weights import LISTED_NAMES, read_weights
from llava.utils import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_WEIGHTS = "non_lora_trainables.bin"
PROJECTOR_WEIGHTS = "mm_projector.bin"
ADAPTER_FILES = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, NON_LORA_WEIGHTS, PROJECTOR_WEIGHTS)
_MATRIX = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
# Settings of peft that change the formula W + scale * B A unless they are off.
_OTHER_FORMULAS = (
    "use_dora",
    "use_qalora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter or a projector that needs a base model."""
    return any((folder / name).is_file() for name in ADAPTER_FILES)


def base_named_by(folder: Path) -> str | None:
    """The base model that adapter_config.json names, for messages."""
    path = folder / ADAPTER_CONFIG
    return read_json(path).get("base_model_name_or_path") if path.is_file() else None


def apply_adapter(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Lay the adapter or projector in `folder` over a base model's `weights`, in place.

    Args:
        weights: translated names; tensors that are not changed stay as they are (mapped from disk).
        folder: the trained checkpoint.
        dtype: the precision the model will run in: as in LLaVA the base is rounded to it, then the update is added.

    Raises:
        UserError: files missing or broken, settings that need another formula than LoRA's, updates without a weight.
    """
    lora = (folder / ADAPTER_CONFIG).is_file()
    if not lora and any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"{folder / ADAPTER_CONFIG}: no such file, but the LoRA weights need it; copy it again")
    if (folder / NON_LORA_WEIGHTS).is_file():
        if not lora:
            raise UserError(f"{folder}: has {NON_LORA_WEIGHTS} but no {ADAPTER_CONFIG} and adapter_model.*; copy them")
        weights |= _full_tensors(folder / NON_LORA_WEIGHTS)
    elif not lora:
        weights |= _full_tensors(folder / PROJECTOR_WEIGHTS)
    if lora:
        _merge_lora(weights, folder, dtype)


def _full_tensors(file: Path) -> dict[str, Tensor]:
    tensors = read_weights([file], lambda name: translate_name(_without_wrapper(name)))
    if not tensors:
        raise UserError(f"{file}: holds no tensors; copy or download it again")
    return tensors


def _without_wrapper(name: str) -> str:
    # peft puts `base_model.model.` before the names of the model it wraps; LLaVA's trainer sometimes half of it.
    if name.startswith("base_model.model."):
        return name.removeprefix("base_model.model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def _merge_lora(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    path = folder / ADAPTER_CONFIG
    settings = read_json(path)
    if settings.get("peft_type", "LORA") != "LORA":
        kind = settings["peft_type"]
        raise UserError(f"{path}: peft_type {kind!r} is not supported, only LORA; merge it with peft first")
    for name in _OTHER_FORMULAS:
        if settings.get(name):
            raise UserError(f"{path}: {name} {settings[name]!r} is not supported; merge the adapter with peft first")
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: has {ADAPTER_CONFIG} but no {' or '.join(ADAPTER_WEIGHTS)}; copy the LoRA weights")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_weights([file], lambda name: name).items():
        found = _MATRIX.match(name)
        if found is not None:
            pairs.setdefault(found["module"], {})[found["side"]] = tensor
        elif ".lora_" in name:
            raise UserError(f"{file}: tensor {name!r} is not a LoRA matrix of a linear layer; merge it with peft first")
        else:
            # Modules trained in full beside LoRA (modules_to_save, biases).
            target = translate_name(_without_wrapper(name).replace(".modules_to_save.default.", "."))
            if target is not None:
                weights[target] = tensor
    if not pairs:
        raise UserError(f"{file}: holds no LoRA matrices; copy or download it again")
    unknown = sorted(module for module in pairs if _target(module) not in weights)
    if unknown:
        more = f", and {len(unknown) - LISTED_NAMES} more" if len(unknown) > LISTED_NAMES else ""
        raise UserError(
            f"{file}: the base model has no weights for {len(unknown)} LoRA update(s) "
            f"({', '.join(unknown[:LISTED_NAMES])}{more}); is --model-base the model it was trained on?"
        )
    for module, pair in sorted(pairs.items()):
        target = _target(module)
        weights[target] = _updated(weights[target], pair, _scale(settings, module, pair), dtype, f"{file}: {module}")


def _target(module: str) -> str:
    return str(translate_name(_without_wrapper(module) + ".weight"))


def _scale(settings: Mapping[str, Any], module: str, pair: Mapping[str, Tensor]) -> float:
    """alpha / rank, or alpha / sqrt(rank); the matrices tell the rank, which may differ between modules."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", _without_wrapper(module)):
            alpha = value
            break
    rank = pair["A"].shape[0] if "A" in pair else 1
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _updated(base: Tensor, pair: Mapping[str, Tensor], scale: float, dtype: torch.dtype, where: str) -> Tensor:
    if set(pair) != {"A", "B"}:
        raise UserError(f"{where}: only lora_{next(iter(pair))} is there, both lora_A and lora_B are needed")
    down, up = pair["A"].float(), pair["B"].float()
    if down.ndim != 2 or up.ndim != 2 or (*up.shape[:1], *down.shape[1:]) != base.shape or up.shape[1] != len(down):
        raise UserError(
            f"{where}: matrices {list(up.shape)} and {list(down.shape)} do not fit the base's weight "
            f"{list(base.shape)}; is --model-base the model it was trained on?"
        )
    return (base.to(dtype).float() + (up @ down) * scale).to(dtype)
