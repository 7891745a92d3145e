"""From what the user calls a checkpoint to a folder on disk: local paths, and names on the Hugging Face hub.

A local path never causes a network call. Knows nothing of what is inside the folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from llava.utils import UserError

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*$", re.ASCII)
SMALL_FILES = ("*.json", "*.model", "*.txt")
# What LLaVA's training stages save as pickles, also next to safetensors.
TRAINED_PARTS = ("non_lora_trainables.bin", "mm_projector.bin")


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
        with_weights: False = only configuration and tokenizer files are needed.
        local_files_only: never use the network; hub names must be in the local cache.

    Raises:
        UserError: no such folder, or the hub cannot deliver it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name}: is a file; the {what} must be the folder that contains config.json")
    if not is_hub_name(name):
        raise UserError(f"{name}: no such folder; check the path of the {what} (hub names look like owner/model)")
    return _from_hub(name, what, with_weights, local_files_only)


def _from_hub(name: str, what: str, with_weights: bool, local_files_only: bool) -> Path:
    from huggingface_hub import constants, snapshot_download

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only))
        except Exception as error:
            # The hub's client raises many kinds (HTTP, cache, offline, validation): all mean that the name
            # is no use here.
            reason = " ".join(str(error).split()).split(". ")[0][:200]
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

    folder = fetch([*SMALL_FILES, *(["*.safetensors", *TRAINED_PARTS] if with_weights else [])])
    if with_weights and not any(folder.glob("*.safetensors")) and not (folder / "mm_projector.bin").is_file():
        # Older repositories have only pickles; fetching both would double the download elsewhere.
        folder = fetch([*SMALL_FILES, "*.bin"])
    return folder


def locate_vision_tower(name: str, checkpoint: Path, with_weights: bool = True, local_files_only: bool = False) -> Path:
    """The folder of the vision tower that config.json names: relative to the checkpoint first, then as any
    checkpoint.
    """
    inside = checkpoint / name
    if not os.path.isabs(name) and inside.is_dir():
        return inside
    return locate(name, "vision tower", with_weights, local_files_only)
