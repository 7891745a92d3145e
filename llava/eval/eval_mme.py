"""MME: perception and cognition totals and the fourteen subtasks, without the official tool.

    python -m llava.eval.eval_mme --annotation-dir MME_Benchmark_release_version \\
        --question-file llava_mme.jsonl --result-file answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.join import conclude
from llava.eval.tasks.mme import TOOL_FOLDER, evaluate_mme, flat_result, print_scores, score_files, write_tool_files
from llava.utils import cli_main

__all__ = ["evaluate_mme", "main", "score_files", "write_tool_files"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="MME scores of a LLaVA answer file.")
    parser.add_argument("--annotation-dir", required=True, help="folder MME_Benchmark_release_version")
    parser.add_argument("--question-file", required=True, help="llava_mme.jsonl")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl)")
    parser.add_argument("--tool-dir", type=TOOL_FOLDER, metavar="FOLDER", help="write the official tool's input")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON")
    args = parser.parse_args(argv)
    result = score_files(args.annotation_dir, args.question_file, args.result_file)
    print_scores(result)
    conclude(result["coverage"], flat_result(result), args.json)
    if args.tool_dir:
        write_tool_files(args.tool_dir, args.annotation_dir, args.question_file, args.result_file)


if __name__ == "__main__":
    main()
