"""ScienceQA: accuracy over all problems of a split, those with a picture, and by subject."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_json, require_folder, write_text_atomic
from llava.eval.common.outputs import JsonObject
from llava.eval.common.questions import Question
from llava.eval.tasks.join import (
    Coverage,
    check_same_questions,
    conclude,
    join_answers,
    load_answers,
    percent,
    require_joined,
    warn,
)
from llava.eval.tasks.science_conversations import read_conversations, without_placeholder
from llava.eval.tasks.task import EVAL_ZIP, Answers, Asked, Column, Grader, Score, Task, Truths, covered, figure, id_of
from llava.schema import ID, TEXT, Fields, ListOf, check, optional
from llava.utils import UserError, kind_of, visible

OPTIONS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
GRADED = JsonObject("graded problems", ("correct", "incorrect"))
SUMMARY = JsonObject("a summary of predictions", ("acc", "results", "outputs"))
_PROBLEM = Fields(
    {"choices": ListOf(TEXT), "question?": optional(TEXT), "subject?": optional(TEXT), "image?": optional(TEXT)}
)
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def read_option(text: str, options: Sequence[str] = OPTIONS) -> str:
    """The option letter that a model's text names, or `FAILED`.

    Read are, as the published scorer does and nothing else: a letter alone; a letter, period, blank and
    anything; exactly one `The answer is X` with one more character behind it. The letter may lie beyond the
    choices of the problem.
    """
    if text in options:
        return text
    if text[:1] in options and text[1:3] == ". ":
        return text[0]
    found = _ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else FAILED


def option_index(letter: str, choices: int, options: Sequence[str] = OPTIONS) -> int:
    """Position of `letter` among the first `choices` options; -1 if it is none of them."""
    allowed = list(options[:choices])
    return allowed.index(letter) if letter in allowed else -1


def evaluate_science_qa(
    problems: Mapping[str, dict[str, Any]],
    split: Sequence[str],
    answers: Sequence[dict[str, Any]],
    options: Sequence[str] = OPTIONS,
) -> dict[str, Any]:
    """Scores the problems of `split` (ids); those without an answer count as wrong.

    problems: id -> `choices`, `answer` (index) and perhaps `subject`; answers: `question_id`, `prompt`, `text`.
    Returns percentages (`accuracy` over all problems, `img_accuracy` over the answered ones whose prompt holds
    `<image>`), counts, `subjects` {name: (percent, count)}, the `analyses` of the problems in split order
    and the `coverage`.
    """
    found, coverage = _join(split, answers)
    # Joined like the texts, so that of several answers to a problem the same one is taken.
    prompts, _ = _join(split, [{**answer, "text": str(answer.get("prompt", ""))} for answer in answers])
    analyses: list[dict[str, Any]] = []
    right: list[bool] = []
    subjects: dict[str, list[bool]] = {}
    indices: dict[str, int] = {}
    for key in dict.fromkeys(map(str, split)):
        problem = problems[key]
        text = found.get(key, FAILED)
        prompt = prompts[key] if key in found else "Unknown"
        letter = read_option(text, options)
        indices[key] = option_index(letter, len(problem["choices"]), options)
        right.append(indices[key] == problem["answer"])
        if problem.get("subject"):
            subjects.setdefault(str(problem["subject"]), []).append(right[-1])
        analyses.append(
            {
                "question_id": key,
                "parsed_ans": letter,
                "ground_truth": options[problem["answer"]],
                "question": prompt,
                "pred": text,
                "is_multimodal": "<image>" in prompt,
            }
        )
    with_image = [correct for correct, entry in zip(right, analyses, strict=True) if entry["is_multimodal"]]
    return {
        "accuracy": percent(right),
        "img_accuracy": percent(with_image),
        "correct": sum(right),
        "total": len(right),
        "img_correct": sum(with_image),
        "img_total": len(with_image),
        "failed": sum(entry["parsed_ans"] == FAILED for entry in analyses),
        "subjects": {name: (percent(values), len(values)) for name, values in sorted(subjects.items())},
        "analyses": analyses,
        "right": right,
        "indices": indices,
        "coverage": coverage,
    }


def _join(split: Sequence[str], answers: Sequence[dict[str, Any]]) -> tuple[dict[str, str], Coverage]:
    return join_answers(map(str, split), answers, lambda item: str(item["question_id"]))


def output_files(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of upstream's two files: analyses by correctness, and the summary with every prediction."""
    graded: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    for correct, entry in zip(result["right"], result["analyses"], strict=True):
        graded["correct" if correct else "incorrect"].append(entry)
    summary = {
        "acc": result["accuracy"],
        "correct": result["correct"],
        "count": result["total"],
        "results": result["indices"],
        "outputs": {entry["question_id"]: entry["pred"] for entry in result["analyses"]},
    }
    return graded, summary


