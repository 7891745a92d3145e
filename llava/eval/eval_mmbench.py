"""MMBench accuracy where the tsv carries the answers: circular, single-pass, per row and by category.

    python -m llava.eval.eval_mmbench --annotation-file mmbench_dev_20230712.tsv --result-file answers.jsonl

Reads LLaVA answer files and the upload workbook, by rule; the server's reading by ChatGPT of what the rules do not
understand is not imitated: such answers are wrong and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks import mmbench
from llava.eval.tasks.join import conclude
from llava.eval.tasks.mmbench import evaluate_mmbench, load_rows, read_answer, read_choice, score_files
from llava.utils import cli_main

__all__ = ["evaluate_mmbench", "load_rows", "main", "read_answer", "read_choice", "score_files"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="MMBench accuracy of a LLaVA answer file or an upload workbook.")
    parser.add_argument("--annotation-file", required=True, help="tsv with an answer column (dev split)")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl) or upload workbook (.xlsx)")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON (percent)")
    args = parser.parse_args(argv)
    result = score_files(args.annotation_file, args.result_file)
    mmbench.print_scores(result)
    conclude(result["coverage"], mmbench.flat_result(result), args.json, mmbench.MISSING)
    mmbench.warn_unread(result)


if __name__ == "__main__":
    main()
