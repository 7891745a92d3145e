"""The comparison's rows from answer files, the rows as markdown and CSV, and their place in a document.

    python -m llava.eval.compare_report results/compare/compare.json --matrix --insert README.md --marker comparison
    python -m llava.eval.compare_report results/compare/compare.json --versus "autoprune 64"

Knows the answers' text and metadata; runs no model. Everything is recomputed from the answer files, so a table can be
made again at any time.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.answers import TOKENS
from llava.eval.arguments import Parser
from llava.eval.bootstrap import Estimate, estimates, resampled_means, retained
from llava.eval.compare_differences import (
    credits_path,
    credits_table,
    differences,
    markdown_differences,
    read_credits,
)
from llava.eval.jsonio import iter_jsonl, read_json, read_text, write_text_atomic
from llava.eval.questions import Question
from llava.eval.table import replace_between
from llava.utils import UserError, cli_main

Record = Mapping[str, Any]
Grade = Callable[[Record], float | None]
MIB = 2**20


@dataclass(frozen=True)
class Answers:
    """One benchmark's answers: the questions that every setting answered, and a list of records per setting."""

    name: str
    asked: int
    questions: Sequence[Question]
    records: Sequence[Sequence[Record]]
    grade: Grade | None = None


def align(path: Path, questions: Sequence[Question]) -> list[Record | None]:
    """The answer to each question in an answer file; None where there is none yet."""
    waiting: dict[tuple[str, str], list[Record]] = {}
    if path.exists():
        for _, record in iter_jsonl(path, "answers file"):
            waiting.setdefault((str(record["question_id"]), record["prompt"]), []).append(record)
    for records in waiting.values():
        records.reverse()
    return [records.pop() if (records := waiting.get(question.key)) else None for question in questions]


def collect(name: str, questions: Sequence[Question], paths: Sequence[Path], grade: Grade | None = None) -> Answers:
    """Reads the answer files of all settings; questions that one of them lacks are left out for all."""
    columns = [align(path, questions) for path in paths]
    rows = [row for row in zip(questions, *columns, strict=True) if all(cell is not None for cell in row[1:])]
    if not rows:
        raise UserError(f"{name}: no question was answered under every setting")
    kept, *records = zip(*rows, strict=True)
    return Answers(name, len(questions), kept, records, grade)


def grades(answers: Answers) -> tuple[np.ndarray, list[int | str]] | None:
    """Credit in percent ``[questions, settings]`` and the questions' ids; None without ground truth."""
    if answers.grade is None:
        return None
    values = [[answers.grade(record) for record in records] for records in answers.records]
    known = [i for i in range(len(answers.questions)) if all(column[i] is not None for column in values)]
    if not known:
        raise UserError(f"{answers.name}: no question has ground truth")
    credits = 100.0 * np.array([[column[i] for column in values] for i in known], dtype=np.float64)
    return credits, [answers.questions[i].id for i in known]


def agreement(answers: Answers) -> np.ndarray:
    """100 where a setting says what the first one says, else 0, ``[questions, settings]``."""
    texts = [[record["text"].strip() for record in records] for records in answers.records]
    return 100.0 * np.array([[own == first for own, first in zip(c, texts[0], strict=True)] for c in texts]).T