def load_problems(
    base_dir: str, split: str = "test", options: Sequence[str] = OPTIONS
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`problems.json` restricted to the problems of `split`, and their ids in the order of `pid_splits.json`."""
    folder = require_folder(base_dir, "base folder")
    problems = read_json(folder / "problems.json", "problem file", unique_keys=True)
    splits = read_json(folder / "pid_splits.json", "split file")
    if not isinstance(problems, dict):
        raise UserError(f"{folder / 'problems.json'}: needs an object keyed by problem id")
    ids = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(ids, list) or not ids:
        known = ", ".join(splits) if isinstance(splits, dict) else "none"
        raise UserError(f"{folder / 'pid_splits.json'}: no problems under split {split!r} (it has: {known})")
    check(ids, ListOf(ID), f"{folder / 'pid_splits.json'}: split {split!r}")
    chosen: dict[str, dict[str, Any]] = {}
    for key in map(str, ids):
        problem = problems.get(key)
        where = f"{folder / 'problems.json'}: problem {key}"
        if not isinstance(problem, dict):
            raise UserError(f"{where} of split {split!r} is missing")
        choices, answer = problem.get("choices"), problem.get("answer")
        if not isinstance(choices, list) or not isinstance(answer, int) or isinstance(answer, bool):
            raise UserError(f"{where} needs a list of 'choices' and the index of the 'answer'")
        check(problem, _PROBLEM, where)
        if not 0 <= answer < min(len(choices), len(options)):
            raise UserError(f"{where}: answer {kind_of(answer)} is none of its {len(choices)} choices")
        chosen[key] = problem
    return chosen, list(chosen)


def score_files(
    base_dir: str, result_file: str, split: str = "test", options: Sequence[str] = OPTIONS
) -> dict[str, Any]:
    """`evaluate_science_qa` on files; raises `UserError` when no answer belongs to a problem."""
    problems, ids = load_problems(base_dir, split, options)
    answers = load_answers(result_file, keep_torn=True)
    texts = {key: str(problem.get("question") or "") for key, problem in problems.items()}
    check_same_questions(result_file, texts, answers)
    result = evaluate_science_qa(problems, ids, answers, options)
    require_joined(result["coverage"].scored, result_file, f"a problem of split {split!r} of {base_dir}")
    return result


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """Flat keys in percent: accuracy, img_accuracy, subject_<name>; counts."""
    names = ("accuracy", "img_accuracy", "correct", "total", "img_correct", "img_total", "failed")
    subjects = {f"subject_{name.replace(' ', '_')}": value for name, (value, _) in result["subjects"].items()}
    return {**{name: result[name] for name in names}, **subjects}


def print_scores(result: dict[str, Any]) -> None:
    """The line of the published scorer, then the accuracy by subject, and warnings of what cannot be read."""
    print(
        f"Total: {result['total']}, Correct: {result['correct']}, Accuracy: {result['accuracy']:.2f}%, "
        f"IMG-Accuracy: {result['img_accuracy']:.2f}%"
    )
    for name, (value, count) in result["subjects"].items():
        print(f"  {visible(name)}: {value:.2f}% ({count} problems)")


def conclude_run(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the scores and what could not be read, and writes the files that the flags of `eval_science_qa` name."""
    print_scores(result)
    conclude(
        result["coverage"], flat_result(result), args.json, "of {expected} problems have no answer and count as wrong"
    )
    unread = result["failed"] - len(result["coverage"].missing)
    if unread:
        warn(f"{unread} answers name no option and count as wrong")
    if not result["img_total"]:
        warn("no answered problem has <image> in its prompt, so there is no IMG-Accuracy; 0 stands for it")
    for path, content in zip((args.output_file, args.output_result), output_files(result), strict=True):
        if path:  # as upstream writes them: escaped, no line break at the end
            write_text_atomic(Path(path), json.dumps(content, indent=2))


class ScienceQa(Task):
    def read_questions(self, path: str | Path) -> Sequence[Question]:
        return read_conversations(str(path))

    def ask(self, data_dir: Path) -> Asked:
        questions = read_conversations(str(self.questions_path(data_dir)), single_prediction=True)
        return Asked(questions, {"prompt_text": without_placeholder})

    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        return covered(load_problems(str(folder))[0], questions, id_of, "problems.json, split test")

    def grader(self, data_dir: Path) -> Grader:
        """The option's letter."""
        problems, _ = load_problems(str(data_dir / self.folder))

        def grade(answer: Mapping[str, Any]) -> float | None:
            problem = problems.get(str(answer["question_id"]))
            if problem is None:
                return None
            letter = read_option(answer["text"])
            return float(option_index(letter, len(problem["choices"])) == problem["answer"])

        return grade

    def truths(self, data_dir: Path) -> Truths:
        problems, _ = load_problems(str(data_dir / self.folder))

        def truth(answer: Mapping[str, Any]) -> str | None:
            problem = problems.get(str(answer["question_id"]))
            if problem is None:
                return None
            return f"{OPTIONS[problem['answer']]}. {problem['choices'][problem['answer']]}"

        return truth

    def score(self, data_dir: Path, answers: Answers) -> Score:
        problems, ids = load_problems(str(data_dir / self.folder))
        answered = {str(answer["question_id"]) for answer in answers}
        # The scorer counts unanswered problems as wrong; of a subset, only what was asked counts.
        result = evaluate_science_qa(problems, [key for key in ids if key in answered], answers)
        return Score(result["accuracy"], result["accuracy"], result["total"])


TASK = ScienceQa(
    name="sqa",
    title="ScienceQA",
    folder="scienceqa",
    question_file="llava_test_CQM-A.json",
    image_folder="images/test",
    tool="model_vqa_science",
    truth=("problems.json", "pid_splits.json"),
    source=f"question file: {EVAL_ZIP} (or scripts/convert_sqa_to_llava.py, CQM-A-lettered); the rest: ScienceQA",
    metric="accuracy",
    columns=(Column("sqa", "ScienceQA (with image)", figure("img_accuracy")),),
)
