"""Names of the files that belong to an answer or trace file."""

from __future__ import annotations

import os
from pathlib import Path


def _stem(path: Path) -> str:
    # Only `.jsonl` is dropped: `run.64` and `run.128` are two runs, as are `d.trace` and `d.jsonl`.
    return path.stem if path.suffix == ".jsonl" else path.name


def meta_path(answers_file: str | os.PathLike[str]) -> Path:
    """Metadata of a run: `X.meta.json` for `X.jsonl`, `run.64.meta.json` for `run.64`."""
    path = Path(answers_file)
    return path.with_name(f"{_stem(path)}.meta.json")


def former_meta_path(answers_file: str | os.PathLike[str]) -> Path:
    """Where earlier versions put it: behind the name up to its last dot, whatever follows that."""
    path = Path(answers_file)
    return path.with_name(f"{path.stem}.meta.json")


def parts_folder(path: str | os.PathLike[str]) -> Path:
    """Where the parts of a file lie while several processes write it: `X.parts/` for `X.jsonl`."""
    path = Path(path)
    return path.with_name(f"{_stem(path)}.parts")


def part_path(path: str | os.PathLike[str], rank: int) -> Path:
    """The part of process `rank`."""
    return parts_folder(path) / f"part-{rank}.jsonl"
