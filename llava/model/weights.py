"""Weight files of a checkpoint folder: which there are, reading them safely, comparing names and shapes
with the model's.

Knows file formats (safetensors, PyTorch `.bin`, sharded or not), not models.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.model.checkpoint import read_json
from llava.utils import UserError

# In the order they are looked for; an index lists the shards.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LISTED_NAMES = 12
PIECE_BYTES = 64 << 20


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: one file, or the shards named by an index. safetensors is preferred
    over `.bin`.

    Raises:
        UserError: no weights, a broken index, or a shard that is not there.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
    raise UserError(
        f"{folder}: no weights found (looked for {', '.join((*SINGLE_FILES, *INDEX_FILES))}); "
        "copy or download the checkpoint again"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; copy or download it again")
    files = [index.parent / name for name in sorted(set(map(str, weight_map.values())))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, but {index.name} lists it; copy or download this shard")
    return files


def read_weights(
    files: Iterable[Path], translate: Callable[[str], str | None], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors of `files` on the CPU, under translated names; names translated to None are left out.

    Tensors are mapped from disk where the format allows it, so nothing is copied before the model asks for it, and a
    model of the same precision on the CPU never copies them.

    Args:
        files: safetensors and `.bin` files.
        translate: file name of a tensor -> name in the result, or None.
        dtype: convert what is stored otherwise. Done piece by piece, the pages of what has been converted go back to
            the system; left to the model, the whole checkpoint would stay in memory beside the converted one.

    Raises:
        UserError: a file cannot be read, or two tensors get the same name.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        read = _read_safetensors if file.suffix == ".safetensors" else _read_bin
        found = read(file, translate, None)
        if dtype is not None:
            names = [name for name, tensor in found.items() if tensor.is_floating_point() and tensor.dtype != dtype]
            pieces = _pieces(names, found)
            for name in names:
                del found[name]
            for piece in pieces:
                # A fresh mapping per piece: closing it is what lets go of the pages.
                mapped = read(file, translate, piece)
                found |= {name: mapped.pop(name).to(dtype) for name in piece}
        for name, tensor in found.items():
            if name in weights:
                raise UserError(f"{file}: tensor {name!r} appears twice in the checkpoint")
            weights[name] = tensor
    return weights


def _pieces(names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[set[str]]:
    """Groups of about `PIECE_BYTES`."""
    pieces: list[set[str]] = []
    room = 0
    for name in names:
        if room <= 0:
            pieces.append(set())
            room = PIECE_BYTES
        pieces[-1].add(name)
        room -= tensors[name].nbytes
    return pieces


def _read_safetensors(file: Path, translate: Callable[[str], str | None], only: set[str] | None) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as archive:
            names = {name: translate(name) for name in archive.keys()}  # noqa: SIM118 - not a mapping
            return {
                new: archive.get_tensor(name)
                for name, new in names.items()
                if new is not None and (only is None or new in only)
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(file, error) from None


def _read_bin(file: Path, translate: Callable[[str], str | None], only: set[str] | None) -> dict[str, Tensor]:
    try:
        # weights_only: a pickle from somewhere else must not run code. Only the zip format can be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _unreadable(file, error) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: holds {type(content).__name__}, not a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in content.items():
        new = translate(name)
        if new is not None and isinstance(tensor, Tensor) and (only is None or new in only):
            tensors[new] = tensor
    return tensors


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
    return UserError(f"{file}: weights cannot be read ({reason}); the file is damaged, copy or download it again")


def check_weights(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    where: Path,
    optional: Iterable[str] = (),
    files: Sequence[Path] = (),
) -> None:
    """Demand the same names and shapes on both sides.

    Args:
        weights: translated checkpoint tensors.
        expected: the model's state dictionary (shapes only; may be on the meta device).
        where: checkpoint folder, for the message.
        optional: names that may be missing (tied weights).
        files: where the weights came from, to point at shards beside them that an index forgot.

    Raises:
        UserError: lists missing and unexpected names and wrong shapes.
    """
    missing = sorted(set(expected) - set(weights) - set(optional))
    unexpected = sorted(set(weights) - set(expected))
    shapes = [
        f"{name} {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in sorted(weights.items())
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({_some(names)})"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of wrong shape"))
        if names
    ]
    if problems:
        forgotten = _forgotten_shards(files) if missing else []
        hint = f"; the folder's index does not list {_some(forgotten)}: copy or download it again" if forgotten else ""
        raise UserError(f"{where}: weights do not fit config.json: {'; '.join(problems)}{hint}")


def _forgotten_shards(files: Sequence[Path]) -> list[str]:
    shards = [file for file in files if "-of-" in file.name]
    beside = {found for file in shards for found in file.parent.glob(f"*-of-*{file.suffix}")}
    return sorted(file.name for file in beside - set(shards))


def _some(names: list[str]) -> str:
    more = f", and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more
