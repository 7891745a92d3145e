"""From what the user calls a checkpoint to a folder on disk: local paths, and names on the Hugging Face hub.

A local path never causes a network call. From the hub come the small files first (configuration, tokenizer, indexes);
they tell which weight files the repository has, and only those are fetched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.jsonfiles import read_object
from llava.model.downloads import SMALL_DEADLINE_S, WEIGHTS_DEADLINE_S, DownloadTimeout, within
from llava.utils import UserError, describe_error

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*$", re.ASCII)
SMALL_FILES = ("*.json", "*.model", "*.txt")
# In the order they are looked for; an index lists the shards.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What LLaVA's training stages save, also next to whole weights.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_WEIGHTS = "non_lora_trainables.bin"
PROJECTOR_WEIGHTS = "mm_projector.bin"
TRAINED_PARTS = (*ADAPTER_WEIGHTS, NON_LORA_WEIGHTS, PROJECTOR_WEIGHTS)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_hub_name(name: str) -> bool:
    """Whether a name that is no existing folder can be meant for the hub: `owner/model`, nothing else.

    `liuhaotian/llava-v1.5-7b` is one. Absolute paths, `./x`, `../x`, `~/x`, more than one slash, a trailing
    slash and backslashes are paths. So is `playground/tiny` in a folder that has a `playground`: a typo in
    the second part must not be looked up under somebody's account.
    """
    return HUB_NAME.match(name) is not None and not os.path.isdir(name.split("/")[0])


def locate(name: str, what: str, with_weights: bool = True, local_files_only: bool = False) -> Path:
    """The folder of a checkpoint.

    Args:
        name: path or hub name.
        what: what it is, for messages ("checkpoint", "vision tower").
        with_weights: False = only configuration, index and tokenizer files are needed.
        local_files_only: never use the network; hub names must be in the local cache.

    Raises:
        UserError: no such folder, or the hub cannot deliver it.
    """
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for users that do not exist
    if name and os.path.isdir(path):
        return path
    if name and os.path.exists(path):
        raise UserError(f"{name}: is a file; the {what} must be the folder that contains config.json")
    if not is_hub_name(name):
        shown = name if name.isprintable() and 0 < len(name) <= 4096 else ascii(name)[:200]
        raise UserError(f"{shown}: no such folder; check the path of the {what} (hub names look like owner/model)")
    folder = _fetch(name, what, SMALL_FILES, local_files_only)
    if with_weights:
        for files in _weight_patterns(folder):
            if not any((folder / file).is_file() for file in SINGLE_FILES):
                _fetch(name, what, files, local_files_only)
    return folder


def _weight_patterns(folder: Path) -> Iterable[tuple[str, ...]]:
    """The files of a hub repository to ask for, by its small files; several steps are tried one after the other.

    The published kinds: LLaVA-1.5 has `.bin` shards with an index and a `mm_projector.bin` that repeats a part of them;
    1.6 has safetensors shards; LoRA and projector-only repositories have the trained parts alone; CLIP's has one
    `pytorch_model.bin`, or both forms, beside those of other frameworks.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / index).is_file():
            if (folder / index).stat().st_size > 2:
                yield tuple(shard_names(folder / index))
            else:  # it lists nothing: whatever looks like a shard
                yield (single.replace(".", "-*-of-*."),)
            return
    if (folder / ADAPTER_CONFIG).is_file():
        yield (*TRAINED_PARTS, SINGLE_FILES[0])
        return
    # Pickles only where there is nothing else: fetching both would double the download.
    yield (SINGLE_FILES[0], *TRAINED_PARTS)
    yield (SINGLE_FILES[1],)


def shard_names(index: Path) -> list[str]:
    """The files that an index lists, sorted.

    Raises:
        UserError: no usable index, or a name that leads out of the index's folder.
    """
    weight_map = read_checkpoint_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; copy or download it again")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or not _stays_inside(name):
            raise UserError(
                f"{index}: weight_map names {ascii(name)[:80]}, which is no file in its folder; download the index "
                "again, from a source you trust"
            )
    return sorted(set(names))


def _stays_inside(name: str) -> bool:
    # By name, not by where links lead: in the hub's cache every file is a link to a blob elsewhere.
    if len(name) > 255 or re.search(r"[\0-\x1f:*?\[\]]", name):
        return False
    return all(part not in ("", ".", "..") for part in re.split(r"[/\\]", name))


# --- reading what is there ------------------------------------------------------------------------------------


def read_checkpoint_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        UserError: every way to fail, naming the file.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; is the folder a complete LLaVA checkpoint?")
    refuse_pointer(path)
    try:
        value = read_object(path, path.name)
        json.dumps(value, ensure_ascii=False).encode()
    except UserError as error:
        raise UserError(f"{error}; copy or download it again") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: a text in it holds half a surrogate pair; copy or download it again") from None
    return value


def refuse_pointer(path: Path) -> None:
    """Refuse what `git clone` leaves in place of a large file where Git LFS is not installed.

    Raises:
        UserError: says what to run.
    """
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return  # whoever reads it says what is wrong
    if is_pointer:
        raise UserError(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs install && git lfs pull` in "
            f"{path.parent}, or download the file"
        )


# --- the hub ------------------------------------------------------------------------------------------------


def _fetch(name: str, what: str, patterns: Iterable[str], local_files_only: bool) -> Path:
    from huggingface_hub import constants, snapshot_download

    patterns = list(patterns)
    deadline_s = SMALL_DEADLINE_S if patterns == list(SMALL_FILES) else WEIGHTS_DEADLINE_S
    try:
        folder = within(
            deadline_s,
            lambda: snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only),
        )
    except DownloadTimeout as error:
        raise UserError(f"{name}: the {what} was not fetched from the hub in time: {error}") from None
    except Exception as error:
        # The hub's client raises many kinds (HTTP, cache, offline, validation): all mean that the name
        # is no use here.
        reason = describe_error(error).split(". ")[0][:200]
        offline = local_files_only or constants.HF_HUB_OFFLINE
        remedy = (
            "the hub may not be asked here (offline): download it where it may, then pass the folder"
            if offline
            else "check the path, the name or the connection"
        )
        raise UserError(
            f"{name}: no such folder, and the {what} cannot be fetched from the hub ({type(error).__name__}: "
            f"{reason}); {remedy}"
        ) from None
    return Path(folder)
