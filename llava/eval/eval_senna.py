"""Meta actions of Senna's planning questions, in the reading of Senna's script and in a strict one.

    python -m llava.eval.eval_senna --truth senna_truth.json --result-file answers.jsonl

Printed beside both is what an answer that is always the same would get.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.join import conclude
from llava.eval.tasks.senna import evaluate_senna, flat_result, load_truth, print_scores, score_files
from llava.utils import cli_main

__all__ = ["evaluate_senna", "load_truth", "main", "score_files"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Scores of meta actions, a speed and a path.")
    parser.add_argument("--truth", required=True, help="senna_truth.json of scripts/convert_senna_for_eval.py")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl)")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON (percent)")
    args = parser.parse_args(argv)
    result = score_files(args.truth, args.result_file)
    print_scores(result)
    conclude(result["coverage"], flat_result(result), args.json)


if __name__ == "__main__":
    main()