def make_rows(
    settings: Sequence[Any], benchmarks: Sequence[Answers], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """One row per setting; the first setting is dense, to which agreement and retained percent refer."""
    graded = {b.name: found[0] for b in benchmarks if (found := grades(b)) is not None}
    agreed = {b.name: agreement(b) for b in benchmarks}
    drawn = {name: resampled_means(values, resamples, seed, name) for name, values in graded.items()}
    drawn_agreed = {name: resampled_means(values, resamples, seed, name) for name, values in agreed.items()}
    means = {name: values.mean(0) for name, values in graded.items()}
    accuracy = {name: estimates(means[name], drawn[name]) for name in graded}

    def averaged(values: Mapping[str, np.ndarray], samples: Mapping[str, np.ndarray]) -> list[Estimate]:
        # Benchmarks weigh alike, whatever their size.
        return estimates(np.mean([v.mean(0) for v in values.values()], axis=0), np.mean([*samples.values()], axis=0))

    overall = averaged(graded, drawn) if graded else None
    # Where dense answers nothing right there is nothing to retain.
    comparable = any(values[0] > 0 for values in means.values())
    kept = estimates(retained(means), retained(drawn)) if comparable else None
    same = averaged(agreed, drawn_agreed)
    rows = []
    for i, setting in enumerate(settings):
        records = [record for b in benchmarks for record in b.records[i]]
        rows.append(
            {
                "label": setting.label,
                "variant": setting.variant.label,
                "group": setting.variant.group,
                "budget": setting.budget,
                "method": setting.method.name,
                "options": asdict(setting.method),
                "accuracy": {name: asdict(values[i]) for name, values in accuracy.items()},
                "mean_accuracy": asdict(overall[i]) if overall else None,
                "retained": asdict(kept[i]) if kept else None,
                "agreement": asdict(same[i]),
                **costs(records),
            }
        )
    for row in rows:
        row["kv_ratio"] = row["kv_bytes"] / rows[0]["kv_bytes"]
    return rows


def credits_csv(settings: Sequence[Any], benchmarks: Sequence[Answers]) -> str:
    """What every setting got for every question; where no benchmark has ground truth, agreement with dense."""
    graded = {b.name: found for b in benchmarks if (found := grades(b)) is not None}
    found = graded or {b.name: (agreement(b), [question.id for question in b.questions]) for b in benchmarks}
    values = {name: credits for name, (credits, _) in found.items()}
    return credits_table([s.label for s in settings], values, {name: ids for name, (_, ids) in found.items()})


def costs(records: Sequence[Record]) -> dict[str, Any]:
    """Means over the answers; tokens over those with an image. prefill_ms is a median; peak_bytes the largest."""
    tokens = [record["metadata"][TOKENS] for record in records]
    seen = [entry for entry in tokens if entry["visual"]] or tokens
    peaks = [entry["peak_bytes"] for entry in tokens if entry.get("peak_bytes") is not None]
    return {
        "tokens_visual": statistics.fmean(entry["visual"] for entry in seen),
        "tokens_nominal": statistics.fmean(entry["nominal"] for entry in seen),
        "tokens_processed": statistics.fmean(entry["processed"] for entry in seen),
        "flops_ratio": sum(entry["flops"] for entry in tokens) / sum(entry["dense_flops"] for entry in tokens),
        "selection_ratio": sum(e["selection_flops"] for e in tokens) / sum(e["dense_flops"] for e in tokens),
        "kv_bytes": statistics.fmean(entry["kv_bytes"] for entry in tokens),
        "prefill_ms": statistics.median(entry["prefill_ms"] for entry in tokens),
        "peak_bytes": max(peaks, default=None),
    }


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
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in result["rows"]:
        cells = [row["variant"], "–" if row["budget"] is None else str(row["budget"])]
        cells += [f"{row['accuracy'][name]['value']:.1f}" for name in names]
        cells += [_interval(row["mean_accuracy"]), _interval(row["retained"])] if names else []
        cells += [_interval(row["agreement"]), f"{row['tokens_nominal']:.1f}", f"{row['tokens_processed']:.1f}"]
        cells += [f"{100 * row['flops_ratio']:.1f}%", f"{100 * row['kv_ratio']:.1f}%"]
        peak = row["peak_bytes"]
        cells += ["–" if peak is None else f"{peak / MIB:.0f} MiB", f"{row['prefill_ms']:.1f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown_notes(result: Mapping[str, Any]) -> str:
    """What was measured, on what, and how the figures are meant."""
    run = result["run"]
    budget = "of processed tokens" if run["budget"] == "processed" else "as each method's paper counts them"
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
    """One line per variant, one column per budget: the figure with its interval and the processed tokens."""
    rows = result["rows"]
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True)
    cells = {(row["variant"], row["budget"]): row for row in rows}
    counted = " processed" if result["run"]["budget"] == "processed" else ""
    header = ["", *(f"budget {budget}{counted}" for budget in budgets)]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * len(budgets) + "|"]
    dense = rows[0]
    lines.append(f"| dense ({dense['tokens_visual']:.0f} tokens): {_interval(dense[figure])} |" + " |" * len(budgets))
    for name in dict.fromkeys(row["variant"] for row in rows[1:]):
        found = [cells.get((name, budget)) for budget in budgets]
        shown = ["–" if row is None else f"{_interval(row[figure])} @ {row['tokens_processed']:.0f}" for row in found]
        lines.append("| " + " | ".join([name, *shown]) + " |")
    return "\n".join(lines)


def markdown_report(result: Mapping[str, Any]) -> str:
    """Table and notes."""
    return f"{markdown_table(result)}\n\n{markdown_notes(result)}"


def csv_table(result: Mapping[str, Any]) -> str:
    """All figures of all rows, flat; estimates in three columns."""
    flat = []
    for row in result["rows"]:
        line: dict[str, Any] = {key: row[key] for key in ("variant", "group", "budget", "method")}
        estimate_columns = {**{f"accuracy_{k}": v for k, v in row["accuracy"].items()}}
        estimate_columns |= {key: row[key] for key in ("mean_accuracy", "retained", "agreement") if row[key]}
        for key, estimate in estimate_columns.items():
            line |= {key: estimate["value"], f"{key}_low": estimate["low"], f"{key}_high": estimate["high"]}
        line |= {k: v for k, v in row.items() if isinstance(v, float | int) and k not in line}
        line["peak_bytes"] = row["peak_bytes"]
        flat.append(line)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(flat[0]), lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} for line in flat)
    return stream.getvalue()


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Print the table of a comparison, or put it into a document.")
    parser.add_argument("result", help="compare.json, written by llava.eval.compare")
    parser.add_argument("--matrix", action="store_true", help="methods by budgets, mean accuracy only")
    parser.add_argument("--insert", metavar="DOCUMENT", help="replace the text between the markers of this file")
    parser.add_argument("--marker", default="comparison", help="name of the markers: <!-- NAME: begin -->, end")
    parser.add_argument(
        "--versus", nargs="+", metavar="LABEL",
        help="instead of the table: differences from the first setting, paired over the questions; the others named, "
        "or all of its budget (dense: all). A label is method and budget: 'autoprune 64'",
    )  # fmt: skip
    args = parser.parse_args(argv)
    result = read_json(args.result, "result file")
    if not isinstance(result, dict) or not {"benchmarks", "rows", "run"} <= set(result) or "level" not in result["run"]:
        raise UserError(f"{args.result}: not a result of llava.eval.compare")
    if args.versus:
        credits = read_credits(credits_path(args.result), result)
        found = differences(result, credits, args.versus)
        text = markdown_differences(result, found, args.versus[0], sum(map(len, credits.values())))
    else:
        figure = "mean_accuracy" if result["rows"][0]["mean_accuracy"] else "agreement"
        table = markdown_matrix(result, figure) if args.matrix else markdown_table(result)
        text = f"{table}\n\n{markdown_notes(result)}"
    if args.insert:
        document = read_text(args.insert, "document")
        write_text_atomic(Path(args.insert), replace_between(document, args.marker, text, args.insert))
    else:
        print(text)


if __name__ == "__main__":
    main()
