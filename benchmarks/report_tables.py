"""Saved results as markdown for people: titles, names of methods, heads with units, number formats, captions.

Knows the columns that the benchmarks write; columns and tools that it does not know are rendered by their names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.end_to_end import PARTS as END_TO_END
from benchmarks.environment import describe
from benchmarks.first_token import PARTS as FIRST_TOKEN
from benchmarks.saved import IDENTITY, Result, counted, natural, numeric, rows_where
from benchmarks.scaling import exponents
from llava.eval.reports.paper_tables import METHOD_NAMES as _PAPER_NAMES

TOOLS = {
    "prefill": "Prefill",
    "memory": "Memory",
    "decode": "Decode",
    "scaling": "Scaling",
    "first_token": "Time to first token",
    "end_to_end": "End to end",
    "loading": "Loading",
    "input_pipeline": "Input pipeline",
    "profile": "Profile",
    "candidates": "Candidates",
}
METHODS = {
    **_PAPER_NAMES,
    "cdpruner": "CDPruner",
    "dart": "DART",
    "adaptinfer": "AdaptInfer",
    "agilepruner": "AgilePruner",
    "entropyprune": "EntropyPrune",
    "fastervlm": "FasterVLM",
    "sparsevlm_v2": "SparseVLM+",
    "todre": "ToDRE",
    "information_horizon": "Information Horizon",
    "transprune": "TransPrune",
    "hiprune": "HiPrune",
    "flowcut": "FlowCut",
    "gtp_vit": "GTP-ViT",
    "holov": "HoloV",
    "mmtok": "MMTok",
    "scope": "SCOPE",
    "vispruner": "VisPruner",
    "pdrop": "PyramidDrop",
    "prumerge_plus": "PruMerge+",
    "random": "random",
    "sparsevlm": "SparseVLM",
    "tome": "ToMe",
    "uniform": "uniform",
    "visionzip": "VisionZip",
    "vscan": "VScan",
    "zooprune": "ZOO-Prune",
}
# Of end to end and of the time to first token.
PARTS = (*dict.fromkeys([*END_TO_END[:-1], *FIRST_TOKEN]),)
# name -> head and format: number (decimals by the column), percent (a ratio shown as one), factor, text.
_HEADS = {
    "ms": ("time, ms", "number"),
    "floor_ms": ("floor, ms", "number"),
    "mib": ("peak, MiB", "number"),
    "peak_mib": ("peak, MiB", "number"),
    "floor_mib": ("floor, MiB", "number"),
    "same_tokens": ("survivors as without it", "percent"),
    "kv_mib": ("KV cache, MiB", "number"),
    "visual": ("visual tokens", "number"),
    "nominal": ("tokens, nominal", "tokens"),
    "processed": ("tokens, processed", "tokens"),
    "tokens_processed": ("tokens, processed", "tokens"),
    "of_dense": ("of dense, %", "percent"),
    "flops_of_dense": ("FLOPs of dense, %", "percent"),
    "floor_of_dense": ("floor of dense, %", "percent"),
    "kv_of_dense": ("KV of dense, %", "percent"),
    "of_peak": ("of matrix peak, %", "percent"),
    "over_floor": ("over floor, ×", "factor"),
    "of_floor": ("over floor, ×", "factor"),
    "of_none": ("of no workers, %", "percent"),
    "images_per_s": ("images/s", "number"),
    "input_per_s": ("reading alone, images/s", "number"),
    "stored": ("stored as", "text"),
    "lora": ("LoRA", "text"),
    "file_mb": ("file, MB", "number"),
    "model_mb": ("model, MB", "number"),
    "peak_rss_mb": ("peak resident, MB", "number"),
    "peak_rss_ratio": ("peak resident, × file", "factor2"),
    "peak_anon_ratio": ("peak anonymous, × file", "factor2"),
    **{part: (f"{part}, ms", "number") for part in PARTS},
    "vision": ("vision tower, ms", "number"),
    "head": ("output head, ms", "number"),
    "vision_percent": ("vision tower, %", "number"),
    "tower_layers": ("layers of the tower", "number"),
    "extra_rows": ("rows for selection", "number"),
}
_UNITS = {"ms": "ms", "us": "µs", "s": "s", "mib": "MiB", "gib": "GiB", "mb": "MB", "gb": "GB", "kib": "KiB",
          "bytes": "bytes", "percent": "%", "flops": "FLOPs"}  # fmt: skip
_TOOL_HEADS = {("decode", "ms"): "time per step, ms", ("end_to_end", "ms"): "time per question, ms"}
# Steps on the way to figures that are shown, and what prefill's tables have already.
_HIDDEN = {"nominal", "slope", "flops", "selection_flops_of_dense", "floor_of_dense"}
_HIDDEN_OF = {"scaling": {"selection_ms", "choice_ms", "of_peak"}}
_ORDER = ("benchmark", "method", "budget", "model", "batch", "visual", "processed", "tokens_processed", "ms", "mib",
          "p10", "p90", "of_dense", "flops_of_dense", "floor_ms", "floor_mib", "over_floor", "of_floor", "selection_ms",
          "choice_ms", "of_peak", "peak_mib", "kv_mib", "kv_of_dense", *PARTS)  # fmt: skip
_ORDERED = ("prefill", "memory", "decode", "scaling", "first_token", "end_to_end")
# Said once below the table where they are the same in all rows.
_CAPTION = {"rounds": "round", "new_tokens": "token decoded", "questions": "question per benchmark"}
_COMPARED = {
    "prefill": ("ms", "of_dense", "over_floor", "peak_mib"),
    "memory": ("mib", "floor_mib", "of_floor"),
    "scaling": ("ms", "of_dense", "over_floor", "peak_mib"),
    "loading": ("peak_rss_mb", "peak_rss_ratio", "peak_anon_ratio"),
    "input_pipeline": ("images_per_s", "of_none"),
}
_DECIMALS = {"tokens": 1, "percent": 1, "factor": 3, "factor2": 2}


# --- names ----------------------------------------------------------------------------------------------------------


def method_name(name: Any) -> str:
    """One name for a method in all tables and plots; rows that are no method keep theirs."""
    base, _, way = str(name).partition(" ")
    if way and base not in METHODS and base != "dense":
        return str(name)
    way = {"published": "as published"}.get(way, way.replace("graphs", "CUDA graphs"))
    return METHODS.get(base, base) + (f" ({way})" if way else "")


def setting_name(row: Mapping[str, Any]) -> str:
    """`AutoPrune 64`, `dense`."""
    name = method_name(row["method"])
    if row.get("model") is not None and row["method"] == "dense":
        name += f", {row['model']}"  # transformers' own model, and ours with nothing attached
    return name if row.get("budget") is None else f"{name} {row['budget']}"


def spoken(label: str) -> str:
    """The file name's part on what was measured: `..-sdpa-576-visual-tokens` -> `.., sdpa, 576 visual tokens`."""
    patterns = (
        r"\d+-visual-tokens|\d+-new-tokens|\d+-images|\d+-wide|batch-\d+",
        r"[\d.]+-[mg]b|float32|float16|bfloat16|sdpa|eager|flash-attention-2",
    )
    pieces = re.split(rf"(?:^|-)({'|'.join(patterns)})(?=-|$)", label)
    words = [piece.strip("-") for piece in pieces]
    # Every second piece matched; the others are names that keep their dashes.
    words[1::2] = [
        word.replace("-mb", " MB").replace("-gb", " GB").replace("-wide", " pixels wide").replace("-", " ")
        for word in words[1::2]
    ]
    return ", ".join(word for word in words if word)


