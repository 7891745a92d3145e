"""Grades answers to the miniature MM-Vet by a rule, into the file that MM-Vet's evaluator would leave.

    python -m playground.tiny.measure.grade_mmvet --annotation-file mm-vet.json --result-file results/run.json \\
        --output-file results/run_rule-grade-1runs.json

MM-Vet proper is graded by GPT-4, which reads meaning. This is not that: it looks for the words of the ground truth and
is made for the miniature, where answers are a word of a small world. An answer gets the share of the `<AND>` parts
whose words it holds; of several `<OR>` alternatives the best counts. Do not use it on the real MM-Vet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, write_json
from llava.eval.common.outputs import JsonObject
from llava.utils import UserError, cli_main

GRADER = "rule"
GRADES = JsonObject("grades of MM-Vet", of=("model", "content", "score"))


def words(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def holds(answer: str, part: str) -> bool:
    """Whether the words of `part` stand in the answer, one behind the other."""
    said, wanted = words(answer), words(part)
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1)) and bool(wanted)


def grade(answer: str, truth: str) -> float:
    """From 0 to 1: the share of the parts between `<AND>` that the answer holds, in the best of the alternatives
    between `<OR>`."""
    shares = []
    for alternative in truth.split("<OR>"):
        parts = alternative.split("<AND>")
        shares.append(sum(holds(answer, part) for part in parts) / len(parts))
    return max(shares)


def grade_all(annotations: dict[str, dict], answers: dict[str, str]) -> dict[str, dict]:
    """Entries of MM-Vet's grade file, for the questions that have an answer."""
    grades = {}
    for key, entry in annotations.items():
        if key in answers:
            score = round(grade(str(answers[key]), str(entry["answer"])), 2)
            grades[key] = {"model": [GRADER], "content": [str(score)], "score": [score]}
    return grades


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotation-file", required=True, help="mm-vet.json of the miniature")
    parser.add_argument("--result-file", required=True, help="answers as scripts/convert_mmvet_for_eval.py writes them")
    parser.add_argument(
        "--output-file",
        type=GRADES,
        help="grade file; default: beside the answers, with _rule-grade-1runs behind the name",
    )
    args = parser.parse_args(argv)
    annotations = read_json(args.annotation_file, "annotation file")
    answers = read_json(args.result_file, "result file")
    if not isinstance(annotations, dict) or not all(
        isinstance(e, dict) and "answer" in e for e in annotations.values()
    ):
        raise UserError(f"{args.annotation_file}: not an MM-Vet annotation file (needs id -> object with 'answer')")
    if not isinstance(answers, dict):
        raise UserError(
            f"{args.result_file}: not converted MM-Vet answers (needs id -> text); see convert_mmvet_for_eval"
        )
    grades = grade_all(annotations, answers)
    if not grades:
        raise UserError(f"{args.result_file}: no answer belongs to a question of {args.annotation_file}")
    source = Path(args.result_file)
    target = Path(args.output_file) if args.output_file else source.with_name(f"{source.stem}_rule-grade-1runs.json")
    GRADES.check(target)
    write_json(target, grades)
    print(f"graded {len(grades)} of {len(annotations)} answers by rule (not by GPT-4): {target}")


if __name__ == "__main__":
    main()
