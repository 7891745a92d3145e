"""A checkpoint in two steps: what its small files say, then its weights, still mapped from disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.model.adapters import Adapter, base_named_by, is_adapter, read_adapter
from llava.model.configuration import LlavaConfig, check_config, is_llava_hf_config, llava_config
from llava.model.locate import ADAPTER_CONFIG, INDEX_FILES, SINGLE_FILES, locate, read_checkpoint_json
from llava.model.names import translate_name, translate_tower_name
from llava.model.towers import find_tower, tower_config, tower_name
from llava.model.weights import Translate, convert_weights, read_weights, weight_files
from llava.utils import UserError

TOWER_PREFIX = "model.vision_tower."
# Whoever has this tensor of the tower has the whole tower.
TOWER_MARK = "model.vision_tower.embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class Checkpoint:
    """What the small files of a checkpoint say, before its weights are read.

    Attributes:
        folder: the checkpoint.
        base: the folder of its base model, for LoRA and projector-only checkpoints.
        config: translated configuration.
        config_path: the file it is from.
        tower_folder: the vision tower's folder, if it has one.
        tower_inside: the tower's weights are among the checkpoint's own.
        adapter: what lies over the base.
        names: what `folder` or `base` was called where the weights come from: path or hub name.
        local_files_only: never use the network.
    """

    folder: Path
    base: Path | None
    config: LlavaConfig
    config_path: Path
    tower_folder: Path | None
    tower_inside: bool
    adapter: Adapter | None
    source: str
    local_files_only: bool

    def find(self, *names: str) -> Path | None:
        """The folder, of the checkpoint and its base, that has one of these files; LLaVA takes the base's first."""
        for folder in (self.base, self.folder):
            if folder is not None and any((folder / name).is_file() for name in names):
                return folder
        return None


