"""What the training stages share: seeds, schedule, log, checkpoints of a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

RUNS = Path(__file__).resolve().parents[1] / "runs"
BF16 = os.environ.get("TINY_BF16", "1") == "1"


def train_rng(stage: str, run: int = 0) -> np.random.Generator:
    """The random stream of a training stage; `run` numbers restarts so that a resumed run sees new scenes."""
    return np.random.default_rng([2024, zlib.crc32(stage.encode()), run])


def autocast() -> contextlib.AbstractContextManager:
    """bf16 autocast on the CPU, unless TINY_BF16=0."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if BF16 else contextlib.nullcontext()


def cosine(progress: float, step: int, peak: float, warmup: int, floor: float = 0.05) -> float:
    """Learning rate: linear warm-up over steps, cosine over progress (0..1) to `floor` of the peak."""
    return (
        peak
        * min(1.0, (step + 1) / warmup)
        * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    )


class Log:
    """One JSON object per line in `log_STAGE.jsonl` of a folder (`runs`), echoed to standard output."""

    def __init__(self, stage: str, folder: Path | None = None) -> None:
        self.stage = stage
        folder = folder or RUNS
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"log_{stage}.jsonl"

    def write(self, **values: object) -> None:
        line = json.dumps({"stage": self.stage, "time": round(time.time()), **values})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def follow(scores: dict[str, float], kinds: Sequence[str], right: Sequence[bool]) -> None:
    """Running accuracy per kind of question, in place: 7% of each new batch's mean; a new kind starts with its own."""
    by_kind = defaultdict(list)
    for kind, good in zip(kinds, right, strict=True):
        by_kind[kind].append(good)
    for kind, good in by_kind.items():
        scores[kind] = 0.93 * scores.get(kind, float(np.mean(good))) + 0.07 * float(np.mean(good))


def save_state(path: Path, **values: object) -> None:
    """Write atomically, so that stopping a run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