def title(result: Result) -> str:
    """`Prefill: cpu-1024x24, float32, sdpa, 576 visual tokens, 1 thread`; a GPU by its name."""
    tool = TOOLS.get(result.tool, result.tool.replace("_", " ").capitalize())
    where = counted(result.env["threads"], "thread") if result.on_cpu else result.env["hardware"]
    return f"{tool}: {spoken(result.label)}, {where}"


def titles(results: Sequence[Result]) -> list[str]:
    """Headings; the CPU is told where there are several, then versions and the file where two would be the same."""
    several = len({result.env["hardware"] for result in results if result.on_cpu}) > 1
    names = [title(r) + (f", {r.env['hardware']}" if several and r.on_cpu else "") for r in results]
    for add in (lambda r: f"torch {r.env['torch']}, transformers {r.env['transformers']}", lambda r: r.stem):
        twice = {name for name in names if names.count(name) > 1}
        names = [f"{name}, {add(r)}" if name in twice else name for name, r in zip(names, results, strict=True)]
    return names


def order(result: Result) -> tuple[Any, ...]:
    """Sections: by tool, CPU before GPU, small before large, one thread before two."""
    rank = list(TOOLS).index(result.tool) if result.tool in TOOLS else len(TOOLS)
    return (
        rank,
        natural(result.tool),
        not result.on_cpu,
        natural(result.label),
        natural(str(result.env["threads"])),
        natural(result.stem),
    )


