"""Checkpoints that hold only what training changed: LoRA matrices and projectors, laid over a base model's weights.

Works on weights by name, before any model is built: low-rank updates are added in float32 and rounded once, so neither
a second model nor a package for adapters is needed, and 8-bit or 4-bit loading quantizes the sum.

LLaVA's files: `adapter_config.json` and `adapter_model.safetensors` or `.bin` (LoRA matrices, written by peft),
`non_lora_trainables.bin` (whatever else was trained: the projector, sometimes the vision tower), `mm_projector.bin`
(the first training stage).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.model.fields import ADAPTER, usable
from llava.model.locate import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    NON_LORA_WEIGHTS,
    PROJECTOR_WEIGHTS,
    read_checkpoint_json,
)
from llava.model.names import translate_name
from llava.model.weights import LISTED_NAMES, read_weights
from llava.utils import UserError, kind_of

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
# A repeated group that repeats inside can take exponential time.
_SLOW_PATTERN = re.compile(r"[*+}]\)[*+{?]|.{200}", re.DOTALL)


@dataclass(frozen=True)
class Adapter:
    """What training changed.

    Attributes:
        full: whole tensors by translated name, which take the place of the base's.
        pairs: LoRA matrices by module, as the file names it: `{"A": [rank, in], "B": [out, rank]}`.
        settings: of adapter_config.json.
        file: where the matrices come from, for messages.
    """

    full: dict[str, Tensor]
    pairs: Mapping[str, Mapping[str, Tensor]]
    settings: Mapping[str, Any]
    file: Path

    def targets(self) -> dict[str, str]:
        """Module of the file -> translated name of the weight it updates."""
        return {module: _target(module) for module in self.pairs}

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Demand that every update has a weight of its shape.

        Raises:
            UserError: lists the updates without one, or names the first that does not fit.
        """
        unknown = sorted(module for module, target in self.targets().items() if target not in weights)
        if unknown:
            more = f", and {len(unknown) - LISTED_NAMES} more" if len(unknown) > LISTED_NAMES else ""
            raise UserError(
                f"{self.file}: the base model has no weights for {len(unknown)} LoRA update(s) "
                f"({', '.join(unknown[:LISTED_NAMES])}{more}); is --model-base the model it was trained on?"
            )
        for module, target in sorted(self.targets().items()):
            _check_pair(weights[target], self.pairs[module], f"{self.file}: {module}")

    def merge(self, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Add the updates to `weights`, in place.

        Args:
            weights: translated names; tensors that are not changed stay as they are (mapped from disk).
            dtype: the precision the model will run in: as in LLaVA the base is rounded to it, then the update is added.
        """
        for module, target in sorted(self.targets().items()):
            weights[target] = self.updated(module, weights[target], dtype)

    def updated(self, module: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight of one module with its update, in `dtype`; `weight` stays as it is."""
        pair = self.pairs[module]
        update = (pair["B"].float() @ pair["A"].float()) * _scale(self.settings, module, pair)
        return (weight.to(dtype).float() + update).to(dtype)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter or a projector that needs a base model."""
    return any((folder / name).is_file() for name in ADAPTER_FILES)


def base_named_by(folder: Path) -> str | None:
    """The base model that adapter_config.json names, for messages."""
    path = folder / ADAPTER_CONFIG
    return _settings(path).get("base_model_name_or_path") if path.is_file() else None


def read_adapter(folder: Path) -> Adapter:
    """The adapter or projector in `folder`.

    Raises:
        UserError: files missing or broken, settings that need another formula than LoRA's.
    """
    lora = (folder / ADAPTER_CONFIG).is_file()
    if not lora and any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"{folder / ADAPTER_CONFIG}: no such file, but the LoRA weights need it; copy it again")
    full: dict[str, Tensor] = {}
    if (folder / NON_LORA_WEIGHTS).is_file():
        if not lora:
            raise UserError(f"{folder}: has {NON_LORA_WEIGHTS} but no {ADAPTER_CONFIG} and adapter_model.*; copy them")
        full = _full_tensors(folder / NON_LORA_WEIGHTS)
    elif not lora:
        full = _full_tensors(folder / PROJECTOR_WEIGHTS)
    if not lora:
        return Adapter(full, {}, {}, folder / PROJECTOR_WEIGHTS)
    return _read_lora(folder, full)


def _settings(path: Path) -> dict[str, Any]:
    return usable(read_checkpoint_json(path), ADAPTER, path)


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


def _read_lora(folder: Path, full: dict[str, Tensor]) -> Adapter:
    path = folder / ADAPTER_CONFIG
    settings = _settings(path)
    if settings.get("peft_type", "LORA") != "LORA":
        kind = kind_of(settings["peft_type"])
        raise UserError(f"{path}: peft_type {kind} is not supported, only LORA; merge it with peft first")
    for name in _OTHER_FORMULAS:
        if settings.get(name):
            value = kind_of(settings[name]).capitalize()
            raise UserError(f"{path}: {name} {value} is not supported; merge the adapter with peft first")
    for pattern in settings.get("alpha_pattern") or {}:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise UserError(f"{path}: alpha_pattern {kind_of(pattern)} is no regular expression") from None
        if _SLOW_PATTERN.search(pattern):
            raise UserError(f"{path}: alpha_pattern {kind_of(pattern)} is too complicated; merge with peft first")
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
                full[target] = tensor
    if not pairs:
        raise UserError(f"{file}: holds no LoRA matrices; copy or download it again")
    return Adapter(full, pairs, settings, file)


def _target(module: str) -> str:
    return str(translate_name(_without_wrapper(module) + ".weight"))


def _scale(settings: Mapping[str, Any], module: str, pair: Mapping[str, Tensor]) -> float:
    """alpha / rank, or alpha / sqrt(rank); the matrices tell the rank, which may differ between modules."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", _without_wrapper(module)):
            alpha = value
            break
    rank = len(pair["A"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _check_pair(base: Tensor, pair: Mapping[str, Tensor], where: str) -> None:
    if set(pair) != {"A", "B"}:
        raise UserError(f"{where}: only lora_{next(iter(pair))} is there, both lora_A and lora_B are needed")
    down, up = pair["A"], pair["B"]
    fits = down.ndim == up.ndim == base.ndim == 2 and (len(up), down.shape[1]) == tuple(base.shape)
    if not fits or up.shape[1] != len(down) or len(down) == 0:
        raise UserError(
            f"{where}: matrices {list(up.shape)} and {list(down.shape)} do not fit the base's weight "
            f"{list(base.shape)}; is --model-base the model it was trained on?"
        )
    if not all(tensor.is_floating_point() for tensor in (down, up, base)):
        raise UserError(f"{where}: the matrices or the base's weight are no floating point numbers")
