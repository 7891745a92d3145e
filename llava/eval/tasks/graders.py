"""Right or wrong for a single answer, per benchmark: what a bootstrap over questions needs.

Every grader reads answers with the functions of its benchmark's scorer, so their mean is the scorer's accuracy. Figures
that are no mean over questions (F1, MME's sum) stay with the scorers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava.eval import (
    eval_gqa,
    eval_mmbench,
    eval_mme,
    eval_pope,
    eval_science_qa,
    eval_textvqa,
    eval_vqa,
)
from llava.eval.common.jsonio import read_records
from llava.eval.tasks.vqa_text import soft_accuracy
from llava.schema import ID, TEXT, Fields

Grader = Callable[[Mapping[str, Any]], float | None]
"""An answer (``question_id``, ``prompt``, ``text``) to its credit from 0 to 1, None if there is no truth for it."""


def textvqa(data: Path) -> Grader:
    """Soft accuracy against ten people's answers."""
    annotations = eval_textvqa.load_annotations(str(data / "textvqa" / "TextVQA_0.5.1_val.json"))
    references = {(str(item["image_id"]), item["question"].lower()): item["answers"] for item in annotations}

    def grade(answer: Mapping[str, Any]) -> float | None:
        key = str(answer["question_id"]), eval_textvqa.question_of_prompt(answer["prompt"])
        return soft_accuracy(answer["text"], references[key]) if key in references else None

    return grade


def vqa(annotations: Path, questions: Path) -> Grader | None:
    """Soft accuracy where the answers of VQAv2 or VizWiz are at hand; None where only the server has them."""
    if not annotations.is_file():
        return None
    references, key = eval_vqa.load_annotations(str(annotations))
    records = read_records(questions, "question file", Fields({"question_id": ID, "image": TEXT}))
    names = {str(record["question_id"]): str(record[key]) for record in records}

    def grade(answer: Mapping[str, Any]) -> float | None:
        reference = references.get(names.get(str(answer["question_id"]), ""))
        return None if reference is None else soft_accuracy(answer["text"], reference["answers"])

    return grade


def pope(data: Path) -> Grader:
    """Yes or no; all categories alike."""
    folder = data / "pope"
    questions = eval_pope.load_questions(str(folder / "llava_pope_test.jsonl"))
    truth = eval_pope.join_labels(eval_pope.load_labels(str(folder / "coco")), questions)

    def grade(answer: Mapping[str, Any]) -> float | None:
        key = str(answer["question_id"])
        return float(eval_pope.says_no(answer["text"]) != truth[key][1]) if key in truth else None

    return grade


def gqa(data: Path) -> Grader:
    """Exact match."""
    questions = eval_gqa.load_questions(str(data / "gqa" / "data" / "testdev_balanced_questions.json"))

    def grade(answer: Mapping[str, Any]) -> float | None:
        question = questions.get(str(answer["question_id"]))
        if question is None or not question.get("isBalanced", True):
            return None
        return float(eval_gqa.to_prediction(answer["text"]) == question["answer"])

    return grade


def mme(data: Path) -> Grader:
    """Yes or no; all subtasks alike."""
    truth = eval_mme.load_truth(str(data / "MME" / "MME_Benchmark_release_version"))

    def grade(answer: Mapping[str, Any]) -> float | None:
        key = eval_mme.question_key(str(answer["question_id"]), answer["prompt"])
        return float(eval_mme.read_answer(answer["text"]) == truth[key].strip().lower()) if key in truth else None

    return grade


def science_qa(data: Path) -> Grader:
    """The option's letter."""
    problems, _ = eval_science_qa.load_problems(str(data / "scienceqa"))

    def grade(answer: Mapping[str, Any]) -> float | None:
        problem = problems.get(str(answer["question_id"]))
        if problem is None:
            return None
        letter = eval_science_qa.read_option(answer["text"])
        return float(eval_science_qa.option_index(letter, len(problem["choices"])) == problem["answer"])

    return grade


def mmbench(table: Path) -> Grader:
    """The option's letter or text, each row by itself (not circular)."""
    rows = eval_mmbench.load_rows(str(table))

    def grade(answer: Mapping[str, Any]) -> float | None:
        row = rows.get(int(answer["question_id"]))
        if row is None or eval_mmbench.is_empty(row.get("answer")):
            return None
        return float(eval_mmbench.read_answer(answer, row) == row["answer"].strip())

    return grade
