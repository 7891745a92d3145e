"""GQA: exact match over the balanced questions, overall, binary, open and by type.

Consistency, validity and grounding need files that LLaVA's evaluation does not use, and are not computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_json, require_file
from llava.eval.common.questions import Question
from llava.eval.tasks.join import check_same_questions, join_answers, load_answers, percent, require_joined
from llava.eval.tasks.task import EVAL_ZIP, Answers, Column, Grader, Score, Task, Truths, covered, figure, id_of
from llava.schema import FLAG, ID, SCALAR, TEXT, Fields, ListOf, MapOf, check, optional
from llava.utils import UserError, visible

_TYPES = Fields({"structural?": optional(TEXT), "semantic?": optional(TEXT)})
_QUESTION = {"answer": TEXT, "question?": optional(TEXT), "isBalanced?": FLAG, "types?": optional(_TYPES)}
_PREDICTION = Fields({"questionId": ID, "prediction": SCALAR})


def to_prediction(text: str) -> str:
    """LLaVA's conversion of an answer to a GQA prediction: trailing periods off, lower case, nothing else."""
    return text.rstrip(".").lower()


def gqa_accuracy(questions: Mapping[str, dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Exact-match accuracy in percent over the answered balanced questions.

    questions: id -> `answer`, `types` and `isBalanced`; answers: `question_id` and `text`, where `text` is
    already a prediction (`to_prediction`). Open questions are those of structural type "query".
    """
    balanced = {key: question for key, question in questions.items() if question.get("isBalanced", True)}
    known = dict.fromkeys(questions)
    found, coverage = join_answers(
        balanced,
        # Answers to unbalanced questions are legitimate, they just do not count.
        [a for a in answers if str(a["question_id"]) in balanced or str(a["question_id"]) not in known],
        lambda item: str(item["question_id"]),
    )
    groups: dict[str, list[bool]] = {"accuracy": [], "binary": [], "open": []}
    by_type: dict[str, dict[str, list[bool]]] = {"structural": {}, "semantic": {}}
    for key, prediction in found.items():
        question = balanced[key]
        correct = prediction == question["answer"]
        types = question.get("types") or {}
        groups["accuracy"].append(correct)
        groups["open" if types.get("structural") == "query" else "binary"].append(correct)
        for kind, table in by_type.items():
            if types.get(kind):
                table.setdefault(types[kind], []).append(correct)

    return {
        **{name: percent(values) for name, values in groups.items()},
        "types": {kind: {k: (percent(v), len(v)) for k, v in sorted(table.items())} for kind, table in by_type.items()},
        "samples": len(found),
        "coverage": coverage,
    }


def load_questions(path: str) -> dict[str, dict[str, Any]]:
    """`testdev_balanced_questions.json`: an object keyed by question id."""
    content = read_json(path, "annotation file", unique_keys=True)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: not a GQA question file (needs an object keyed by question id)")
    return check(content, MapOf(Fields(_QUESTION)), path)


def load_predictions(path: str) -> list[dict[str, Any]]:
    """Entries with `question_id` and the prediction as `text`, from an answer file (JSON lines) or from
    converted predictions (one JSON list of `questionId` and `prediction`).
    """
    file = require_file(path, "result file")
    with open(file, "rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return [{**answer, "text": to_prediction(answer["text"])} for answer in load_answers(path, keep_torn=True)]
    entries = check(read_json(path, "prediction file"), ListOf(_PREDICTION), path)
    # Converted predictions are compared as they are: a second conversion could hide a broken first one.
    return [{"question_id": entry["questionId"], "text": str(entry["prediction"])} for entry in entries]


def score_files(annotation_file: str, result_file: str) -> dict[str, Any]:
    """`gqa_accuracy` on files; raises `UserError` when no answer belongs to a question."""
    questions, answers = load_questions(annotation_file), load_predictions(result_file)
    texts = {key: str(question.get("question") or "") for key, question in questions.items()}
    check_same_questions(result_file, texts, answers)
    result = gqa_accuracy(questions, answers)
    require_joined(result["samples"], result_file, f"a question of {Path(annotation_file).name}")
    return result


def gqa_predictions(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`questionId` and prediction for GQA's evaluator: trailing periods off, lower case, nothing else."""
    return [{"questionId": answer["question_id"], "prediction": to_prediction(answer["text"])} for answer in answers]


def print_scores(result: dict[str, Any]) -> None:
    """The accuracies in percent, then those by type."""
    for name in ("binary", "open", "accuracy"):
        print(f"{name.capitalize()}: {result[name]:.2f}%")
    for kind, table in result["types"].items():
        print(f"\nAccuracy / {kind} type:")
        for name, (value, count) in table.items():
            print(f"  {visible(name)}: {value:.2f}% ({count} questions)")


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """accuracy, binary, open, samples, and structural_<type>, semantic_<type>."""
    types = {f"{kind}_{name}": value for kind, table in result["types"].items() for name, (value, _) in table.items()}
    return {**{name: result[name] for name in ("accuracy", "binary", "open", "samples")}, **types}


class Gqa(Task):
    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        return covered(load_questions(str(folder / self.truth[0])), questions, id_of, self.truth[0])

    def grader(self, data_dir: Path) -> Grader:
        """Exact match."""
        questions = load_questions(str(self.truth_path(data_dir)))

        def grade(answer: Mapping[str, Any]) -> float | None:
            question = questions.get(str(answer["question_id"]))
            if question is None or not question.get("isBalanced", True):
                return None
            return float(to_prediction(answer["text"]) == question["answer"])

        return grade

    def truths(self, data_dir: Path) -> Truths:
        questions = load_questions(str(self.truth_path(data_dir)))
        return lambda answer: questions.get(str(answer["question_id"]), {}).get("answer")

    def score(self, data_dir: Path, answers: Answers) -> Score:
        predictions = [{**answer, "text": to_prediction(answer["text"])} for answer in answers]
        result = gqa_accuracy(load_questions(str(self.truth_path(data_dir))), predictions)
        return Score(result["accuracy"], result["accuracy"], result["samples"])


TASK = Gqa(
    name="gqa",
    title="GQA",
    folder="gqa",
    question_file="llava_gqa_testdev_balanced.jsonl",
    image_folder="data/images",
    truth=("data/testdev_balanced_questions.json",),
    split="llava_gqa_testdev_balanced",
    merged=True,
    source=f"question file: {EVAL_ZIP}; the rest: GQA's questions and images, cs.stanford.edu/people/dorarad/gqa",
    metric="accuracy",
    columns=(Column("gqa", "GQA", figure("accuracy")),),
)
