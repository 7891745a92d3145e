"""VQA accuracy where VQAv2 or VizWiz answers are at hand (their test answers are not: the server grades those).

    python -m llava.eval.eval_vqa --annotation-file v2_mscoco_val2014_annotations.json --result-file answers.jsonl
    python -m llava.eval.eval_vqa --annotation-file test.json --question-file llava_test.jsonl --result-file a.jsonl

Knows the annotation formats of both benchmarks, answer files and upload files; the metric is in `vqa_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, read_records, require_file, write_json
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.scoring import join_answers, load_answers
from llava.eval.tasks.vqa_text import soft_accuracy
from llava.schema import ID, SCALAR, TEXT, Fields, ListOf, check, optional
from llava.utils import UserError, cli_main, visible

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

    def percent(values: Sequence[float]) -> float:
        return 100.0 * sum(values) / len(values) if values else 0.0

    return {
        "accuracy": percent(list(scores.values())),
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
    if result["samples"] == 0:
        raise UserError(f"{result_file}: no answer belongs to a question of {Path(annotation_file).name}")
    return result


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="VQA accuracy of VQAv2 or VizWiz answers.")
    parser.add_argument("--annotation-file", required=True, help="VQAv2 or VizWiz annotations with answers (.json)")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl) or upload file (.json)")
    parser.add_argument("--question-file", help="VizWiz: llava_test.jsonl, which names the image of each question")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON (percent)")
    args = parser.parse_args(argv)
    result = score_files(args.annotation_file, args.result_file, args.question_file)
    coverage, types = result.pop("coverage"), result.pop("types")
    print(f"Samples: {result['samples']}\nAccuracy: {result['accuracy']:.2f}%")
    for name, (percent, count) in types.items():
        print(f"  {visible(name)}: {percent:.2f}% ({count} questions)")
    coverage.report()
    if args.json:
        flat = {f"type_{name}": percent for name, (percent, _) in types.items()}
        write_json(args.json, {**result, **flat, **coverage.to_dict()})


if __name__ == "__main__":
    main()
