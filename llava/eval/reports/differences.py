"""Paired differences between the settings of a comparison, from the credit of every question.

    python -m llava.eval.compare_report results/compare/compare.json --versus "autoprune 32" "divprune 32"

The credits lie in a file beside compare.json, so neither answers nor a model are needed. Settings answer the same
questions and are resampled together, so a difference is known better than two intervals side by side suggest.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.common.jsonio import read_text
from llava.eval.common.tables import csv_table
from llava.eval.reports.bootstrap import Estimate, estimates, resampled_means
from llava.utils import UserError

_FIXED = ("benchmark", "question_id")
# Means are compared with those of compare.json; credits are written with ten digits.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Difference:
    """One setting minus the reference: percent points, and on how many questions which of the two is better."""

    label: str
    points: Estimate
    better: int
    worse: int


def credits_path(result: str | Path) -> Path:
    """The file of credits that belongs to a result: ``compare.json`` has ``compare.credits.csv`` beside it."""
    return Path(result).with_suffix(".credits.csv")


def credits_table(
    labels: Sequence[str], credits: Mapping[str, np.ndarray], ids: Mapping[str, Sequence[int | str]]
) -> str:
    """CSV with one line per question and one column per setting; credits: benchmark -> percent ``[questions, C]``."""
    return csv_table(
        [*_FIXED, *labels],
        (
            [name, question_id, *(f"{value:.10g}" for value in row)]
            for name, values in credits.items()
            for question_id, row in zip(ids[name], values, strict=True)
        ),
    )


def read_credits(path: Path, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Benchmark -> credits ``[questions, settings of the result]``; refuses a file that is not of this result."""
    remedy = "run the same llava.eval.compare command again: it writes it from the answers, without the model"
    if not path.exists():
        raise UserError(f"credits of the questions not found: {path}; {remedy}")
    try:
        lines = list(csv.reader(io.StringIO(read_text(path, "credits"))))
    except csv.Error as error:
        raise UserError(f"{path}: malformed table ({error}); {remedy}") from None
    labels = [row["label"] for row in result["rows"]]
    if not lines or lines[0] != [*_FIXED, *labels]:
        raise UserError(f"{path}: its columns are not the settings of the result; {remedy}")
    values: dict[str, list[list[float]]] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            credit = [float(cell) for cell in line[len(_FIXED) :]]
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a credit ({error}); {remedy}") from None
        if len(credit) != len(labels):
            raise UserError(f"{path}:{number}: {len(credit)} credits for {len(labels)} settings; {remedy}")
        values.setdefault(line[0], []).append(credit)
    credits = {name: np.array(rows) for name, rows in values.items()}
    overall = np.mean([rows.mean(0) for rows in credits.values()], axis=0) if credits else np.array([])
    figures = [(row["mean_accuracy"] or row["agreement"])["value"] for row in result["rows"]]
    if len(overall) != len(figures) or not np.allclose(overall, figures, rtol=0, atol=_TOLERANCE):
        raise UserError(f"{path}: its means are not those of the result; {remedy}")
    return credits


def differences(
    result: Mapping[str, Any], credits: Mapping[str, np.ndarray], labels: Sequence[str]
) -> list[Difference]:
    """Each setting minus the first of ``labels``, with the resamples of the result's own intervals.

    The first label alone stands for all other settings of its budget, counted in its way where it is counted in both;
    dense alone for all settings.
    """
    rows, run = result["rows"], result["run"]
    known = [row["label"] for row in rows]
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise UserError(f"--versus: no setting {unknown[0]!r} in the result; there are: {', '.join(known)}")
    reference = known.index(labels[0])
    budget = rows[reference]["budget"]
    chosen = [known.index(label) for label in labels[1:]]
    if not chosen:
        # As text: 1 and 1.0 are a token and all tokens.
        chosen = [i for i, row in enumerate(rows) if i != reference and str(budget) in ("None", str(row["budget"]))]
        counted = rows[reference].get("counted")
        if counted in ("nominal", "processed"):
            chosen = [i for i in chosen if rows[i].get("counted") in (counted, "both", None)]
    if not chosen:
        raise UserError(f"--versus: no other setting has the budget of {labels[0]!r}; name the others behind it")
    relative = {name: values[:, chosen] - values[:, [reference]] for name, values in credits.items()}
    # Resampling differences is resampling both sides together; benchmarks weigh alike, as in the table.
    drawn = [resampled_means(values, run["resamples"], run["seed"], name) for name, values in relative.items()]
    value = np.mean([values.mean(0) for values in relative.values()], axis=0)
    points = estimates(value, np.mean(drawn, axis=0), run["level"])
    better = sum((values > 0).sum(0) for values in relative.values())
    worse = sum((values < 0).sum(0) for values in relative.values())
    return [Difference(known[i], points[k], int(better[k]), int(worse[k])) for k, i in enumerate(chosen)]
