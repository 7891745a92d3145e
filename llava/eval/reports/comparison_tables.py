"""A comparison as Markdown and CSV: one line per setting, or methods by budgets, with notes on what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.common import tables
from llava.eval.common.budgets import Budget, budget_text, falling
from llava.eval.common.jsonio import read_json
from llava.eval.reports.bootstrap import MAX_RESAMPLES
from llava.eval.reports.differences import Difference, credits_path, differences, read_credits
from llava.schema import (
    FLAG,
    NUMBER,
    SCALAR,
    TEXT,
    WHOLE,
    Fields,
    ListOf,
    MapOf,
    at_least,
    between,
    check,
    one_of,
    optional,
)
from llava.utils import UserError

MIB = 2**20


_ESTIMATE = Fields(dict.fromkeys(("value", "low", "high"), NUMBER))
_ROW = Fields(
    {
        **dict.fromkeys(("label", "variant"), TEXT),
        "budget": optional(NUMBER),
        "counted?": optional(one_of("nominal", "processed", "both")),
        "accuracy": MapOf(_ESTIMATE),
        **dict.fromkeys(("mean_accuracy", "retained"), optional(_ESTIMATE)),
        "agreement": _ESTIMATE,
        **dict.fromkeys(("tokens_visual", "tokens_nominal", "tokens_processed", "flops_ratio"), NUMBER),
        **dict.fromkeys(("kv_ratio", "kv_bytes", "prefill_ms"), NUMBER),
        "peak_bytes": optional(NUMBER),
    }
)
_RUN = Fields(
    {
        **dict.fromkeys(
            ("model", "budget", "batch_size", "device", "threads", "dtype", "torch", "transformers"), SCALAR
        ),
        "level": between(1, 99.9),
        "resamples": between(1, MAX_RESAMPLES, WHOLE),
        "seed": at_least(0),
    }
)
_BENCHMARK = Fields({"name": TEXT, "answered": SCALAR, "available": SCALAR, "graded": FLAG})
_RESULT = Fields({"benchmarks": ListOf(_BENCHMARK), "rows": ListOf(_ROW, least=1), "run": _RUN})


def _interval(estimate: Mapping[str, float] | None, unit: str = "%") -> str:
    if estimate is None:
        return "–"
    if estimate["low"] == estimate["high"]:
        return f"{estimate['value']:.1f}{unit}"
    return f"{estimate['value']:.1f}{unit} ({estimate['low']:.1f} to {estimate['high']:.1f})"


def markdown_table(result: Mapping[str, Any]) -> str:
    """One line per setting."""
    names = [b["name"] for b in result["benchmarks"] if b["graded"]]
    header = ["", "budget", *names]
    header += ["mean accuracy", "retained"] if names else []
    header += ["same answer as dense", "tokens, nominal", "tokens, processed", "FLOPs", "KV", "peak memory", "prefill"]
    rows = []
    for row in result["rows"]:
        cells = [row["variant"], budget_text(row["budget"])]
        cells[1] += " processed" if row.get("counted") == "processed" else ""
        cells += [f"{row['accuracy'][name]['value']:.1f}" for name in names]
        cells += [_interval(row["mean_accuracy"]), _interval(row["retained"])] if names else []
        cells += [_interval(row["agreement"]), f"{row['tokens_nominal']:.1f}", f"{row['tokens_processed']:.1f}"]
        cells += [f"{100 * row['flops_ratio']:.1f}%", f"{100 * row['kv_ratio']:.1f}%"]
        peak = row["peak_bytes"]
        cells += ["–" if peak is None else f"{peak / MIB:.0f} MiB", f"{row['prefill_ms']:.1f} ms"]
        rows.append(cells)
    return tables.markdown_table(header, rows)


def sorted_budgets(rows: Sequence[Mapping[str, Any]]) -> list[Budget]:
    """The budgets of all rows: falling tokens, then falling shares."""
    found = {budget_text(row["budget"]): row["budget"] for row in rows if row["budget"] is not None}
    return sorted(found.values(), key=falling)


def columns(rows: Sequence[Mapping[str, Any]], counted: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Title -> rows by variant, a column for each budget; two where they are `counted` in `both` ways."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    kinds = ("nominal", "processed") if counted == "both" else (counted,)
    # By name: 1 and 1.0 are a token and all tokens.
    for budget in map(budget_text, sorted_budgets(rows)):
        own = [row for row in rows if budget_text(row["budget"]) == budget]
        for kind in kinds:
            title = f"budget {budget} processed" if kind == "processed" else f"budget {budget}"
            found[title] = {row["variant"]: row for row in own if row.get("counted", kind) in (kind, "both")}
    return found


def markdown_notes(result: Mapping[str, Any]) -> str:
    """What was measured, on what, and how the figures are meant."""
    run = result["run"]
    budget = "of processed tokens" if run["budget"] == "processed" else "as each method's paper counts them"
    if run["budget"] == "both":
        budget += ", and of processed tokens where it says so; figures that stand in both columns are one measurement"
    if any(isinstance(row["budget"], float) for row in result["rows"]):
        budget += '; "of all": a share of each prompt\'s visual tokens'
    counts = ", ".join(f"{b['name']} {b['answered']} of {b['available']}" for b in result["benchmarks"])
    dense = result["rows"][0]
    return (
        f"Model `{run['model']}`, {dense['tokens_visual']:.0f} visual tokens; questions: {counts}. Accuracy: share of "
        "right answers in percent (TextVQA: soft accuracy; MMBench: each row by itself), mean accuracy: over the "
        "benchmarks. Retained: mean over the benchmarks of accuracy / dense accuracy. In parentheses: "
        f"{run['level']:.0f}% interval, bootstrap over questions ({run['resamples']} resamples, seed {run['seed']}), "
        f"for retained and agreement paired with dense. Budgets are means {budget}. Tokens: visual tokens per "
        "decoder layer; FLOPs: decoder prefill from processed tokens, relative to dense; KV: bytes of the cache after "
        f"the prefill, relative to dense ({dense['kv_bytes'] / MIB:.2f} MiB). Peak memory: decoder prefill and decode "
        f"of one batch of {run['batch_size']} above the loaded model. Prefill: median per sample, a by-product of this "
        "run and not a benchmark: settings took turns, other work on the machine was not kept away "
        f"({run['device']}, {run['threads']} threads, {run['dtype']}, torch {run['torch']}, "
        f"transformers {run['transformers']})."
    )


def markdown_matrix(result: Mapping[str, Any], figure: str = "mean_accuracy") -> str:
    """One line per variant, the `columns`: the figure with its interval and the processed tokens."""
    rows = result["rows"]
    found = columns(rows, result["run"]["budget"])
    dense = rows[0]
    lines = [[f"dense ({dense['tokens_visual']:.0f} tokens): {_interval(dense[figure])}"]]
    for name in dict.fromkeys(row["variant"] for row in rows[1:]):
        own = [column.get(name) for column in found.values()]
        shown = ["–" if row is None else f"{_interval(row[figure])} @ {row['tokens_processed']:.0f}" for row in own]
        lines.append([name, *shown])
    return tables.markdown_table(["", *found], lines)


def markdown_report(result: Mapping[str, Any]) -> str:
    """Table and notes."""
    return f"{markdown_table(result)}\n\n{markdown_notes(result)}"


def csv_table(result: Mapping[str, Any]) -> str:
    """All figures of all rows, flat; estimates in three columns."""
    flat = []
    for row in result["rows"]:
        line: dict[str, Any] = {key: row[key] for key in ("variant", "group", "budget", "method")}
        if result["run"]["budget"] == "both":
            line["counted"] = row.get("counted")
        estimate_columns = {**{f"accuracy_{k}": v for k, v in row["accuracy"].items()}}
        estimate_columns |= {key: row[key] for key in ("mean_accuracy", "retained", "agreement") if row[key]}
        for key, estimate in estimate_columns.items():
            line |= {key: estimate["value"], f"{key}_low": estimate["low"], f"{key}_high": estimate["high"]}
        line |= {k: v for k, v in row.items() if isinstance(v, float | int) and k not in line}
        line["peak_bytes"] = row["peak_bytes"]
        flat.append(line)
    rounded = ({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} for line in flat)
    return tables.csv_table(list(flat[0]), rounded)


def markdown_differences(result: Mapping[str, Any], found: Sequence[Difference], reference: str, questions: int) -> str:
    """A small table with what it means below."""
    run = result["run"]
    figure = "mean accuracy" if result["rows"][0]["mean_accuracy"] else "share of answers equal to dense"
    rows = []
    for entry in found:
        interval = f"{entry.points.value:+.1f} ({entry.points.low:+.1f} to {entry.points.high:+.1f})"
        rows.append([entry.label, interval, str(entry.better), str(entry.worse)])
    table = tables.markdown_table([f"minus {reference}", "points", "better on", "worse on"], rows)
    return (
        f"{table}\n\nDifference of {figure} in percent points, paired over the same {questions} questions; "
        f"{run['level']:.0f}% interval, bootstrap over questions ({run['resamples']} resamples, seed {run['seed']}). "
        "Better, worse: questions with more or less credit."
    )


def describe(path: str, matrix: bool = False, versus: Sequence[str] | None = None) -> str:
    """The table of a comparison's compare.json with its notes, or the differences from the first label of `versus`."""
    result = read_json(path, "result file")
    if not isinstance(result, dict) or not {"benchmarks", "rows", "run"} <= set(result):
        raise UserError(f"{path}: not a result of llava.eval.compare")
    check(result, _RESULT, f"{path}: not a result of llava.eval.compare")
    for row in result["rows"]:
        missing = [b["name"] for b in result["benchmarks"] if b["graded"] and b["name"] not in row["accuracy"]]
        if missing:
            raise UserError(f"{path}: not a result of llava.eval.compare: {row['label']} has no {missing[0]!r}")
    if versus:
        credits = read_credits(credits_path(path), result)
        found = differences(result, credits, versus)
        return markdown_differences(result, found, versus[0], sum(map(len, credits.values())))
    figure = "mean_accuracy" if result["rows"][0]["mean_accuracy"] else "agreement"
    table = markdown_matrix(result, figure) if matrix else markdown_table(result)
    return f"{table}\n\n{markdown_notes(result)}"
