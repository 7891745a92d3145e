"""A pool of training streets for the stage `drive`: what the frozen tower sees of them, computed once.

The features are those of layer -2 for all patches of all six views, fp16, in one file that is read as it is needed
(0.66 MB a street); which streets they are is fixed by the number in the pool.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from playground.tiny.train.common import train_rng
from playground.tiny.train.vision import normalize, run_tower
from playground.tiny.world.cameras import shown, squares
from playground.tiny.world.driving import CAMERAS, Street, sample_street
from playground.tiny.world.scenes import GRID

PATCHES, CHANNELS = GRID * GRID, 96
TOKENS = PATCHES * len(CAMERAS)
NAME = "drive_pool.f16"


@lru_cache(maxsize=4096)
def street_of(number: int) -> Street:
    """A street of the pool."""
    return sample_street(train_rng("drive-pool", number), held_out=False)


@lru_cache(maxsize=4096)
def things_at(street: Street) -> np.ndarray:
    """Index of the thing that each visual token shows, in the order of the views, -1 for none: int64 [3456]."""
    return np.concatenate([shown(street, camera).reshape(-1) for camera in CAMERAS])


def make_pool(tower: torch.nn.Module, folder: Path, size: int, quiet: bool = False) -> np.ndarray:
    """The features of `size` streets, fp16 [size, 3456, 96]; what `folder` has already is kept."""
    path, row = folder / NAME, TOKENS * CHANNELS
    folder.mkdir(parents=True, exist_ok=True)
    done = path.stat().st_size // (2 * row) if path.is_file() else 0
    if done < size:
        with path.open("r+b" if done else "wb") as file, torch.no_grad():
            file.truncate(done * 2 * row)  # half a street of a stopped run
            file.seek(done * 2 * row)
            for number in tqdm(range(done, size), desc="pool", disable=quiet):
                features, _, _ = run_tower(tower, normalize(squares(street_of(number))))
                file.write(features.numpy().astype(np.float16).tobytes())
                file.flush()
    return np.memmap(path, dtype=np.float16, mode="r", shape=(size, TOKENS, CHANNELS))
