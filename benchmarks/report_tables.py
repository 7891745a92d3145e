"""Saved results as markdown: titles, names of methods, heads with units, number formats, what is said below a table.

Tools and columns that have no name here are rendered by their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from benchmarks.end_to_end import PARTS as END_TO_END
from benchmarks.environment import describe
from benchmarks.first_token import PARTS as FIRST_TOKEN
from benchmarks.saved import Result, counted, numeric, rows_where
from benchmarks.scaling import exponents
from llava.eval.common.tables import markdown_table
from llava.pruning import get_method, list_methods

TOOLS = (
    "prefill", "memory", "decode", "scaling", "first_token", "end_to_end", "loading", "input_pipeline", "profile",
    "candidates",
)  # fmt: skip
"""In the report's order."""
# Methods whose name is not that of their class.
_NAMES = {
    "autoprune_plus": "AutoPrune+", "dart": "DART", "dense": "dense", "gtp_vit": "GTP-ViT",
    "information_horizon": "Information Horizon",
    "pdrop": "PyramidDrop", "prumerge_plus": "PruMerge+", "random": "random", "scope": "SCOPE",
    "sparsevlm_v2": "SparseVLM+", "uniform": "uniform", "zooprune": "ZOO-Prune",
}  # fmt: skip
PARTS = (*dict.fromkeys([*END_TO_END[:-1], *FIRST_TOKEN]),)
"""Of end to end and of the time to first token."""
# The unit in a head gives the format of its figures, see `_format`.
_HEADS = {
    "ms": "time, ms",
    "mib": "peak, MiB",
    "kv_mib": "KV cache, MiB",
    "visual": "visual tokens",
    "processed": "tokens, processed",
    "tokens_processed": "tokens, processed",
    "flops_of_dense": "FLOPs of dense, %",
    "kv_of_dense": "KV of dense, %",
    "of_peak": "of matrix peak, %",
    "over_floor": "over floor, ×",
    "of_floor": "over floor, ×",
    "of_none": "of no workers, %",
    "input_per_s": "reading alone, images/s",
    "same_tokens": "survivors as without it, %",
    "stored": "stored as",
    "lora": "LoRA",
    "peak_rss_mb": "peak resident, MB",
    "peak_rss_ratio": "peak resident, × file",
    "peak_anon_ratio": "peak anonymous, × file",
    **{part: f"{part}, ms" for part in PARTS},
    "vision": "vision tower, ms",
    "head": "output head, ms",
    "vision_percent": "vision tower, %",
    "tower_layers": "layers of the tower",
    "extra_rows": "rows for selection",
}
_TIME_OF = {"decode": "time per step, ms", "end_to_end": "time per question, ms"}
_UNITS = {"ms": "ms", "us": "µs", "s": "s", "mib": "MiB", "gib": "GiB", "mb": "MB", "gb": "GB", "kib": "KiB",
          "bytes": "bytes", "percent": "%", "flops": "FLOPs", "ratio": "×"}  # fmt: skip
# Columns that p10 and p90 may be of.
_MEASURED = {"ms": "ms", "mib": "MiB", "images_per_s": "images/s"}
# Steps on the way to figures that are shown.
_HIDDEN = {"nominal", "slope", "flops", "selection_flops_of_dense", "floor_of_dense"}
# Said once below the table where they are the same in all rows.
_CAPTION = {"rounds": "round", "new_tokens": "token decoded", "questions": "question per benchmark"}


# --- names ----------------------------------------------------------------------------------------------------------


@cache
def _known(method: str) -> str | None:
    if method in _NAMES:
        return _NAMES[method]
    return get_method(method).__name__ if method in list_methods() else None


def method_name(name: Any) -> str:
    """One name for a method in all tables and plots; rows that are no method keep theirs."""
    base, _, way = str(name).partition(" ")
    known = _known(base)
    if known is None:
        return str(name)
    way = {"published": "as published"}.get(way, way.replace("graphs", "CUDA graphs"))
    return known + (f" ({way})" if way else "")


