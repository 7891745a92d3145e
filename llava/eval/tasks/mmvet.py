"""MM-Vet: total and per-capability score from the grade files that its evaluator, a GPT model, leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_json
from llava.eval.tasks.join import Coverage, percent, warn
from llava.eval.tasks.task import EVAL_ZIP, Column, Task, Truths, figure
from llava.schema import SCALAR, TEXT, Fields, ListOf, MapOf, check, optional
from llava.utils import UserError, kind_of

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def evaluate_mmvet(capabilities: Mapping[str, Sequence[str]], grades: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Scores in percent over the graded questions.

    capabilities: question id -> what it needs (of `CAPABILITIES`, repeats count once); grades: question id ->
    one grade from 0 to 1 for each run of the grader. A question's grade is the mean of its runs; `total` is the mean
    over questions, a capability's score the mean over the questions that need it (0 if there is none).
    `runs` holds the total of each run, `std` their population standard deviation.
    """
    coverage = Coverage(expected=len(capabilities))
    coverage.missing = [key for key in capabilities if not grades.get(key)]
    coverage.unmatched = [key for key in grades if key not in capabilities]
    graded = {key: grades[key] for key in capabilities if grades.get(key)}
    coverage.scored = len(graded)

    means = {key: sum(runs) / len(runs) for key, runs in graded.items()}
    groups: dict[str, list[float]] = {name: [] for name in CAPABILITIES}
    for key, grade in means.items():
        for name in dict.fromkeys(capabilities[key]):
            groups.setdefault(name, []).append(grade)
    # Totals of single runs compare only if every question has all of them.
    number = min((len(runs) for runs in graded.values()), default=0)
    totals = [percent([runs[i] for runs in graded.values()]) for i in range(number)]
    center = sum(totals) / number if number else 0.0
    return {
        "total": percent(list(means.values())),
        **{name: percent(values) for name, values in groups.items()},
        "runs": totals,
        "std": math.sqrt(sum((total - center) ** 2 for total in totals) / number) if number else 0.0,
        "counts": {name: len(values) for name, values in groups.items()},
        "uneven": len({len(runs) for runs in graded.values()}) > 1,
        "coverage": coverage,
    }


def load_capabilities(path: str) -> dict[str, list[str]]:
    """Question id -> capabilities, from `mm-vet.json`."""
    content = read_json(path, "annotation file", unique_keys=True)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: not an MM-Vet annotation file (needs an object keyed by question id)")
    check(content, MapOf(Fields({"capability": ListOf(TEXT, least=1)})), path)
    return {key: question["capability"] for key, question in content.items()}


def load_grades(path: str) -> dict[str, list[float]]:
    """Question id -> grades, one a run, from {id: {"score": [...], ...}} or {id: score}; numbers from 0 to 1."""
    content = read_json(path, "grade file", unique_keys=True)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a grade file (needs an object keyed by question id)")
    return {key: _grades_of(entry, f"{path}: question {key}") for key, entry in content.items()}


def _grades_of(entry: Any, where: str) -> list[float]:
    if isinstance(entry, dict):
        if "score" not in entry:
            raise UserError(f"{where}: key 'score' is missing")
        entry = entry["score"]
    grades = []
    for value in entry if isinstance(entry, list) else [entry]:
        try:
            grade = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            grade = math.nan
        if not 0 <= grade <= 1:
            raise UserError(f"{where}: grade {kind_of(value)} is not a number from 0 to 1 (ungraded answer file?)")
        grades.append(grade)
    return grades


def score_files(result_file: str, annotation_file: str) -> dict[str, Any]:
    """`evaluate_mmvet` on files; raises `UserError` when no grade belongs to a question."""
    result = evaluate_mmvet(load_capabilities(annotation_file), load_grades(result_file))
    if not result["coverage"].scored:
        raise UserError(f"{result_file}: no grade belongs to a question of {annotation_file}")
    return result


def mmvet_answers(texts: Mapping[str, str]) -> dict[str, str]:
    """`v1_<question_id>` -> text, as MM-Vet's evaluator reads it."""
    return {f"v1_{key}": text for key, text in texts.items()}


def print_scores(result: dict[str, Any]) -> None:
    """The table of MM-Vet's evaluator, with one decimal, and the runs of the grader if there are several."""
    columns = [*(name for name in result["counts"]), "total"]
    print("\t".join(columns))
    print("\t".join(f"{result[name]:.1f}" for name in columns))
    if len(result["runs"]) > 1:
        print(f"std: {result['std']:.1f}, runs: {', '.join(f'{total:.1f}' for total in result['runs'])}")


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """total and capabilities in percent, std, num_runs, questions_<capability>."""
    scores = {name: result[name] for name in ("total", *result["counts"])}
    numbers = {f"questions_{name}": count for name, count in result["counts"].items()}
    return {**scores, "std": result["std"], "num_runs": len(result["runs"]), **numbers}


class MmVet(Task):
    def truths(self, data_dir: Path) -> Truths | None:
        path = data_dir / self.folder / "mm-vet.json"
        if not path.is_file():
            return None
        content = read_json(path, "annotation file")
        check(content, MapOf(Fields({"answer?": optional(SCALAR)})), str(path))
        known = {key.removeprefix("v1_"): entry.get("answer") for key, entry in content.items()}

        def truth(answer: Mapping[str, Any]) -> str | None:
            text = known.get(str(answer["question_id"]).removeprefix("v1_"))
            return None if text is None else str(text)

        return truth


TASK = MmVet(
    name="mmvet",
    title="MM-Vet",
    folder="mm-vet",
    question_file="llava-mm-vet.jsonl",
    image_folder="images",
    tool="model_vqa",
    source=f"question file: {EVAL_ZIP}; images and mm-vet.json: mm-vet.zip of its authors",
    server="MM-Vet's evaluator (a GPT model)",
    local=False,
    columns=(Column("mmvet", "MM-Vet", figure("total")),),
)


def warn_uneven(result: dict[str, Any]) -> None:
    """Says if questions have different numbers of grades."""
    if result["uneven"]:
        warn("questions have been graded different numbers of times; each counts with the mean of its own grades")