@dataclass
class Weights:
    """All tensors of a checkpoint.

    Attributes:
        tensors: translated names, on the CPU, mapped from disk where they can be.
        files: where the decoder's weights came from.
        parts: all files with the translation of their names.
        adapter: not yet merged; its whole tensors are among `tensors` already.
    """

    tensors: dict[str, Tensor]
    files: list[Path]
    parts: list[tuple[list[Path], Translate]]
    adapter: Adapter | None

    def bytes_in(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of all tensors in a precision, and how many of them will be the process's own memory on a CPU."""
        updated = set(self.adapter.targets().values()) if self.adapter else set()
        needed = {name: tensor.numel() * dtype.itemsize for name, tensor in self.tensors.items()}
        held = [n for name, n in needed.items() if self.tensors[name].dtype != dtype or name in updated]
        return sum(needed.values()), sum(held)

    def prepare(self, dtype: torch.dtype, convert: bool) -> None:
        """Merge the adapter and, if asked, convert everything else to `dtype`."""
        keep: set[str] = set()
        if self.adapter is not None:
            self.adapter.merge(self.tensors, dtype)
            keep = {*self.adapter.full, *self.adapter.targets().values()}
        if convert:
            convert_weights(self.tensors, self.parts, dtype, keep)

    def read_again(self, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Some of the tensors, mapped anew while they are used; an adapter is merged in the base's precision."""
        adapter = self.adapter
        whole = {} if adapter is None else adapter.full
        modules = {} if adapter is None else {target: module for module, target in adapter.targets().items()}

        def updated(name: str, tensor: Tensor) -> Tensor:
            merges = adapter is not None and name in modules
            return adapter.updated(modules[name], tensor, tensor.dtype) if merges else tensor

        for files, translate in self.parts:
            for name, tensor in read_weights(files, translate, names - whole.keys()).items():
                yield name, updated(name, tensor)
        for name in sorted(names & whole.keys()):
            yield name, updated(name, whole[name])


def look_up(model_path: str, model_base: str | None, local_files_only: bool) -> Checkpoint:
    """Configuration, vision tower and adapter of a checkpoint; of a hub repository only small files are fetched.

    Arguments as in `load_pretrained_model`.

    Raises:
        UserError: anything that is missing or wrong.
    """
    folder = locate(model_path, "checkpoint", False, local_files_only)
    base = locate(model_base, "base model", False, local_files_only) if model_base else None
    adapter = None
    if base is None and (folder / ADAPTER_CONFIG).is_file():
        _refuse_without_base(folder)
    if base is not None:
        locate(model_path, "checkpoint", True, local_files_only)
        if not is_adapter(folder):
            raise UserError(
                f"{folder}: has neither LoRA matrices (adapter_config.json) nor mm_projector.bin to put on a base "
                "model; leave --model-base out if this is a whole checkpoint"
            )
    # LLaVA's adapters carry the whole configuration; those that peft alone wrote go by their base's.
    path = (base if base is not None and not (folder / "config.json").is_file() else folder) / "config.json"
    if base is None and not path.is_file():
        _refuse_without_base(folder)
    raw = read_checkpoint_json(path)
    # What is wrong with the decoder's half comes first: finding it out needs no download of a tower.
    check_config(raw, path)
    if base is not None:
        adapter = read_adapter(folder)
    source = model_base if model_base else model_path
    if is_llava_hf_config(raw):
        config, tower_folder, inside = llava_config(raw, path, None), None, True
    else:
        names = set(_names(source, base or folder, local_files_only))
        inside = any(name.startswith(TOWER_PREFIX) for name in names) or (
            adapter is not None and TOWER_MARK in adapter.full
        )
        tower = tower_name(raw, path)
        tower_folder = find_tower(tower, path, inside, local_files_only)
        config = llava_config(raw, path, tower_config(tower, tower_folder))
    return Checkpoint(folder, base, config, path, tower_folder, inside, adapter, source, local_files_only)


def read_checkpoint_weights(checkpoint: Checkpoint) -> Weights:
    """All weights, those of a separate vision tower and the whole tensors of an adapter included.

    Raises:
        UserError: a file is missing or broken, or the adapter does not fit the base.
    """
    folder = checkpoint.base or checkpoint.folder
    _fetch(checkpoint.source, folder, checkpoint.local_files_only)
    files = weight_files(folder)
    parts: list[tuple[list[Path], Translate]] = [(files, translate_name)]
    tensors = read_weights(files, translate_name)
    if checkpoint.tower_folder is not None and not checkpoint.tower_inside:
        tower_files = weight_files(checkpoint.tower_folder)
        parts.append((tower_files, translate_tower_name))
        tensors |= read_weights(tower_files, translate_tower_name)
    if checkpoint.adapter is not None:
        tensors |= checkpoint.adapter.full
        checkpoint.adapter.check(tensors)
    return Weights(tensors, files, parts, checkpoint.adapter)


def _names(source: str, folder: Path, local_files_only: bool) -> Iterable[str]:
    """Translated names of all tensors: from the index, so that no weights need be fetched for it, or the files."""
    if not any((folder / name).is_file() for name in SINGLE_FILES):
        for index in INDEX_FILES:
            if (folder / index).is_file():
                stored: Any = read_checkpoint_json(folder / index).get("weight_map")
                names = map(translate_name, stored if isinstance(stored, dict) else ())
                return [name for name in names if name is not None]
    _fetch(source, folder, local_files_only)
    return read_weights(weight_files(folder), translate_name)


def _fetch(source: str, folder: Path, local_files_only: bool) -> None:
    locate(source, "checkpoint", True, local_files_only)
    _refuse_without_base(folder)


def _refuse_without_base(folder: Path) -> None:
    """Refuse a folder that holds only what training changed."""
    if is_adapter(folder) and not any((folder / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES)):
        named = base_named_by(folder)
        raise UserError(
            f"{folder}: holds LoRA matrices or a projector only: pass --model-base with the model it was trained on"
            + (f" ({named})" if named else "")
        )
