"""VQAv2 and VizWiz: soft accuracy where their answers are at hand, and the uploads for their server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_json, read_records, require_file
from llava.eval.common.questions import Question, read_questions
from llava.eval.tasks.join import join_answers, load_answers, percent, require_joined
from llava.eval.tasks.task import EVAL_ZIP, Answers, Column, Grader, Score, Task, Truths, covered, figure, id_of
from llava.eval.tasks.vqa_text import in_words, normalize_answer, soft_accuracy
from llava.schema import ID, SCALAR, TEXT, Fields, ListOf, check, optional
from llava.utils import UserError, visible

_ANNOTATION = {"answers": ListOf(Fields({"answer": TEXT}), least=1), "answer_type?": optional(TEXT)}
_VQAV2 = Fields({"annotations": ListOf(Fields({"question_id": ID, **_ANNOTATION}), least=1)})
_VIZWIZ = ListOf(Fields({"image": TEXT, **_ANNOTATION}), least=1)
_UPLOAD = ListOf(Fields({"question_id?": ID, "image?": ID, "answer": SCALAR}))
_ASKED_ABOUT = Fields({"question_id": ID, "image": TEXT})


def vqa_accuracy(annotations: Mapping[str, Mapping[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean soft accuracy in percent over the answered questions, overall and by answer type.

    annotations: key (question id, or image name for VizWiz) -> `answers` (strings) and perhaps `answer_type`;
    answers: `question_id` (the same key) and `text`.
    """
    found, coverage = join_answers(annotations, answers, lambda item: str(item["question_id"]))
    scores = {key: soft_accuracy(text, annotations[key]["answers"]) for key, text in found.items()}
    types: dict[str, list[float]] = {}
    for key, score in scores.items():
        if annotations[key].get("answer_type"):
            types.setdefault(str(annotations[key]["answer_type"]), []).append(score)

    return {
        "accuracy": percent(scores.values()),
        "samples": len(scores),
        "types": {name: (percent(values), len(values)) for name, values in sorted(types.items())},
        "coverage": coverage,
    }


