"""What every benchmark does with its rows: a table for people, CSV with `--save`, one JSON object as the last line."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, describe, environment, result_path, slug
from benchmarks.geometry import GEOMETRIES
from benchmarks.saved import replaces
from llava.eval.common.arguments import DTYPES, Parser
from llava.eval.common.jsonio import write_text_atomic
from llava.utils import UserError


def common_parser(description: str, geometry: str = "cpu-1024x24", rounds: int = 9) -> Parser:
    """Flags that all benchmarks share."""
    parser = Parser(description=description)
    parser.add_argument("--geometry", default=geometry, help=f"sizes of the decoder: {', '.join(GEOMETRIES)}")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before that")
    add_running_arguments(parser)
    return parser


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it runs and what becomes of the result."""
    parser.add_argument("--device", default=None, help="cuda, mps, cpu; default: the best there is")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--attn-implementation", default="sdpa", help="eager, sdpa or flash_attention_2")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    parser.add_argument(
        "--allocator", choices=("fixed", "default"), default="fixed",
        help="fixed: malloc keeps freed memory (Linux; the process starts itself again with the variables set)",
    )  # fmt: skip
    add_saving_arguments(parser)


def add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    """`--save` and what goes with it."""
    parser.add_argument("--save", action="store_true", help="write a CSV below --results-dir, named by the hardware")
    parser.add_argument(
        "--name", type=_name, default=None, help="added to what was measured, in the file's name and the report's title"
    )
    parser.add_argument("--results-dir", default=str(RESULTS), help="folder of --save")


def _name(text: str) -> str:
    if not slug(text):
        raise argparse.ArgumentTypeError(f"{text!r} has no letters or digits that a file name could keep")
    return slug(text)


def add_method_arguments(parser: argparse.ArgumentParser, methods: str = "autoprune") -> None:
    """Which methods at which budgets."""
    parser.add_argument("--methods", default=methods, help="pruning methods by commas; dense is always measured")
    parser.add_argument("--budgets", default="192,128,64", help="target tokens, by commas")
    parser.add_argument("--visual-tokens", type=int, default=None, help="instead of the geometry's number")
    parser.add_argument("--batch-sizes", default="1", help="by commas")


def method_names(text: str) -> list[str]:
    """The pruning methods of `--methods`, without dense."""
    return [part.strip() for part in text.split(",") if part.strip() and part.strip() != "dense"]


def numbers(text: str, flag: str) -> list[int]:
    """`1,4,16` as numbers of at least 1."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UserError(f"{flag}: needs numbers of at least 1 separated by commas, got {text!r}")
    return values


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and type of the flags; sets the threads."""
    for flag in ("rounds", "warmup"):
        if getattr(args, flag, 1) < (1 if flag == "rounds" else 0):
            raise UserError(f"--{flag} is too small: {getattr(args, flag)}")
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(args.device or best)
    except RuntimeError:
        raise UserError(f"--device: {args.device!r} is not a device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: this machine has no CUDA device; use --device cpu")
    if args.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, getattr(torch, args.dtype)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Aligned columns."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def csv_text(rows: Sequence[Mapping[str, Any]], env: Mapping[str, Any]) -> str:
    """The rows with the environment in every line, so that a line says by itself what it is."""
    flat = {**{k: v for k, v in env.items() if k != "variables"}, "variables": json.dumps(env["variables"])}
    lines = [{**row, **flat} for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    return stream.getvalue()


def save(tool: str, label: str, rows: Sequence[Mapping[str, Any]], env: Mapping[str, Any], folder: Path) -> Path:
    """Writes the CSV. One of the same name is replaced by a repetition only; otherwise the new name gets a number."""
    path, number = result_path(tool, label, env, folder), 1
    taken = path
    while path.exists() and not replaces(rows, path):
        number += 1
        path = result_path(tool, f"{label} run {number}", env, folder)
    if number > 1:
        print(
            f"{taken.name} holds other rows or more rounds and is kept; --name NAME tells this run from it",
            file=sys.stderr,
        )
    write_text_atomic(path, csv_text(rows, env))
    return path


def deliver(
    tool: str,
    label: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Prints and saves; returns what the last line says."""
    label = f"{label} {args.name}" if args.name else label
    env = environment(device)
    print(f"\n{tool}: {label}\n{describe(env)}\n\n{table(rows, columns)}\n")
    if args.save:
        print(f"wrote {save(tool, label, rows, env, Path(args.results_dir))}")
    result = {"tool": tool, "label": label, "environment": env, "rows": list(rows)}
    print(json.dumps(result))
    return result
