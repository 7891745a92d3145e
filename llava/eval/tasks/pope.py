"""POPE: yes or no about objects in the picture, per category, and the mean F1.

Labels lie in `coco_pope_<category>.json`, one JSON object per line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_records, require_folder
from llava.eval.common.questions import Question
from llava.eval.tasks.join import asks, check_same_questions, join_answers, load_answers, require_joined
from llava.eval.tasks.task import EVAL_ZIP, Answers, Column, Grader, Score, Task, Truths, figure
from llava.schema import ID, SCALAR, TEXT, Fields, optional
from llava.utils import UserError, visible

_PREFIX = "coco_pope_"
_LABEL = Fields({"label": SCALAR, "image?": optional(TEXT), "text?": optional(TEXT)})
_QUESTION = Fields({"question_id": ID, "text": TEXT, "category": optional(TEXT), "image?": optional(TEXT)})


def says_no(text: str) -> bool:
    """POPE's reading of a free-text answer: no if one blank-separated word of its first sentence is exactly
    `No`, `no` or `not` (commas deleted before); everything else counts as yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return any(word in ("No", "no", "not") for word in words)


def pope_scores(labels: Sequence[bool], answers: Sequence[str]) -> dict[str, float]:
    """Confusion counts and the scores from them; yes is the positive class.

    labels: True where the object is in the image; answers: texts of the same length. Ratios are 0 to 1, and
    0 where nothing was counted.
    """
    if len(labels) != len(answers):
        raise ValueError(f"{len(labels)} labels for {len(answers)} answers")
    counts = {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
    for positive, text in zip(labels, answers, strict=True):
        if says_no(text):
            counts["fn" if positive else "tn"] += 1
        else:
            counts["tp" if positive else "fp"] += 1
    tp, fp, tn, fn = (counts[name] for name in ("tp", "fp", "tn", "fn"))

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        **counts,
        "accuracy": ratio(tp + tn, len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(tp + fp, len(labels)),
    }


def evaluate_pope(
    labels: Mapping[str, Sequence[dict[str, Any]]],
    questions: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Scores every category that has labels.

    labels: category -> entries (`image`, `text`, `label`) in file order; questions: entries of LLaVA's
    question file (`question_id`, `image`, `text`, `category`). Labels and questions belong together by
    position within the category (the label files restart their numbering in each), answers to questions by
    `question_id`. Returns {"categories": {name: scores}, "coverage": ..., "f1_mean": ...}.
    """
    truth = join_labels(labels, questions)
    found, coverage = join_answers(truth, answers, lambda item: str(item["question_id"]))
    per_category: dict[str, tuple[list[bool], list[str]]] = {category: ([], []) for category in labels}
    for question_id, text in found.items():
        category, positive = truth[question_id]
        per_category[category][0].append(positive)
        per_category[category][1].append(text)
    # A category without a single answer (a run limited to the first questions) has no score, not 0.
    categories = {name: pope_scores(*pair) for name, pair in per_category.items() if pair[0]}
    mean = sum(scores["f1"] for scores in categories.values()) / len(categories) if categories else 0.0
    return {"categories": categories, "f1_mean": mean, "coverage": coverage}


def join_labels(
    labels: Mapping[str, Sequence[dict[str, Any]]], questions: Sequence[dict[str, Any]]
) -> dict[str, tuple[str, bool]]:
    """Question id -> (category, whether the object is in the image), joined by position within the category."""
    truth: dict[str, tuple[str, bool]] = {}
    for category, entries in labels.items():
        asked = [question for question in questions if question.get("category") == category]
        _check_alignment(category, entries, asked)
        for entry, question in zip(entries, asked, strict=True):
            truth[str(question["question_id"])] = (category, _label_is_yes(entry, category))
    return truth


def _label_is_yes(entry: dict[str, Any], category: str) -> bool:
    label = str(entry["label"]).strip().lower()
    if label not in ("yes", "no"):
        raise UserError(f"{_PREFIX}{category}.json: label {entry['label']!r} is neither yes nor no")
    return label == "yes"


def _check_alignment(category: str, entries: Sequence[dict[str, Any]], asked: Sequence[dict[str, Any]]) -> None:
    """Labels join by position, so a label file of another release would silently give nonsense."""
    name = f"{_PREFIX}{category}.json"
    if not asked:
        raise UserError(f"the question file has no question of category {category!r}, for which there is {name}")
    if len(entries) != len(asked):
        raise UserError(
            f"{name} has {len(entries)} labels but the question file has {len(asked)} such questions; "
            "take the label files that belong to it (random has 2910 lines there)"
        )
    for number, (entry, question) in enumerate(zip(entries, asked, strict=True), start=1):
        same_image = _file_name(entry.get("image")) == _file_name(question.get("image"))
        same_text = asks(question["text"], str(entry.get("text", "")))
        if not (same_image and same_text):
            raise UserError(
                f"{name} does not line up with the question file: its entry {number} is about "
                f"{entry.get('image')!r}, question {question['question_id']} about {question.get('image')!r}"
                + ("" if not same_image else f" with another text ({first_line(question)!r})")
            )


def _file_name(image: Any) -> Any:
    """Releases differ in the folder that they put in front of an image's name."""
    return image.replace("\\", "/").rsplit("/", 1)[-1] if isinstance(image, str) else image


def first_line(question: Mapping[str, Any]) -> str:
    """The question itself: an instruction stands on lines of its own below it, in some releases behind a backslash
    and n.
    """
    return question["text"].split("\n")[0].split("\\n")[0]


def load_labels(folder: str) -> dict[str, list[dict[str, Any]]]:
    """category -> label entries of every `coco_pope_*.json` in `folder`, categories in alphabetical order."""
    labels = {}
    for path in sorted(require_folder(folder, "annotation folder").glob(f"{_PREFIX}*.json")):
        labels[path.stem[len(_PREFIX) :]] = read_records(path, "label file", _LABEL)
    if not labels:
        raise UserError(f"{folder}: holds no {_PREFIX}*.json")
    return labels


def load_questions(path: str) -> list[dict[str, Any]]:
    """The question file; POPE needs `question_id`, `text` and `category`."""
    return read_records(path, "question file", _QUESTION)


def score_files(annotation_dir: str, question_file: str, result_file: str) -> dict[str, Any]:
    """`evaluate_pope` on files; raises `UserError` when no answer belongs to a question."""
    questions, answers = load_questions(question_file), load_answers(result_file, keep_torn=True)
    texts = {str(question["question_id"]): first_line(question) for question in questions}
    check_same_questions(result_file, texts, answers)
    result = evaluate_pope(load_labels(annotation_dir), questions, answers)
    require_joined(len(result["categories"]), result_file, f"a question of {Path(question_file).name}")
    return result


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """Flat keys: f1_<category>, accuracy_<category>, ..., f1_mean and accuracy_mean."""
    flat: dict[str, Any] = {}
    for category, scores in result["categories"].items():
        flat |= {f"{name}_{category}": value for name, value in scores.items()}
    accuracies = [scores["accuracy"] for scores in result["categories"].values()]
    flat["f1_mean"] = result["f1_mean"]
    flat["accuracy_mean"] = sum(accuracies) / len(accuracies)
    return flat


def print_scores(result: dict[str, Any]) -> None:
    """The lines of the published scorer."""
    for category, s in result["categories"].items():
        print(f"Category: {visible(category)}, # samples: {s['tp'] + s['fp'] + s['tn'] + s['fn']}")
        print("TP\tFP\tTN\tFN\t")
        print(f"{s['tp']}\t{s['fp']}\t{s['tn']}\t{s['fn']}")
        print(f"Accuracy: {s['accuracy']}\nPrecision: {s['precision']}\nRecall: {s['recall']}")
        print(f"F1 score: {s['f1']}\nYes ratio: {s['yes_ratio']}")
        print(", ".join(f"{s[name]:.3f}" for name in ("f1", "accuracy", "precision", "recall", "yes_ratio")))
        print("====================================")
    print(f"Average F1 over {len(result['categories'])} categories: {result['f1_mean']}")


class Pope(Task):
    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        labels = load_labels(str(folder / self.truth[0]))
        join_labels(labels, load_questions(str(folder / self.question_file)))  # raises where they do not line up
        return f"{self.truth[0]}: {', '.join(labels)} line up with the questions"

    def grader(self, data_dir: Path) -> Grader:
        """Yes or no; all categories alike."""
        truth = join_labels(*self._truth(data_dir))

        def grade(answer: Mapping[str, Any]) -> float | None:
            key = str(answer["question_id"])
            return float(says_no(answer["text"]) != truth[key][1]) if key in truth else None

        return grade

    def truths(self, data_dir: Path) -> Truths:
        truth = {key: "yes" if positive else "no" for key, (_, positive) in join_labels(*self._truth(data_dir)).items()}
        return lambda answer: truth.get(str(answer["question_id"]))

    def score(self, data_dir: Path, answers: Answers) -> Score:
        result = evaluate_pope(*self._truth(data_dir), answers)
        counts = [(s["tp"] + s["tn"], s["tp"] + s["tn"] + s["fp"] + s["fn"]) for s in result["categories"].values()]
        right, samples = sum(r for r, _ in counts), sum(n for _, n in counts)
        return Score(100 * result["f1_mean"], 100 * right / max(samples, 1), samples)

    def _truth(self, data_dir: Path) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
        return load_labels(str(self.truth_path(data_dir))), load_questions(str(self.questions_path(data_dir)))


TASK = Pope(
    name="pope",
    title="POPE",
    folder="pope",
    question_file="llava_pope_test.jsonl",
    image_folder="val2014",
    truth=("coco",),
    source=f"question file: {EVAL_ZIP}; coco/: POPE's repository, output/coco; images: COCO val2014",
    metric="mean F1",
    columns=(Column("pope", "POPE (mean F1)", figure("f1_mean", 100.0)),),
)