def load_annotations(path: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Key -> `answers` (strings) and `answer_type`, and what the key is: `question_id` (VQAv2) or `image` (VizWiz)."""
    content = read_json(path, "annotation file")
    entries = content.get("annotations") if isinstance(content, dict) else content
    key = "question_id" if isinstance(content, dict) else "image"
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: neither VQAv2 annotations (a list under 'annotations') nor those of VizWiz (a list)")
    check(content, _VQAV2 if isinstance(content, dict) else _VIZWIZ, path)
    result: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        texts = [item["answer"] for item in entry["answers"]]
        if str(entry[key]) in result:
            raise UserError(f"{path}: entry {index}: {key} {entry[key]!r} occurs twice")
        result[str(entry[key])] = {"answers": texts, "answer_type": entry.get("answer_type")}
    return result, key


def load_results(path: str) -> list[dict[str, Any]]:
    """Entries with `question_id` (VizWiz uploads: the image) and `text`, of an answer file or an upload (JSON list)."""
    with open(require_file(path, "result file"), "rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return load_answers(path, keep_torn=True)
    result = []
    for index, entry in enumerate(check(read_json(path, "upload file"), _UPLOAD, path)):
        key = next((name for name in ("question_id", "image") if name in entry), None)
        if key is None:
            raise UserError(f"{path}: entry {index} needs 'question_id' or 'image'")
        result.append({"question_id": entry[key], "text": str(entry["answer"])})
    return result


def score_files(annotation_file: str, result_file: str, question_file: str | None = None) -> dict[str, Any]:
    """`vqa_accuracy` on files; raises `UserError` when no answer belongs to a question.

    question_file: gives the image of each question id, for answers to questions whose annotations name images only.
    """
    annotations, key = load_annotations(annotation_file)
    answers = load_results(result_file)
    if key == "image" and question_file:
        questions = read_records(question_file, "question file", _ASKED_ABOUT)
        images = {str(question["question_id"]): question["image"] for question in questions}
        answers = [{**a, "question_id": images.get(str(a["question_id"]), a["question_id"])} for a in answers]
    result = vqa_accuracy(annotations, answers)
    require_joined(result["samples"], result_file, f"a question of {Path(annotation_file).name}")
    return result


def vqav2_upload(questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """One entry for each question of the whole test split; an empty string where there is no answer."""
    ids = [question["question_id"] for question in questions]
    return [{"question_id": key, "answer": normalize_answer(texts.get(str(key), ""))} for key in ids]


def vizwiz_upload(questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """`image` and normalized answer in question order; every question needs its answer in `texts`."""
    return [
        {"image": question["image"], "answer": normalize_answer(texts[str(question["question_id"])])}
        for question in questions
    ]


def print_scores(result: dict[str, Any]) -> None:
    """The accuracy in percent, overall and by answer type."""
    print(f"Samples: {result['samples']}\nAccuracy: {result['accuracy']:.2f}%")
    for name, (value, count) in result["types"].items():
        print(f"  {visible(name)}: {value:.2f}% ({count} questions)")


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """accuracy, samples, and type_<answer type>."""
    types = {f"type_{name}": value for name, (value, _) in result["types"].items()}
    return {"accuracy": result["accuracy"], "samples": result["samples"], **types}


@dataclass(frozen=True, kw_only=True)
class Vqa(Task):
    """annotations: the answers of the questions, which a server has; scored here where they are there."""

    annotations: str

    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str | None:
        if not self.truth:
            return None
        whole = set(map(id_of, read_questions(folder / self.truth[0])))
        return covered(whole, questions, id_of, self.truth[0])

    def grader(self, data_dir: Path) -> Grader | None:
        """Soft accuracy where the answers of VQAv2 or VizWiz are at hand; None where only the server has them."""
        references = self._references(data_dir)
        if references is None:
            return None

        def grade(answer: Mapping[str, Any]) -> float | None:
            known = references(answer)
            return None if known is None else soft_accuracy(answer["text"], known)

        return grade

    def truths(self, data_dir: Path) -> Truths | None:
        references = self._references(data_dir)
        if references is None:
            return None

        def truth(answer: Mapping[str, Any]) -> str | None:
            known = references(answer)
            return None if known is None else in_words(known)

        return truth

    def _references(self, data_dir: Path) -> Callable[[Mapping[str, Any]], Sequence[str] | None] | None:
        """The answers that people gave to the question of an answer."""
        path = data_dir / self.folder / self.annotations
        if not path.is_file():
            return None
        annotations, key = load_annotations(str(path))
        records = read_records(self.questions_path(data_dir), "question file", _ASKED_ABOUT)
        names = {str(record["question_id"]): str(record[key]) for record in records}
        known = {identity: annotations[name]["answers"] for identity, name in names.items() if name in annotations}
        return lambda answer: known.get(str(answer["question_id"]))

    def score(self, data_dir: Path, answers: Answers) -> Score:
        grade = self.grader(data_dir)
        if grade is None:
            path = data_dir / self.folder / self.annotations
            raise UserError(f"{path} is not there: {self.title} is scored by its server")
        credits = [credit for answer in answers if (credit := grade(answer)) is not None]
        return Score(percent(credits), percent(credits), len(credits))


VQAV2 = Vqa(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
    question_file="llava_vqav2_mscoco_test-dev2015.jsonl",
    image_folder="test2015",
    truth=("llava_vqav2_mscoco_test2015.jsonl",),
    annotations="v2_mscoco_test-dev2015_annotations.json",
    split="llava_vqav2_mscoco_test-dev2015",
    merged=True,
    source=f"question files: {EVAL_ZIP}; images: COCO test2015, visualqa.org",
    server="EvalAI (VQA challenge)",
    local=False,
    metric="accuracy",
    columns=(Column("vqav2", "VQAv2", figure("accuracy")),),
)

VIZWIZ = Vqa(
    name="vizwiz",
    title="VizWiz",
    folder="vizwiz",
    question_file="llava_test.jsonl",
    image_folder="test",
    annotations="test.json",
    source=f"question file: {EVAL_ZIP}; images: test.zip, vizwiz.org",
    server="EvalAI (VizWiz VQA)",
    local=False,
    metric="accuracy",
    columns=(Column("vizwiz", "VizWiz", figure("accuracy")),),
)
