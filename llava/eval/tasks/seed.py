"""SEED-Bench: accuracy by question type, and the answers as the leaderboard takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_json
from llava.eval.common.questions import Question
from llava.eval.tasks.task import EVAL_ZIP, Column, Grader, Task, Truths, covered, figure, id_of
from llava.schema import ID, TEXT, WHOLE, Fields, ListOf, MapOf, check, optional
from llava.utils import UserError

_SEED = Fields(
    {
        "questions": ListOf(
            Fields({"question_id": ID, "question_type_id": WHOLE, "answer": TEXT, "data_type?": optional(TEXT)}),
            least=1,
        ),
        "question_type": MapOf(WHOLE),
    }
)


def load_seed(path: str) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Questions and the names of the question types (by id) of `SEED-Bench.json`."""
    content = read_json(path, "annotation file")
    if not isinstance(content, dict) or not {"questions", "question_type"} <= set(content):
        raise UserError(f"{path}: not SEED-Bench.json (needs 'questions' and 'question_type')")
    check(content, _SEED, path)
    names = {number: name for name, number in content["question_type"].items()}
    for index, question in enumerate(content["questions"]):
        if question["question_type_id"] not in names:
            number = question["question_type_id"]
            raise UserError(f"{path}: questions[{index}]: question_type_id {number} has no name")
    return content["questions"], names


def seed_upload(questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """`question_id` and `prediction` for each question of SEED-Bench; every question needs its answer."""
    return [
        {"question_id": question["question_id"], "prediction": texts[str(question["question_id"])]}
        for question in questions
    ]


def seed_accuracy(
    questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str], names: Mapping[Any, str]
) -> dict[str, tuple[int, int]]:
    """Name -> (right, all): by question type in the order of type ids, then `Total`, `image` and `video`.

    The text has to equal the answer letter; a question without an answer is wrong. names: type id -> name.
    """
    groups: dict[str, list[bool]] = {names[kind]: [] for kind in sorted(names)}
    groups |= {"Total": [], "image": [], "video": []}
    for question in questions:
        right = texts.get(str(question["question_id"])) == question["answer"]
        groups[names[question["question_type_id"]]].append(right)
        groups["Total"].append(right)
        if question.get("data_type") in ("image", "video"):
            groups[question["data_type"]].append(right)
    return {name: (sum(values), len(values)) for name, values in groups.items() if values}


class Seed(Task):
    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        known = {str(question["question_id"]) for question in load_seed(str(folder / self.truth[0]))[0]}
        return covered(known, questions, id_of, self.truth[0])

    def grader(self, data_dir: Path) -> Grader:
        """The answer's letter."""
        letters = self._letters(data_dir)

        def grade(answer: Mapping[str, Any]) -> float | None:
            key = str(answer["question_id"])
            return float(answer["text"] == letters[key]) if key in letters else None

        return grade

    def truths(self, data_dir: Path) -> Truths:
        letters = self._letters(data_dir)
        return lambda answer: letters.get(str(answer["question_id"]))

    def _letters(self, data_dir: Path) -> dict[str, str]:
        questions, _ = load_seed(str(self.truth_path(data_dir)))
        return {str(question["question_id"]): question["answer"] for question in questions}


TASK = Seed(
    name="seed",
    title="SEED-Bench",
    folder="seed_bench",
    question_file="llava-seed-bench.jsonl",
    image_folder="",
    truth=("SEED-Bench.json",),
    merged=True,
    source=f"question file: {EVAL_ZIP}; the rest: SEED-Bench's authors (images, middle video frames)",
    server="SEED-Bench's leaderboard (accuracy is also computed here)",
    columns=(Column("seed", "SEED-Bench", figure("accuracy")),),
)
