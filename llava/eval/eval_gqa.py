"""GQA accuracy (overall, binary, open, by type) of a LLaVA answer file or of converted predictions.

    python -m llava.eval.eval_gqa --annotation-file testdev_balanced_questions.json --result-file answers.jsonl

Consistency, validity and grounding need files that LLaVA's evaluation does not use, and are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.gqa import flat_result, gqa_accuracy, load_questions, print_scores, score_files, to_prediction
from llava.eval.tasks.join import conclude
from llava.utils import cli_main

__all__ = ["gqa_accuracy", "load_questions", "main", "score_files", "to_prediction"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="GQA accuracy of a LLaVA answer file or of converted predictions.")
    parser.add_argument("--annotation-file", required=True, help="testdev_balanced_questions.json")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl) or converted predictions (.json)")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON (percent)")
    args = parser.parse_args(argv)
    result = score_files(args.annotation_file, args.result_file)
    print_scores(result)
    conclude(result["coverage"], flat_result(result), args.json)


if __name__ == "__main__":
    main()
