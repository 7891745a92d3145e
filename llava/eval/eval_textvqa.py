"""TextVQA accuracy of a LLaVA answer file.

    python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file answers.jsonl

Knows the TextVQA annotation format and LLaVA's prompt layouts; the metric itself is in `vqa_text`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, require_folder, write_json
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.scoring import QuestionIndex, join_answers, load_answers
from llava.eval.tasks.vqa_text import soft_accuracy
from llava.schema import ID, TEXT, Fields, ListOf, check
from llava.utils import UserError, cli_main

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
    references = {(str(item["image_id"]), item["question"].lower()): item["answers"] for item in annotations}
    questions = QuestionIndex(references)

    def key(answer: dict[str, Any]) -> tuple[str, str] | None:
        return find_key(questions, str(answer["question_id"]), answer.get("prompt", ""))

    found, coverage = join_answers(references, answers, key)
    scores = [soft_accuracy(text, references[key]) for key, text in found.items()]
    accuracy = 100.0 * sum(scores) / len(scores) if scores else 0.0
    return {"accuracy": accuracy, "samples": len(scores), "coverage": coverage}


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
    if result["samples"] == 0:
        raise UserError(f"{result_file}: no answer belongs to a question of the annotation file")
    return result


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="TextVQA accuracy of a LLaVA answer file.")
    parser.add_argument("--annotation-file", required=True, help="TextVQA_0.5.1_val.json")
    parser.add_argument("--result-file", help="answer file (.jsonl)")
    parser.add_argument("--result-dir", help="score every .jsonl of this folder")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result of --result-file as JSON")
    args = parser.parse_args(argv)
    if bool(args.result_file) == bool(args.result_dir):
        raise UserError("give either --result-file or --result-dir")
    if args.json and args.result_dir:
        raise UserError("--json goes with --result-file, not with --result-dir")

    annotations = load_annotations(args.annotation_file)
    files = [args.result_file]
    if args.result_dir:
        files = [str(path) for path in sorted(require_folder(args.result_dir, "result folder").glob("*.jsonl"))]
        if not files:
            raise UserError(f"{args.result_dir}: holds no .jsonl file")
    for file in files:
        result = score_file(annotations, file)
        coverage = result.pop("coverage")
        print(Path(file).stem)
        print(f"Samples: {result['samples']}\nAccuracy: {result['accuracy']:.2f}%\n")
        coverage.report()
        if args.json:
            write_json(args.json, {**result, **coverage.to_dict()})


if __name__ == "__main__":
    main()
