"""ScienceQA accuracy of a LLaVA answer file: all problems, problems with an image, and by subject.

    python -m llava.eval.eval_science_qa --base-dir scienceqa --result-file answers.jsonl \\
        --output-file output.jsonl --output-result result.json

Knows `problems.json` and `pid_splits.json`; needs no images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, require_folder, write_json, write_text_atomic
from llava.eval.common.outputs import SCORES, JsonObject
from llava.eval.tasks.scoring import Coverage, check_same_questions, join_answers, load_answers, warn
from llava.schema import ID, TEXT, Fields, ListOf, check, kind_of, optional
from llava.utils import UserError, cli_main, visible

OPTIONS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
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
        "accuracy": _percent(right),
        "img_accuracy": _percent(with_image),
        "correct": sum(right),
        "total": len(right),
        "img_correct": sum(with_image),
        "img_total": len(with_image),
        "failed": sum(entry["parsed_ans"] == FAILED for entry in analyses),
        "subjects": {name: (_percent(values), len(values)) for name, values in sorted(subjects.items())},
        "analyses": analyses,
        "right": right,
        "indices": indices,
        "coverage": coverage,
    }


def _join(split: Sequence[str], answers: Sequence[dict[str, Any]]) -> tuple[dict[str, str], Coverage]:
    return join_answers(map(str, split), answers, lambda item: str(item["question_id"]))


def _percent(values: Sequence[bool]) -> float:
    return sum(values) / len(values) * 100 if values else 0.0


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
    if result["coverage"].scored == 0:
        raise UserError(f"{result_file}: no answer belongs to a problem of split {split!r} of {base_dir}")
    return result


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """Flat keys in percent: accuracy, img_accuracy, subject_<name>; counts; coverage."""
    names = ("accuracy", "img_accuracy", "correct", "total", "img_correct", "img_total", "failed")
    subjects = {f"subject_{name.replace(' ', '_')}": value for name, (value, _) in result["subjects"].items()}
    return {**{name: result[name] for name in names}, **subjects, **result["coverage"].to_dict()}


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="ScienceQA accuracy of a LLaVA answer file.")
    parser.add_argument("--base-dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl)")
    parser.add_argument(
        "--output-file",
        type=JsonObject("graded problems", ("correct", "incorrect")),
        help="write every problem, sorted into correct and incorrect, as JSON",
    )
    parser.add_argument(
        "--output-result",
        type=JsonObject("a summary of predictions", ("acc", "results", "outputs")),
        help="write the summary with every prediction as JSON",
    )
    parser.add_argument("--split", default="test", help="split of pid_splits.json")
    parser.add_argument("--options", type=list, default=list(OPTIONS), help="option letters, written as one word")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the scores as JSON (percent)")
    args = parser.parse_args(argv)
    result = score_files(args.base_dir, args.result_file, args.split, args.options)
    print(
        f"Total: {result['total']}, Correct: {result['correct']}, Accuracy: {result['accuracy']:.2f}%, "
        f"IMG-Accuracy: {result['img_accuracy']:.2f}%"
    )
    for name, (percent, count) in result["subjects"].items():
        print(f"  {visible(name)}: {percent:.2f}% ({count} problems)")
    result["coverage"].report("of {expected} problems have no answer and count as wrong")
    unread = result["failed"] - len(result["coverage"].missing)
    if unread:
        warn(f"{unread} answers name no option and count as wrong")
    if not result["img_total"]:
        warn("no answered problem has <image> in its prompt, so there is no IMG-Accuracy; 0 stands for it")
    graded, summary = output_files(result)
    # As upstream writes them: escaped, no line break at the end.
    for path, content in ((args.output_file, graded), (args.output_result, summary)):
        if path:
            write_text_atomic(Path(path), json.dumps(content, indent=2))
    if args.json:
        write_json(args.json, flat_result(result))


if __name__ == "__main__":
    main()