def setting_name(row: Mapping[str, Any]) -> str:
    """`AutoPrune 64`, `dense`."""
    name = method_name(row["method"])
    if row.get("model") is not None and row["method"] == "dense":
        name += f", {row['model']}"  # transformers' own model, and ours with nothing attached
    return name if row.get("budget") is None else f"{name} {row['budget']}"


def title(result: Result) -> str:
    """`Prefill: cpu-1024x24, float32, sdpa, 576 visual tokens, 1 thread`; a GPU by its name."""
    tool = "Time to first token" if result.tool == "first_token" else result.tool.replace("_", " ").capitalize()
    where = counted(result.env["threads"], "thread") if result.on_cpu else result.env["hardware"]
    return f"{tool}: {result.label}, {where}" + ("" if result.fixed else ", default allocator")


def titles(results: Sequence[Result]) -> list[str]:
    """Headings; the CPU is told where there are several, the versions where two would be the same."""
    several = len({result.env["hardware"] for result in results if result.on_cpu}) > 1
    names = [title(r) + (f", {r.env['hardware']}" if several and r.on_cpu else "") for r in results]
    return [f"{n}, {r.versions}" if names.count(n) > 1 else n for n, r in zip(names, results, strict=True)]


def order(result: Result) -> tuple[Any, ...]:
    """Sections: by tool, CPU before GPU, small before large, one thread before two, the fixed allocator first."""
    rank = TOOLS.index(result.tool) if result.tool in TOOLS else len(TOOLS)
    where = (not result.on_cpu, _natural(result.label), result.env["threads"], result.env["hardware"])
    return rank, result.tool, *where, result.versions, not result.fixed


