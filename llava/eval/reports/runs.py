"""Finished runs on disk: which there are, whether they are whole, what they scored and what they cost.

The scripts leave answers, scores and metadata beside each other: `X.jsonl`, `X.json`, `X.meta.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.common.budgets import Budget, falling, named_budget
from llava.eval.common.jsonio import parse_line, read_json
from llava.eval.common.paths import meta_path
from llava.eval.tasks.task import Task, run_name
from llava.schema import ANYTHING, NUMBER, Fields, MapOf, at_least, check, optional
from llava.utils import UserError

MISSING, PARTIAL, UNSCORED, COMPLETE = "missing", "partial", "not scored", "complete"
_COUNT = at_least(0, NUMBER)
_TOKENS = Fields({"metadata": Fields({"tokens": Fields(dict.fromkeys(("visual", "nominal", "processed"), _COUNT))})})
_META = Fields(
    {
        "counts?": optional(Fields({"total?": optional(at_least(0)), "skipped?": optional(at_least(0))})),
        "tokens?": optional(MapOf(ANYTHING)),
    }
)
COSTS = ("visual", "nominal", "processed", "flops_ratio", "prefill_ms")


@dataclass(frozen=True)
class Run:
    """One benchmark under one method and budget (budget: None for dense).

    status: `missing`, `partial` (answers are missing), `not scored`, `complete`; a whole run can have `skipped` samples
    that could not be read. result: the scorer's JSON, and what
    a server said (`X.server.json`); costs: means of `COSTS`, as far as they are known.
    """

    task: Task
    method: str
    budget: Budget | None
    answers: Path
    status: str
    answered: int = 0
    questions: int | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    skipped: int = 0


def result_path(answers: Path) -> Path:
    """The scorer's JSON beside an answer file."""
    return answers.with_suffix(".json")


def server_path(answers: Path) -> Path:
    """Where a figure goes that a server has computed, under the scorer's keys: {"accuracy": 78.5}."""
    return answers.with_suffix(".server.json")


def find_run(
    task: Task,
    out_dir: str | Path,
    checkpoint: str,
    method: str,
    budget: Budget | None = None,
    questions: int | None = None,
) -> Run:
    """The state of one run. questions: how many a whole run answers; None: what its metadata say."""
    answers = task.answers_file(out_dir, run_name(checkpoint, method, budget))
    place = (task, method, budget, answers)
    if not answers.is_file():
        return Run(*place, MISSING, questions=questions)
    meta = check(_read(meta_path(answers)), _META, str(meta_path(answers)))
    counts = meta.get("counts") or {}
    answered, costs = _answer_means(answers)
    for key, value in {**(meta.get("tokens") or {}), **meta}.items():
        if key in COSTS and NUMBER.accepts(value):
            costs[key] = float(value)
    result = {} if _older(result_path(answers), answers) else _read(result_path(answers))
    result = {**result, **_read(server_path(answers))}
    if questions is None:
        questions = counts.get("total")
    skipped = int(counts.get("skipped") or 0) if meta.get("complete") else 0
    if (questions is not None and answered + skipped < questions) or meta.get("complete") is False:
        status = PARTIAL
    elif result or (not task.local and not result_path(answers).exists()):
        status = COMPLETE
    else:
        status = UNSCORED
    return Run(*place, status, answered, questions, result, costs, skipped)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path, "result file")
    if not isinstance(content, dict):
        raise UserError(f"{path}: needs a JSON object")
    return content


def _older(path: Path, than: Path) -> bool:
    """A score of answers that were changed since does not count."""
    return path.is_file() and path.stat().st_mtime < than.stat().st_mtime


def _answer_means(answers: Path) -> tuple[int, dict[str, float]]:
    """Number of answers, and mean token counts from their metadata (samples with an image)."""
    count, samples, sums = 0, 0, dict.fromkeys(("visual", "nominal", "processed"), 0.0)
    with open(answers, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            count += 1
            try:
                tokens = check(parse_line(line, "", "answer"), _TOKENS, "")["metadata"]["tokens"]
            except UserError:  # a torn line, or answers of another program
                continue
            values = {key: float(tokens[key]) for key in sums}
            if values["visual"]:
                samples += 1
                for key in sums:
                    sums[key] += values[key]
    return count, {key: value / samples for key, value in sums.items()} if samples else {}


def count_questions(task: Task, data_dir: str | Path, limit: int | None = None) -> int | None:
    """Questions that a whole run of the benchmark answers (MMBench: rows); None without a question file."""
    path = task.questions_path(Path(data_dir))
    if not path.is_file():
        return None
    number = len(task.read_questions(path))
    return number if limit is None else min(number, limit)


def discover(task: Task, out_dir: str | Path, checkpoint: str) -> list[tuple[str, Budget | None]]:
    """(method, budget) of every run of a benchmark that has answers, dense first, then by method and falling budget."""
    found: set[tuple[str, Budget | None]] = set()
    folder = task.answers_file(out_dir, checkpoint + "/dense")
    folder = folder.parent.parent if task.merged else folder.parent
    pattern = "*/*/merge.jsonl" if task.merged else "*/*.jsonl"
    if task.answers_file(out_dir, run_name(checkpoint, "dense")).is_file():
        found.add(("dense", None))
    for path in folder.glob(pattern):
        budget = named_budget(path.parent.name if task.merged else path.stem)
        if budget is not None:
            found.add((path.relative_to(folder).parts[0], budget))
    return sorted(found, key=lambda run: (run[0] != "dense", run[0], falling(run[1] or 0)))
