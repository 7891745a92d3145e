"""The paper's tables from runs on disk: columns, rows, retained percentages, published rows; Markdown, CSV and JSON.

The runs come from `runs`, published figures from `published`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.eval.common.budgets import Budget, budget_text
from llava.eval.common.tables import csv_table, markdown_table
from llava.eval.reports.published import COLLECTED, published_rows
from llava.eval.reports.runs import COMPLETE, COSTS, PARTIAL, Run, count_questions, find_run, result_path
from llava.eval.tasks.registry import COLUMNS, TASK_OF, get_task
from llava.schema import NUMBER, check

METHOD_NAMES = {"autoprune": "AutoPrune", "dense": "dense", "fastv": "FastV", "divprune": "DivPrune"}


@dataclass(frozen=True)
class Table:
    """What a table holds. columns: those that the retained percentage is over; extra: shown beside them."""

    checkpoint: str
    budgets: tuple[int, ...]
    columns: tuple[str, ...]
    extra: tuple[str, ...] = ()
    version: str = "v1_5"
    tiny_checkpoint: str = "tiny-llava-v1.5"

    @property
    def benchmarks(self) -> list[str]:
        """Script names, each once."""
        return list(dict.fromkeys(TASK_OF[key].name for key in (*self.columns, *self.extra)))


_13B = ("vqav2", "gqa", "textvqa", "pope", "mme_perception")
TABLES = {
    "1": Table(
        "llava-v1.5-7b", (192, 128, 64), ("mme_total", "mmbench", "sqa", "gqa", "textvqa"),
        ("mme_perception", "pope", "mmbench_cn"),
    ),
    "2": Table("llava-v1.5-13b", (288, 144, 58), _13B),
    "3": Table("llava-v1.6-vicuna-7b", (640, 320, 160), _13B, version="v1_6", tiny_checkpoint="tiny-llava-v1.6"),
}  # fmt: skip


def retained_percent(scores: Mapping[str, float], dense: Mapping[str, float], at_most: float | None = None) -> float:
    """Mean over the benchmarks of score / dense score, in percent, as the paper's tables do; a benchmark where
    the dense score is 0 is left out.

    at_most: a bound for each single ratio (1.0: a benchmark that improved does not make up for one that lost).
    """
    ratios = [scores[name] / dense[name] for name in dense if dense[name]]
    if at_most is not None:
        ratios = [min(ratio, at_most) for ratio in ratios]
    return 100 * fmean(ratios) if ratios else 0.0


def collect(
    table: Table,
    out_dir: str | Path,
    data_dir: str | Path,
    checkpoint: str,
    settings: Sequence[tuple[str, Budget | None]],
    limit: int | None = None,
) -> dict[tuple[str, Budget | None], dict[str, Run]]:
    """(method, budget) -> benchmark -> state of its run."""
    tasks = [get_task(name) for name in table.benchmarks]
    totals = {task.name: count_questions(task, data_dir, limit) for task in tasks}
    return {
        (method, budget): {
            task.name: find_run(task, out_dir, checkpoint, method, budget, totals[task.name]) for task in tasks
        }
        for method, budget in settings
    }


def read_scores(table: Table, runs: Mapping[str, Run]) -> dict[str, float]:
    """Column key -> figure of the complete runs that have one."""
    scores = {}
    for key in (*table.columns, *table.extra):
        run = runs[TASK_OF[key].name]
        if run.status == COMPLETE:
            try:
                figure = COLUMNS[key].read(run.result)
            except (KeyError, TypeError):  # a server has it, or an older scorer wrote the file
                continue
            scores[key] = float(check(figure, NUMBER, f"{result_path(run.answers)}: {COLUMNS[key].title}"))
    return scores


def mean_costs(runs: Sequence[Run]) -> dict[str, float]:
    """Each cost averaged over the complete runs that know it."""
    means = {}
    for key in COSTS:
        values = [run.costs[key] for run in runs if run.status == COMPLETE and key in run.costs]
        if values:
            means[key] = fmean(values)
    return means


def label(method: str, budget: Budget | None) -> str:
    """`AutoPrune 64`, `dense`."""
    name = METHOD_NAMES.get(method, method)
    return name if budget is None else f"{name} {budget_text(budget)}"


def build(
    table: Table,
    checkpoint: str,
    collected: Mapping[tuple[str, Budget | None], Mapping[str, Run]],
    limit: int | None = None,
) -> dict[str, Any]:
    """The table as JSON-able data: columns, rows and, under each row, the published ones."""
    keys = (*table.columns, *table.extra)
    dense = read_scores(table, collected[("dense", None)]) if ("dense", None) in collected else {}
    # The dense row of the tables that other methods' rows are from only says something beside them.
    others = any(method not in ("dense", "autoprune") for method, _ in collected)
    rows = []
    for (method, budget), runs in collected.items():
        scores = read_scores(table, runs)
        shared = {key: dense[key] for key in table.columns if key in dense and key in scores}
        rows.append(
            {
                "label": label(method, budget),
                "method": method,
                "tokens": budget,
                "scores": scores,
                "retained": retained_percent(scores, shared) if shared else None,
                "retained_at_most_100": retained_percent(scores, shared, 1.0) if shared else None,
                "retained_over": len(shared),
                "costs": mean_costs(list(runs.values())),
                "runs": {
                    name: {
                        "status": run.status,
                        "answered": run.answered,
                        "skipped": run.skipped,
                        "questions": run.questions,
                    }
                    for name, run in runs.items()
                },
                "published": [
                    {"scores": dict(row.scores), "retained": row.retained, "flops": row.flops, "source": row.source}
                    for row in published_rows(checkpoint, method, budget)
                    if set(row.scores) & set(keys) and (others or row.source != COLLECTED)
                ],
            }
        )
    columns = [{"key": key, "title": COLUMNS[key].title, "retained": key in table.columns} for key in keys]
    return {"checkpoint": checkpoint, "limit": limit, "columns": columns, "rows": rows}


def _number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def markdown(data: Mapping[str, Any]) -> str:
    """The table with its notes. Published rows stand below ours, in italics."""
    keys = [column["key"] for column in data["columns"]]
    titles = [column["title"] + ("" if column["retained"] else " †") for column in data["columns"]]
    header = ["", *titles, "retained (each at most 100%)", "tokens, nominal", "tokens, processed", "FLOPs"]
    lines = []
    for row in data["rows"]:
        costs = row["costs"]
        retained = "-"
        if row["retained"] is not None:
            retained = f"{row['retained']:.1f}% ({row['retained_at_most_100']:.1f}%)"
        flops = costs.get("flops_ratio")
        cells = [row["label"]]
        cells += [_number(row["scores"].get(key), COLUMNS[key].digits) for key in keys]
        cells += [retained, _number(costs.get("nominal")), _number(costs.get("processed"))]
        cells.append(_number(None if flops is None else 100 * flops, 1, "%"))
        lines.append(cells)
        for published in row["published"]:
            cells = [f"*{row['label']}, {published['source']}*"]
            cells += [_number(published["scores"].get(key), COLUMNS[key].digits) for key in keys]
            cells += [_number(published["retained"], 1, "%"), "-", "-", _number(published["flops"], 1, "%")]
            lines.append(cells)
    return f"{markdown_table(header, lines)}\n\n{notes(data)}"


def notes(data: Mapping[str, Any]) -> str:
    """What the figures mean, and which runs are not there."""
    whole = sum(column["retained"] for column in data["columns"])
    lines = [
        f"Checkpoint `{data['checkpoint']}`. Retained: mean of score / dense score of the same table, in parentheses "
        "with every ratio at most 100%; published ones as published. Tokens: visual tokens per decoder layer, mean "
        "over samples and benchmarks. FLOPs: decoder prefill from processed tokens, relative to dense."
    ]
    if data["limit"] is not None:
        lines.insert(0, f"Only the first {data['limit']} questions of each benchmark (--limit): no official figures.")
    if any(not column["retained"] for column in data["columns"]):
        lines[-1] += " † not part of the retained mean."
    dense = next((row["costs"].get("visual") for row in data["rows"] if row["tokens"] is None), None)
    for row in data["rows"]:
        visual = row["costs"].get("visual")
        if dense is not None and visual is not None and abs(visual - dense) >= 1:
            # LLaVA-1.6: dense runs arrange crops as the checkpoint says, pruned ones as the paper's rows ("spatial").
            lines.append(
                f"{row['label']}: starts from {visual:.0f} visual tokens, the dense row from {dense:.0f}; FLOPs are "
                f"relative to a dense run on those {visual:.0f} (another --mm-patch-merge-type)."
            )
        if row["retained"] is not None and row["retained_over"] < whole:
            lines.append(f"{row['label']}: retained is over {row['retained_over']} of {whole} figures only.")
        groups: dict[str, list[str]] = {}
        for name, run in row["runs"].items():
            if run["status"] == PARTIAL:
                of = "" if run["questions"] is None else f" of {run['questions']}"
                name += f" ({run['answered']}{of} questions)"
            if run["skipped"]:
                groups.setdefault("scored without samples that could not be read", []).append(
                    f"{name} ({run['skipped']})"
                )
            if run["status"] != COMPLETE:
                groups.setdefault(run["status"], []).append(name)
            elif not any(TASK_OF[key].name == name for key in row["scores"]):
                groups.setdefault("answered, scored by a server (see EVAL.md)", []).append(name)
        lines += [f"{row['label']}: {status}: {', '.join(names)}." for status, names in groups.items()]
    return "\n".join(lines)


def csv_text(data: Mapping[str, Any]) -> str:
    """One line per row, ours and published; numbers in full precision, empty where unknown."""
    keys = [column["key"] for column in data["columns"]]
    costs = [f"tokens_{key}" if key in COSTS[:3] else key for key in COSTS]
    header = ["checkpoint", "method", "tokens", "source", *keys, "retained", "retained_at_most_100", *costs]
    lines = []
    for row in data["rows"]:
        start = [data["checkpoint"], row["method"], row["tokens"]]
        ours = [row["scores"].get(key) for key in keys] + [row["retained"], row["retained_at_most_100"]]
        lines.append([*start, "measured", *ours, *(row["costs"].get(key) for key in COSTS)])
        for published in row["published"]:
            flops = None if published["flops"] is None else round(published["flops"] / 100, 6)
            theirs = [published["scores"].get(key) for key in keys] + [published["retained"], None]
            lines.append([*start, published["source"], *theirs, None, None, None, flops, None])
    return csv_table(header, lines)