def _natural(text: str) -> list[Any]:
    """Sort key: 576 comes before 2880."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", text) if part]


def head(name: str, tool: str = "") -> str:
    """Column head with its unit."""
    if name == "ms" and tool in _TIME_OF:
        return _TIME_OF[tool]
    if name in _HEADS:
        return _HEADS[name]
    if name.startswith("of_") or "_of_" in name:
        return f"{name.replace('_', ' ')}, %"
    if name.endswith("_per_s"):
        return f"{name.removesuffix('_per_s').replace('_', ' ')}/s"
    stem, _, unit = name.rpartition("_")
    if stem and unit in _UNITS:
        return f"{stem.replace('_', ' ')}, {_UNITS[unit]}"
    return _UNITS.get(name) or name.replace("_", " ")


# --- cells ----------------------------------------------------------------------------------------------------------


def _format(name: str, values: Sequence[Any]) -> tuple[float, int | None]:
    """Factor and decimals of a column's numbers; None: whole numbers as they are."""
    unit = head(name).rpartition(", ")[2]
    if name.endswith("_percent"):
        return 1.0, 1
    if unit in ("%", "processed", "×", "× file"):
        return (100.0 if unit == "%" else 1.0), {"×": 3, "× file": 2}.get(unit, 1)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if all(isinstance(value, int) for value in numbers):
        return 1.0, None
    # Three significant digits of a typical value; parts near zero would only add noise to the others.
    typical = sorted(abs(value) for value in numbers if value)[len(numbers) // 10 : len(numbers) // 2 + 1]
    small = all(abs(value) < 1 for value in numbers)
    return 1.0, min(max(2 - math.floor(math.log10(min(typical, default=1.0))), 0), 4 if small else 2)


def cells(name: str, values: Sequence[Any]) -> list[str]:
    """A column's cells in one format; empty ones as a dash."""
    factor, decimals = _format(name, values)

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return method_name(value) if name == "method" else _text(value)
        return str(value) if decimals is None else f"{factor * value:.{decimals}f}"

    return [cell(value) for value in values]


def _text(value: str) -> str:
    # Names of kernels hold templates and can be a hundred characters long.
    value = value if len(value) <= 72 else value[:71] + "…"
    return f"`{value}`".replace("|", "\\|") if re.search(r"[<>*|`]|__", value) else value


def columns_of(result: Result) -> list[str]:
    """What is shown in the table: not what the title or the line below it says, and nothing that is empty."""
    hidden = _HIDDEN | {name for name in _CAPTION if result.same(name) is not None}
    for name in ("geometry", "dtype", "attention", "visual"):
        value = result.same(name)
        if {str(value), f"{value} visual tokens"} & set(result.label.split(", ")):
            hidden.add(name)
    if result.same("batch") is not None and len(result.rows) > 1:
        hidden.add("batch")
    return [name for name in result.columns if name not in hidden]


def table(result: Result) -> str:
    """All rows of a result, p10 and p90 in one column."""
    rows = [*result.rows, *mean_rows(result)]
    shown = columns_of(result)
    spread_of = next((name for name in _MEASURED if name in shown), None)
    columns = []
    for name in shown:
        values = [row.get(name) for row in rows]
        if name == "p90" and "p10" in shown:
            continue
        if name == "p10" and "p90" in shown:
            both = cells(spread_of or "ms", values + [row.get("p90") for row in rows])
            pairs = zip(both[: len(rows)], both[len(rows) :], strict=True)
            unit = f", {_MEASURED[spread_of]}" if spread_of else ""
            columns.append((f"p10 to p90{unit}", [low if low == high else f"{low} to {high}" for low, high in pairs]))
        else:
            columns.append((head(name, result.tool), cells(name, values)))
    texts = [not any(re.match(r"-?\d", value) for value in values) for _, values in columns]
    labels = len(texts) - texts[::-1].index(True) if True in texts else 0
    heads, filled = zip(*columns, strict=True)
    return markdown_table(heads, zip(*filled, strict=True), labels)


def mean_rows(result: Result) -> list[dict[str, Any]]:
    """End to end: every setting averaged over the benchmarks; nothing for other tools and for one benchmark."""
    if result.tool != "end_to_end" or len({row.get("benchmark") for row in result.rows}) < 2:
        return []
    found = []
    for method, budget in dict.fromkeys((row.get("method"), row.get("budget")) for row in result.rows):
        own = rows_where(result.rows, method=method, budget=budget)
        means = {n: fmean(row[n] for row in own) for n in result.columns if all(numeric(row, n) for row in own)}
        found.append({**means, "benchmark": "mean", "method": method, "budget": budget})
    for row in found:
        if numeric(row, "ms") and numeric(found[0], "ms") and "of_dense" in row:
            row["of_dense"] = row["ms"] / found[0]["ms"]  # of the means: a mean of ratios would not fit beside them
    return found


# --- sections -------------------------------------------------------------------------------------------------------


def notes(result: Result) -> list[str]:
    """Sentences below the table: what is the same in all rows, and what follows from the figures."""
    said = []
    if len(result.rows) > 1 and result.same("batch") is not None:
        said.append(f"batch {result.same('batch')}")
    for name, noun in _CAPTION.items():
        value = result.same(name)
        if value is not None:
            first, blank, rest = noun.partition(" ")
            said.append(counted(value, first) + blank + rest)
    sentences = [f"{', '.join(said).capitalize()}."] if said else []
    if result.tool == "scaling" and all("method" in row for row in result.rows):
        for quantity, name in (("ms", "time"), ("peak_mib", "peak memory")):
            powers = [f"{method_name(m)} {power:.2f}" for m, power in exponents(result.rows, quantity).items()]
            if powers:
                sentences.append(f"Fitted exponents of the {name} over the visual tokens: {', '.join(powers)}.")
    means = [row for row in mean_rows(result) if numeric(row, "vision", "ms") and row["ms"] > 0]
    if means:
        shares = ", ".join(f"{setting_name(row)} {100 * row['vision'] / row['ms']:.1f}%" for row in means)
        sentences.append(f"Share of the vision tower in the time per question: {shares}.")
    return sentences


def section(result: Result, name: str) -> str:
    """Heading, table, what it was measured on."""
    return "\n\n".join([f"### {name}", table(result), " ".join([*notes(result), describe(result.env) + "."])])
