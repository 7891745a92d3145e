"""TextVQA: soft accuracy against ten people's answers; the metric itself is in `vqa_text`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_json, require_folder
from llava.eval.common.questions import Question
from llava.eval.tasks.join import QuestionIndex, conclude, join_answers, load_answers, percent, require_joined
from llava.eval.tasks.task import EVAL_ZIP, Answers, Column, Grader, Score, Task, Truths, covered, figure
from llava.eval.tasks.vqa_text import in_words, soft_accuracy
from llava.schema import ID, TEXT, Fields, ListOf, check
from llava.utils import UserError

_ENTRIES = ListOf(Fields({"image_id": ID, "question": TEXT, "answers": ListOf(TEXT, least=1)}), least=1)
_OCR_FIRST_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_of_prompt(prompt: str) -> str:
    """The bare question, lower case, of any of LLaVA's TextVQA prompts.

    Understood: question / [`Reference OCR token: ...`] / instruction on lines of their own, the reference
    line first or second, and `OCR tokens: ... Question: ... Short answer:`.
    """
    if prompt.startswith("OCR tokens: "):
        match = _OCR_FIRST_PROMPT.search(prompt)
        if match:
            return match.group(1).lower()
    lines = [line for line in prompt.split("\n") if not line.startswith("Reference OCR token:")]
    return lines[0].lower() if lines else ""


def find_key(questions: QuestionIndex, image_id: str, prompt: str) -> tuple[str, str] | None:
    """Image id and question, lower case, of the annotated question that `prompt` asks; None if there is none."""
    question = questions.find(image_id, question_of_prompt(prompt))
    return None if question is None else (image_id, question)


def textvqa_accuracy(annotations: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean soft accuracy in percent over the answered questions.

    annotations: entries with `image_id`, `question` and `answers` (ten strings); answers: entries with
    `question_id` (the image id), `prompt` and `text`. An image can have several questions, so image id and
    question together are the key.
    """
    references = _references(annotations)
    questions = QuestionIndex(references)

    def key(answer: dict[str, Any]) -> tuple[str, str] | None:
        return find_key(questions, str(answer["question_id"]), answer.get("prompt", ""))

    found, coverage = join_answers(references, answers, key)
    scores = [soft_accuracy(text, references[key]) for key, text in found.items()]
    return {"accuracy": percent(scores), "samples": len(scores), "coverage": coverage}


def load_annotations(path: str) -> list[dict[str, Any]]:
    """The `data` list of a TextVQA annotation file, checked for the keys the metric needs."""
    content = read_json(path, "annotation file")
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list) or not data:
        raise UserError(f"{path}: not a TextVQA annotation file (needs a non-empty list under 'data')")
    check(content, Fields({"data": _ENTRIES}), path)
    return data


def score_file(annotations: Sequence[dict[str, Any]], result_file: str) -> dict[str, Any]:
    """Scores one answer file; raises `UserError` when none of its answers belongs to the annotations."""
    result = textvqa_accuracy(annotations, load_answers(result_file, keep_torn=True))
    require_joined(result["samples"], result_file, "a question of the annotation file")
    return result


def score_all(annotation_file: str, result_file: str | None, result_dir: str | None, json_path: str | None) -> None:
    """Scores and prints one answer file, or every `.jsonl` of a folder."""
    if bool(result_file) == bool(result_dir):
        raise UserError("give either --result-file or --result-dir")
    if json_path and result_dir:
        raise UserError("--json goes with --result-file, not with --result-dir")
    annotations = load_annotations(annotation_file)
    files = [Path(result_file)] if result_file else []
    if result_dir:
        files = sorted(require_folder(result_dir, "result folder").glob("*.jsonl"))
        if not files:
            raise UserError(f"{result_dir}: holds no .jsonl file")
    for file in files:
        result = score_file(annotations, str(file))
        coverage = result.pop("coverage")
        print(file.stem)
        print(f"Samples: {result['samples']}\nAccuracy: {result['accuracy']:.2f}%\n")
        conclude(coverage, result, json_path)


class TextVqa(Task):
    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        known = _references(load_annotations(str(folder / self.truth[0])))
        index = QuestionIndex(known)
        return covered(known, questions, lambda q: find_key(index, str(q.id), q.text), self.truth[0])

    def grader(self, data_dir: Path) -> Grader:
        """Soft accuracy against ten people's answers."""
        references = _references(load_annotations(str(self.truth_path(data_dir))))

        def grade(answer: Mapping[str, Any]) -> float | None:
            key = str(answer["question_id"]), question_of_prompt(answer["prompt"])
            return soft_accuracy(answer["text"], references[key]) if key in references else None

        return grade

    def truths(self, data_dir: Path) -> Truths:
        references = _references(load_annotations(str(self.truth_path(data_dir))))

        def truth(answer: Mapping[str, Any]) -> str | None:
            known = references.get((str(answer["question_id"]), question_of_prompt(answer["prompt"])))
            return None if known is None else in_words(known)

        return truth

    def score(self, data_dir: Path, answers: Answers) -> Score:
        result = textvqa_accuracy(load_annotations(str(self.truth_path(data_dir))), answers)
        return Score(result["accuracy"], result["accuracy"], result["samples"])


def _references(annotations: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    return {(str(item["image_id"]), item["question"].lower()): item["answers"] for item in annotations}


TASK = TextVqa(
    name="textvqa",
    title="TextVQA",
    folder="textvqa",
    question_file="llava_textvqa_val_v051_ocr.jsonl",
    image_folder="train_images",
    truth=("TextVQA_0.5.1_val.json",),
    source=f"question file: {EVAL_ZIP}; the rest: textvqa.org (annotations 0.5.1, train and val images)",
    metric="accuracy",
    columns=(Column("textvqa", "TextVQA", figure("accuracy")),),
)
