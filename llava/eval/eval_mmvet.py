"""MM-Vet: total and per-capability score from graded answers (a GPT model grades).

    python -m llava.eval.eval_mmvet --result-file ckpt_gpt-4-0613-grade-1runs.json --annotation-file mm-vet.json

Prints with one decimal, as MM-Vet's evaluator does; the JSON result keeps full precision.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks import mmvet
from llava.eval.tasks.join import conclude
from llava.eval.tasks.mmvet import evaluate_mmvet, load_capabilities, load_grades, score_files
from llava.utils import cli_main

__all__ = ["evaluate_mmvet", "load_capabilities", "load_grades", "main", "score_files"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="MM-Vet scores of a grade file.")
    parser.add_argument("--result-file", required=True, help="grades: {id: {'score': [...]}} or {id: score} (.json)")
    parser.add_argument("--annotation-file", required=True, help="mm-vet.json")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON (percent)")
    args = parser.parse_args(argv)
    result = score_files(args.result_file, args.annotation_file)
    mmvet.print_scores(result)
    conclude(result["coverage"], mmvet.flat_result(result), args.json)
    mmvet.warn_uneven(result)


if __name__ == "__main__":
    main()
