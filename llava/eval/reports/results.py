"""The rows of a comparison from its answer files: accuracy, retained percent and agreement with intervals, and costs.

No model runs: everything is computed from the answer files, so a table can be made again at any time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.answering.sums import TOKENS
from llava.eval.common.jsonio import iter_jsonl
from llava.eval.common.questions import Question
from llava.eval.reports.bootstrap import Estimate, estimates, resampled_means, retained
from llava.eval.reports.differences import credits_table
from llava.schema import ID, NUMBER, TEXT, Fields, above, at_least, check, optional
from llava.utils import UserError

Record = Mapping[str, Any]
Grade = Callable[[Record], float | None]


@dataclass(frozen=True)
class Answers:
    """One benchmark's answers: the questions that every setting answered, and a list of records per setting."""

    name: str
    asked: int
    questions: Sequence[Question]
    records: Sequence[Sequence[Record]]
    grade: Grade | None = None


_COUNT = at_least(0, NUMBER)
_COSTS = {
    **dict.fromkeys(("visual", "nominal", "processed", "flops", "selection_flops", "prefill_ms"), _COUNT),
    **dict.fromkeys(("dense_flops", "kv_bytes"), above(0)),
    "peak_bytes?": optional(_COUNT),
}
_RECORD = Fields({"question_id": ID, "prompt": TEXT, "text": TEXT, "metadata": Fields({TOKENS: Fields(_COSTS)})})


def align(path: Path, questions: Sequence[Question]) -> list[Record | None]:
    """The answer to each question in an answer file; None where there is none yet."""
    waiting: dict[tuple[str, str], list[Record]] = {}
    if path.exists():
        for number, record in iter_jsonl(path, "answers file"):
            check(record, _RECORD, f"{path}:{number}")
            waiting.setdefault((str(record["question_id"]), record["prompt"]), []).append(record)
    for records in waiting.values():
        records.reverse()
    return [own.pop() if (own := waiting.get(question.key)) else None for question in questions]


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
                **({"counted": setting.counted} if setting.counted else {}),
                "method": setting.method.name,
                "options": setting.method.settings(),
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
    graded = {b.name: own for b in benchmarks if (own := grades(b)) is not None}
    told = graded or {b.name: (agreement(b), [question.id for question in b.questions]) for b in benchmarks}
    values = {name: credits for name, (credits, _) in told.items()}
    return credits_table([s.label for s in settings], values, {name: ids for name, (_, ids) in told.items()})


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
