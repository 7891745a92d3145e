"""POPE: is the model's yes/no about objects in the image right? Per category and the mean F1.

    python -m llava.eval.eval_pope --annotation-dir pope/coco --question-file llava_pope_test.jsonl \\
        --result-file answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.join import conclude
from llava.eval.tasks.pope import evaluate_pope, flat_result, load_labels, pope_scores, print_scores, score_files
from llava.utils import cli_main

__all__ = ["evaluate_pope", "load_labels", "main", "pope_scores", "score_files"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="POPE scores of a LLaVA answer file.")
    parser.add_argument("--annotation-dir", required=True, help="folder with coco_pope_*.json")
    parser.add_argument("--question-file", required=True, help="llava_pope_test.jsonl")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl)")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON (ratios 0 to 1)")
    args = parser.parse_args(argv)
    result = score_files(args.annotation_dir, args.question_file, args.result_file)
    print_scores(result)
    conclude(result["coverage"], flat_result(result), args.json)


if __name__ == "__main__":
    main()
