"""docs/performance.md from the CSVs below benchmarks/results: tables and plots between markers, the text around stays.

    python -m benchmarks.report

Knows the columns that the benchmarks write; measures nothing. Every table says on what its figures were measured.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, describe
from benchmarks.scaling import exponents
from llava.eval.arguments import Parser
from llava.eval.jsonio import read_text, write_text_atomic
from llava.eval.table import replace_between
from llava.utils import UserError, cli_main

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
_SHOWN = {
    "prefill": ("method", "budget", "batch", "processed", "ms", "p10", "p90", "of_dense", "flops_of_dense",
                "over_floor", "selection_ms", "of_peak", "peak_mib", "kv_mib"),
    "first_token": ("method", "budget", "model", "batch", "processed", "ms", "p10", "p90", "of_dense", "flops_of_dense",
                    "vision", "projector", "prefill", "selection", "head", "other", "vision_percent", "tower_layers",
                    "extra_rows"),
    "decode": ("method", "budget", "batch", "processed", "ms", "p10", "p90", "of_dense", "kv_mib", "kv_of_dense"),
    "memory": ("method", "budget", "batch", "visual", "mib", "p10", "p90", "floor_mib", "of_floor", "kv_mib"),
    "scaling": ("method", "visual", "processed", "ms", "p10", "p90", "of_dense", "flops_of_dense", "over_floor"),
    "end_to_end": ("benchmark", "method", "budget", "ms", "of_dense", "image", "vision", "projector", "prefill",
                   "selection", "decode", "other"),
}  # fmt: skip
_RATIOS = ("of_dense", "flops_of_dense", "of_peak", "kv_of_dense", "of_floor", "over_floor")


def read_results(folder: Path) -> dict[str, list[dict[str, str]]]:
    """File stem -> rows, of every CSV of the folder."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or "--" not in path.stem:
            raise UserError(f"{path}: not a result of `python -m benchmarks...`")
        found[path.stem] = rows
    return found


def section(stem: str, rows: Sequence[Mapping[str, str]], picture: str | None = None) -> str:
    """One result as markdown."""
    tool, label = stem.split("--")[:2]
    columns = _SHOWN.get(tool) or tuple(c for c in rows[0] if c not in ("hardware", "variables"))
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(_cell(name, row.get(name, "")) for name in columns) + " |" for row in rows]
    env = {**rows[0], "variables": json.loads(rows[0]["variables"])}
    parts = [f"### {tool}: {label}", "\n".join(lines), describe(env) + "."]
    if tool == "scaling":
        fitted = {quantity: exponents(_numbers(rows), quantity) for quantity in ("ms", "peak_mib")}
        parts.append("Fitted exponents over the visual tokens: " + "; ".join(
            f"{quantity}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            for quantity, values in fitted.items() if values) + ".")  # fmt: skip
    if picture:
        parts.append(f"![{tool} {label}]({picture})")
    return "\n\n".join(parts)


def _numbers(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text or None

    return [{name: value(text) for name, text in row.items()} for row in rows]


def _cell(name: str, text: str) -> str:
    if text == "":
        return "–"
    try:
        number = float(text)
    except ValueError:
        return text
    if name in _RATIOS:
        return f"{number:.3f}"
    return text if number == int(number) else f"{number:.2f}"


def plot(stem: str, rows: Sequence[Mapping[str, str]], folder: Path) -> str | None:
    """Prefill: time over dense against FLOPs over dense; scaling: log-log. Returns the file's name, or None."""
    tool = stem.split("--")[0]
    if tool not in ("prefill", "scaling"):
        return None
    from llava.eval.demo_plots import INK, MUTED, pyplot, save

    pyplot_ = pyplot()
    figure, axis = pyplot_.subplots(figsize=(6.4, 4.4), layout="constrained")
    numbers = _numbers(rows)
    for name in dict.fromkeys(row["method"] for row in numbers):
        own = [row for row in numbers if row["method"] == name]
        if tool == "scaling":
            axis.plot([r["visual"] for r in own], [r["ms"] for r in own], "o-", label=name, linewidth=1.3, markersize=4)
        elif name != "dense":
            flops, times = ([100 * row[key] for row in own] for key in ("flops_of_dense", "of_dense"))
            axis.plot(flops, times, "o", label=name, markersize=5)
    if tool == "scaling":
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("visual tokens", fontsize=9)
        axis.set_ylabel("prefill, ms", fontsize=9)
    else:
        axis.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_xlabel("processed FLOPs, percent of dense", fontsize=9)
        axis.set_ylabel("prefill time, percent of dense", fontsize=9)
    axis.set_title(stem.split("--")[1], fontsize=10, loc="left", color=INK)
    axis.legend(fontsize=8, frameon=False)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    path = folder / f"{stem}.png"
    save(pyplot_, figure, path)
    return path.name


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Render the tables and plots of docs/performance.md from the saved results.")
    parser.add_argument("--results-dir", default=str(RESULTS), help="folder with the CSVs")
    parser.add_argument("--document", default=str(DOCUMENT), help="markdown file with the markers")
    parser.add_argument("--plots", default=None, help="folder of the plots; default: images/ beside the document")
    args = parser.parse_args(argv)
    results = read_results(Path(args.results_dir))
    if not results:
        raise UserError(f"--results-dir: holds no CSV: {args.results_dir}; run a benchmark with --save first")
    document = Path(args.document)
    pictures = Path(args.plots) if args.plots else document.parent / "images"
    sections = []
    for stem, rows in results.items():
        name = plot(stem, rows, pictures)
        sections.append(section(stem, rows, f"{pictures.name}/{name}" if name else None))
    text = replace_between(read_text(document, "document"), "results", "\n\n".join(sections), str(document))
    write_text_atomic(document, text)
    print(f"wrote {len(results)} results into {document}")


if __name__ == "__main__":
    main()