def head(name: str, tool: str = "") -> str:
    """Column head with its unit."""
    if (tool, name) in _TOOL_HEADS:
        return _TOOL_HEADS[tool, name]
    if name in _HEADS:
        return _HEADS[name][0]
    if name.startswith("of_") or "_of_" in name:
        return f"{name.replace('_', ' ')}, %"
    if name.endswith("_per_s"):
        return f"{name.removesuffix('_per_s').replace('_', ' ')}/s"
    stem, _, unit = name.rpartition("_")
    if stem and unit in _UNITS:
        return f"{stem.replace('_', ' ')}, {_UNITS[unit]}"
    if stem and unit == "ratio":
        return f"{stem.replace('_', ' ')}, ×"
    return _UNITS.get(name) or name.replace("_", " ")


# --- cells ----------------------------------------------------------------------------------------------------------


def _format(name: str, values: Sequence[Any]) -> tuple[float, int | None]:
    """Factor and decimals of a column's numbers; None: whole numbers as they are."""
    kind = _HEADS.get(name, ("", ""))[1] or ("percent" if name.startswith("of_") or "_of_" in name else "number")
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if name.endswith("_percent"):
        return 1.0, 1
    if kind in _DECIMALS:
        return (100.0 if kind == "percent" else 1.0), _DECIMALS[kind]
    if all(isinstance(value, int) for value in numbers):
        return 1.0, None
    # Three significant digits of a typical value; parts near zero would only add noise to the others.
    typical = sorted(abs(value) for value in numbers if value)[len(numbers) // 10 : len(numbers) // 2 + 1]
    least = min(typical, default=1.0)
    small = all(abs(value) < 1 for value in numbers)
    return 1.0, min(max(2 - math.floor(math.log10(least)), 0), 4 if small else 2)


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
    titled = {"geometry", "dtype", "attention"} if re.search(r"-(sdpa|eager|flash)", result.label) else set()
    hidden = _HIDDEN | _HIDDEN_OF.get(result.tool, set()) | titled
    said = {name for name in _CAPTION if result.same(name) is not None}
    if "visual-tokens" in result.label and result.same("visual") is not None:
        said.add("visual")
    if result.same("batch") is not None and len(result.rows) > 1:
        said.add("batch")
    shown = [name for name in result.columns if name not in hidden | said]
    known = [name for name in _ORDER if name in shown]
    if result.tool in _ORDERED:
        return known + [name for name in shown if name not in known]
    return shown


def grid(columns: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Markdown table of (head, cells); texts to the left, figures to the right."""

    def left(values: Sequence[str]) -> bool:
        return not any(re.fullmatch(r"-?[\d.,]+", value) for value in values)

    lines = ["| " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|" + "|".join("---" if left(values) else "---:" for _, values in columns) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in zip(*(values for _, values in columns), strict=True)]
    return "\n".join(lines)


def table(result: Result) -> str:
    """All rows of a result, p10 and p90 in one column."""
    rows = [*result.rows, *mean_rows(result)]
    shown = columns_of(result)
    columns = []
    for name in shown:
        if name == "p90" and "p10" in shown:
            continue
        values = [row.get(name) for row in rows]
        if name == "p10" and "p90" in shown:
            both = cells(_main_column(shown), values + [row.get("p90") for row in rows])
            low, high = both[: len(rows)], both[len(rows) :]
            spread = [a if a == b else f"{a} to {b}" for a, b in zip(low, high, strict=True)]
            columns.append((_range_head(shown), spread))
        else:
            columns.append((head(name, result.tool), cells(name, values)))
    return grid(columns)


def _main_column(shown: Sequence[str]) -> str:
    return next((name for name in ("ms", "mib", "images_per_s") if name in shown), "ms")


def _range_head(shown: Sequence[str]) -> str:
    unit = {"ms": "ms", "mib": "MiB", "images_per_s": "images/s"}
    name = _main_column(shown)
    return f"p10 to p90, {unit[name]}" if name in shown else "p10 to p90"


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
    if len(result.rows) > 1 and result.same("batch") is not None and "batch" not in columns_of(result):
        said.append(f"batch {result.same('batch')}")
    for name, noun in _CAPTION.items():
        value = result.same(name)
        if value is not None:
            first, _, rest = noun.partition(" ")
            said.append(f"{counted(value, first)}{' ' + rest if rest else ''}")
    sentences = [f"{', '.join(said).capitalize()}."] if said else []
    if result.tool == "scaling":
        for quantity, name in (("ms", "time"), ("peak_mib", "peak memory")):
            fitted = exponents(result.rows, quantity) if all("method" in row for row in result.rows) else {}
            if fitted:
                powers = ", ".join(f"{method_name(method)} {power:.2f}" for method, power in fitted.items())
                sentences.append(f"Fitted exponents of the {name} over the visual tokens: {powers}.")
    means = [row for row in mean_rows(result) if numeric(row, "vision", "ms") and row["ms"] > 0]
    if means:
        shares = ", ".join(f"{setting_name(row)} {100 * row['vision'] / row['ms']:.1f}%" for row in means)
        sentences.append(f"Share of the vision tower in the time per question: {shares}.")
    return sentences


def section(result: Result, name: str, other: Result | None = None) -> str:
    """Heading, table, what it was measured on, the other allocator's figures."""
    parts = [f"### {name}", table(result), " ".join([*notes(result), describe(result.env) + "."])]
    if other is not None:
        parts += both_allocators(result, other)
    return "\n\n".join(parts)


def both_allocators(result: Result, other: Result) -> list[str]:
    """The figures that memory handling can change, of both allocators side by side."""
    wanted = _COMPARED.get(result.tool, ("ms", "of_dense"))
    compared = [name for name in wanted if name in result.columns and name in other.columns]
    names = [name for name in IDENTITY if name in result.columns and name in columns_of(result)]

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in names)

    theirs = {key(row): row for row in other.rows}
    rows = [(row, theirs[key(row)]) for row in result.rows if key(row) in theirs]
    rows = [(a, b) for a, b in rows if any(a.get(name) is not None or b.get(name) is not None for name in compared)]
    load = other.env["load_average"]
    said = f"The same with the {other.env['allocator']} allocator (load average {load} at the end) beside it:"
    if not rows or not compared:
        return [f"Measured with the {other.env['allocator']} allocator too, but with no row in common."]
    columns = [(head(name, result.tool), cells(name, [row.get(name) for row, _ in rows])) for name in names]
    for name in compared:
        both = cells(name, [row.get(name) for row, _ in rows] + [row.get(name) for _, row in rows])
        columns.append((f"{head(name, result.tool)}: {result.env['allocator']}", both[: len(rows)]))
        columns.append((other.env["allocator"], both[len(rows) :]))
    return [said, grid(columns)]
