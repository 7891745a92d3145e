"""Saved results: the CSVs below benchmarks/results as typed rows, apart from the environment that every line repeats.

Knows the form that `output.csv_text` writes; nothing of what the columns mean.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ENVIRONMENT
from llava.eval.common.jsonio import read_text
from llava.utils import UserError

# `device`, `cuda`, `system` and `llava` are told but not needed to name what was measured.
_REQUIRED = (
    "hardware", "cores", "threads", "load_average", "python", "torch", "transformers", "allocator", "variables",
)  # fmt: skip
# Columns that say what a row is of, in all tools; columns that say how much was measured of it.
IDENTITY = ("benchmark", "method", "budget", "model", "batch", "visual", "stored", "dtype", "lora", "workers")
_EFFORT = ("rounds", "new_tokens", "questions")
_REMEDY = "measure it again with --save, or remove the file"


@dataclass(frozen=True)
class Result:
    """One CSV. rows: measured columns in the file's order; numbers are numbers, empty cells are None."""

    stem: str
    tool: str
    label: str
    rows: tuple[Mapping[str, Any], ...]
    env: Mapping[str, Any]
    digest: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Measured columns that hold something."""
        return tuple(name for name in self.rows[0] if any(row[name] is not None for row in self.rows))

    @property
    def fixed(self) -> bool:
        """Whether the allocator kept freed memory."""
        return self.env["allocator"] == "fixed"

    @property
    def on_cpu(self) -> bool:
        return self.env.get("device", "cpu") == "cpu"

    @property
    def setup(self) -> str:
        """Hardware for people; the threads are told where they do the work."""
        if not self.on_cpu:
            return str(self.env["hardware"])
        return f"{self.env['hardware']}, {counted(self.env['threads'], 'thread')}"

    def same(self, name: str) -> Any:
        """The value of a column that is the same in all rows that have one; None if there is none."""
        values = {row[name] for row in self.rows if row.get(name) is not None}
        return values.pop() if len(values) == 1 else None


def counted(number: Any, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}" + ("" if str(number) == "1" else "s")


def read_results(folder: Path) -> list[Result]:
    """Every CSV of the folder, by file name; raises `UserError` that names the file and what to do."""
    if not folder.is_dir():
        raise UserError(f"--results-dir: no such folder: {folder}")
    return [read_result(path) for path in sorted(folder.glob("*.csv"))]


def read_result(path: Path) -> Result:
    """One CSV of `--save`."""
    parts = path.stem.split("--")
    if len(parts) < 4 or not all(parts):
        raise UserError(
            f"{path}: is not named TOOL--WHAT--HARDWARE--VERSIONS.csv as --save names results; "
            "give it back its name, or move it out of the folder"
        )
    text = read_text(path, "result")
    lines = list(csv.reader(io.StringIO(text, newline="")))
    if len(lines) < 2:
        raise UserError(f"{path}: holds no rows; {_REMEDY}")
    header = lines[0]
    twice = sorted({name for name in header if header.count(name) > 1 or not name.strip()})
    if twice:
        raise UserError(f"{path}: column {twice[0]!r} is there more than once or has no name; {_REMEDY}")
    missing = [name for name in _REQUIRED if name not in header]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]!r}, so nobody knows what it was measured on; {_REMEDY}")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(header):
            raise UserError(f"{path}: line {number} has {len(cells)} cells, the header {len(header)}; {_REMEDY}")
        row = zip(header, cells, strict=True)
        rows.append({name: _value(text, name, f"{path}: line {number}") for name, text in row})
    measured = tuple({name: value for name, value in row.items() if name not in ENVIRONMENT} for row in rows)
    if not measured[0]:
        raise UserError(f"{path}: holds an environment but nothing measured; {_REMEDY}")
    env = {name: lines[1][header.index(name)] for name in ENVIRONMENT if name in header}
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Result(path.stem, parts[0], parts[1], measured, {**env, "variables": _variables(env, path)}, digest)


def _variables(env: Mapping[str, str], path: Path) -> dict[str, str]:
    try:
        variables = json.loads(env["variables"])
    except ValueError:
        variables = None
    if not isinstance(variables, dict):
        raise UserError(f"{path}: column 'variables' is not a JSON object: {env['variables']!r}; {_REMEDY}")
    return variables


def _value(text: str, name: str, where: str) -> Any:
    if text == "" or name in ENVIRONMENT:
        return text or None
    if text in ("True", "False"):
        return text == "True"
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        raise UserError(f"{where}: column {name!r} is {text}, which is no measurement; {_REMEDY}")
    return int(number) if re.fullmatch(r"-?\d+", text) else number


def replaces(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Whether new rows are a repetition of those in a CSV: all that it holds is measured again, and as much of it.

    False where the file cannot be read.
    """
    try:
        old = read_result(path).rows
    except UserError:
        return False

    def efforts(of: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Any]]:
        return {tuple(row.get(name) for name in IDENTITY): [row.get(name) or 0 for name in _EFFORT] for row in of}

    new = efforts(rows)
    return all(
        key in new and all(a >= b for a, b in zip(new[key], effort, strict=True))
        for key, effort in efforts(old).items()
    )


def natural(text: str) -> list[Any]:
    """Sort key: 576 comes before 2880."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", text) if part]


def numeric(row: Mapping[str, Any], *names: str) -> bool:
    """Whether a row has numbers in all these columns."""
    return all(isinstance(row.get(name), int | float) and not isinstance(row.get(name), bool) for name in names)


def rows_where(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
