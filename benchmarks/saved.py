"""What a benchmark found: a table for people, one JSON object as the last line, with `--save` that object as a file.

The file's name is made of tool, what was measured, hardware, threads, allocator and versions; what counts is inside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe, environment
from llava.eval.common.jsonio import read_json, read_text, write_text_atomic
from llava.schema import NUMBER, TEXT, WHOLE, Fields, Kind, ListOf, MapOf, check, one_of, optional
from llava.utils import UserError

RESULTS = Path(__file__).resolve().parent / "results"
# Columns that say what a row is of, in all tools; columns that say how much was measured of it.
IDENTITY = ("benchmark", "method", "budget", "model", "batch", "visual", "stored", "dtype", "lora", "workers")
_EFFORT = ("rounds", "new_tokens", "questions")
_CELL = Kind("a number, a text, true, false or null", lambda x: isinstance(x, str | bool | None) or NUMBER.accepts(x))
# What a figure depends on and is named by; `environment` tells more.
ENVIRONMENT = Fields(
    {
        "hardware": TEXT, "device": TEXT, "cores": optional(WHOLE), "threads": WHOLE, "load_average": optional(NUMBER),
        "python": TEXT, "torch": TEXT, "transformers": TEXT, "allocator": one_of("fixed", "default"),
        "variables": MapOf(TEXT),
    }
)  # fmt: skip
MEASURED = {"tool": TEXT, "label": TEXT, "rows": ListOf(MapOf(_CELL, 1), 1)}
_SHAPE = Fields({**MEASURED, "environment": ENVIRONMENT})


@dataclass(frozen=True)
class Result:
    """One file. digest: of its bytes."""

    stem: str
    tool: str
    label: str
    rows: tuple[Mapping[str, Any], ...]
    env: Mapping[str, Any]
    digest: str

    @property
    def columns(self) -> list[str]:
        """Columns that hold something."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if any(row.get(name) is not None for row in self.rows)]

    @property
    def fixed(self) -> bool:
        """Whether the allocator kept freed memory."""
        return self.env["allocator"] == "fixed"

    @property
    def on_cpu(self) -> bool:
        return self.env["device"] == "cpu"

    @property
    def versions(self) -> str:
        """For people."""
        return f"torch {self.env['torch']}, transformers {self.env['transformers']}"

    def same(self, name: str) -> Any:
        """The value of a column that is the same in all rows that have one; None if there is none."""
        values = {row[name] for row in self.rows if row.get(name) is not None}
        return values.pop() if len(values) == 1 else None


def read_results(folder: Path) -> list[Result]:
    """Every result of the folder, by file name; `UserError` names the file and what to do."""
    if not folder.is_dir():
        raise UserError(f"--results-dir: no such folder: {folder}")
    return [read_result(path) for path in sorted(folder.glob("*--*.json"))]


def read_result(path: Path) -> Result:
    """One file of `--save`."""
    try:
        found = check(read_json(path, "result"), _SHAPE, str(path))
    except UserError as error:
        raise UserError(f"{error}; measure it again with --save, or move the file away") from None
    digest = hashlib.sha256(read_text(path, "result").encode()).hexdigest()[:16]
    return Result(path.stem, found["tool"], found["label"], tuple(found["rows"]), found["environment"], digest)


# --- writing ------------------------------------------------------------------------------------------------------


def deliver(
    tool: str,
    label: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Prints and saves; `columns` are shown to people, and are the first ones of what is saved."""
    label = f"{label}, {args.name}" if args.name else label
    env = environment(device)
    rows = ordered(rows, columns)
    print(f"\n{tool}: {label}\n{describe(env)}\n\n{table(rows, columns)}\n")
    if args.save:
        print(f"wrote {save(tool, label, rows, env, Path(args.results_dir))}")
    print(json.dumps({"tool": tool, "label": label, "environment": env, "rows": rows}))


def ordered(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that all have the same columns, in the same order."""
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    return [{name: row.get(name) for name in names} for row in rows]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Aligned columns, for a terminal."""
    lines = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save(tool: str, label: str, rows: Sequence[Mapping[str, Any]], env: Mapping[str, Any], folder: Path) -> Path:
    """Writes the file. One of the same name is replaced by a repetition only; otherwise the new name gets a number."""
    path, name, number = result_path(tool, label, env, folder), label, 1
    taken = path
    while path.exists() and not _replaces(rows, path):
        number += 1
        name = f"{label}, run {number}"
        path = result_path(tool, name, env, folder)
    if number > 1:
        print(
            f"{taken.name} holds other rows or more rounds and is kept; --name NAME tells this run from it",
            file=sys.stderr,
        )
    write_text_atomic(path, result_text(tool, name, rows, env))
    return path


def result_text(tool: str, label: str, rows: Sequence[Mapping[str, Any]], env: Mapping[str, Any]) -> str:
    """What the file holds: a line per row, numbers with six digits."""
    head = json.dumps({"tool": tool, "label": label, "environment": env}, ensure_ascii=False)
    lines = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    dumped = ",\n".join(map(partial(json.dumps, ensure_ascii=False), lines))
    return f'{head[:-1]}, "rows": [\n{dumped}\n]}}\n'


def result_path(tool: str, label: str, env: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Named by tool, what was measured, hardware, threads, allocator and versions."""
    where = slug(env["hardware"]) + (f"-{env['threads']}t" if env["device"] == "cpu" else "")
    versions = f"torch{env['torch'].split('+')[0]}-transformers{env['transformers']}"
    return folder / f"{tool}--{slug(label)}--{where}-{env['allocator']}--{versions}.json"


def slug(text: str) -> str:
    """Text as part of a file name."""
    text = re.sub(r"\((R|TM|C)\)|\bCPU\b|@.*$|\bProcessor\b", " ", text)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower()


def _replaces(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Whether rows are a repetition of those in a file: all that it holds is measured again, and as much of it.

    False where the file cannot be read.
    """

    def efforts(of: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Any]]:
        return {tuple(row.get(name) for name in IDENTITY): [row.get(name) or 0 for name in _EFFORT] for row in of}

    try:
        old = efforts(read_result(path).rows)
    except UserError:
        return False
    new = efforts(rows)
    return all(key in new and all(a >= b for a, b in zip(new[key], effort, strict=True)) for key, effort in old.items())


# --- looking at rows ----------------------------------------------------------------------------------------------


def counted(number: Any, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def numeric(row: Mapping[str, Any], *names: str) -> bool:
    """Whether a row has numbers in all these columns."""
    return all(NUMBER.accepts(row.get(name)) for name in names)


def rows_where(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
