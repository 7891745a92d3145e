"""Weight files of a checkpoint folder: which there are, reading them safely, converting them, comparing names and
shapes with the model's.

Formats: safetensors and PyTorch `.bin`, sharded or not.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from llava.model.locate import INDEX_FILES, SINGLE_FILES, refuse_pointer, shard_names
from llava.utils import UserError, describe_error

LISTED_NAMES = 12
PIECE_BYTES = 64 << 20
PROGRESS_BYTES = 1 << 30
"""Conversions of more than this show how far they are."""
Translate = Callable[[str], str | None]


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
    files = [index.parent / name for name in shard_names(index)]
    for file in files:
        if not os.path.isfile(file):  # unlike Path's, it knows no name that is too long to ask for
            raise UserError(f"{file}: no such file, but {index.name} lists it; copy or download this shard")
    return files


def read_weights(files: Iterable[Path], translate: Translate, only: set[str] | None = None) -> dict[str, Tensor]:
    """All tensors of `files` on the CPU, under translated names; names translated to None are left out.

    Tensors are mapped from disk where the format allows it, so nothing is copied before the model asks for it, and a
    model of the same precision on the CPU never copies them.

    Args:
        files: safetensors and `.bin` files.
        translate: file name of a tensor -> name in the result, or None.
        only: these names of the result and no others.

    Raises:
        UserError: a file cannot be read, or two tensors get the same name.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read(file, translate, only).items():
            if name in weights:
                raise UserError(f"{file}: tensor {name!r} appears twice in the checkpoint")
            weights[name] = tensor
    return weights


def convert_weights(
    weights: dict[str, Tensor], parts: Iterable[tuple[Sequence[Path], Translate]], dtype: torch.dtype, keep: set[str]
) -> None:
    """Convert what `read_weights` has mapped to `dtype`, in place.

    Done piece by piece with mappings of their own; the pages of what has been converted go back to the system. Left to
    the model, the whole checkpoint would stay in memory beside the converted one.

    Args:
        weights: changed; no other reference to a mapped tensor should be left.
        parts: where they came from, as `read_weights` was called.
        dtype: floating point tensors of another type are converted.
        keep: names that no longer are what the files hold.
    """
    todo = [name for name, tensor in weights.items() if name not in keep and tensor.dtype != dtype]
    total = sum(weights[name].nbytes for name in todo)
    with tqdm(
        total=total,
        desc=f"converting to {str(dtype).removeprefix('torch.')}",
        unit="B",
        unit_scale=True,
        disable=total < PROGRESS_BYTES,
        mininterval=0.5 if sys.stderr.isatty() else 15,
    ) as progress:
        for file, translate in [(file, translate) for files, translate in parts for file in files]:
            here = set(_read(file, translate, None)) & set(todo)
            if not zipfile.is_zipfile(file) and file.suffix != ".safetensors":
                # An old pickle cannot be mapped: reading it again for every piece would take for ever.
                for name in here:
                    progress.update(weights[name].nbytes)
                    weights[name] = weights[name].to(dtype)
                continue
            pieces = _pieces([name for name in todo if name in here], weights)
            for name in here:
                del weights[name]
            for piece in pieces:
                # A fresh mapping per piece: closing it is what lets go of the pages.
                mapped = _read(file, translate, piece)
                progress.update(sum(tensor.nbytes for tensor in mapped.values()))
                weights |= {name: mapped.pop(name).to(dtype) for name in piece}


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


def _read(file: Path, translate: Translate, only: set[str] | None) -> dict[str, Tensor]:
    refuse_pointer(file)
    return (_read_safetensors if file.suffix == ".safetensors" else _read_bin)(file, translate, only)


def _read_safetensors(file: Path, translate: Translate, only: set[str] | None) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as archive:
            names = {name: translate(name) for name in archive.keys()}  # noqa: SIM118 - not a mapping
            return {
                new: archive.get_tensor(name)
                for name, new in names.items()
                if new is not None and (only is None or new in only)
            }
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise _unreadable(file, error) from None


def _read_bin(file: Path, translate: Translate, only: set[str] | None) -> dict[str, Tensor]:
    try:
        # weights_only: a pickle from somewhere else must not run code. Only the zip format can be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # The interpreter of pickles raises whatever a damaged one makes of it: IndexError, TypeError, struct.error, ...
        raise _unreadable(file, error) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: holds {type(content).__name__}, not a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(name, str):
            raise UserError(f"{file}: a tensor is called {ascii(name)[:80]}, which is no name; download the file again")
        new = translate(name)
        if new is not None and (only is None or new in only):
            if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
                raise UserError(f"{file}: tensor {name!r} is sparse, quantized or empty; only plain ones can be read")
            tensors[new] = tensor
    return tensors


# How torch says that a pickle asks for something that it does not hand out.
_REFUSED_PICKLE = re.compile(
    r"(?:[Uu]nsupported (?:global: )?GLOBAL|unrecognized function|instantiate unrecognized class) (?P<asked>[\w.]+)"
)


def _unreadable(file: Path, error: Exception) -> UserError:
    text = describe_error(error)
    refused = _REFUSED_PICKLE.search(text) if isinstance(error, pickle.UnpicklingError) else None
    if refused is not None:
        return UserError(
            f"{file}: weights cannot be read: this pickle would run code ({refused['asked'].rstrip('.')}), so it is "
            "refused; take the weights from a source you trust, best as safetensors"
        )
    reason = text.split(". ")[0][:200] or type(error).__name__
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
    types = [
        f"{name} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in sorted(weights.items())
        if name in expected and not tensor.is_floating_point()
    ]
    problems = [
        f"{len(names)} {what} ({_some(names)})"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of wrong shape"),
            (types, "no floating point numbers"),
        )
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
