"""ScienceQA accuracy of a LLaVA answer file: all problems, problems with an image, and by subject.

    python -m llava.eval.eval_science_qa --base-dir scienceqa --result-file answers.jsonl \\
        --output-file output.jsonl --output-result result.json
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks import science_qa
from llava.eval.tasks.science_qa import evaluate_science_qa, load_problems, read_option, score_files
from llava.utils import cli_main

__all__ = ["evaluate_science_qa", "load_problems", "main", "read_option", "score_files"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="ScienceQA accuracy of a LLaVA answer file.")
    add, options = parser.add_argument, list(science_qa.OPTIONS)
    add("--base-dir", required=True, help="folder with problems.json and pid_splits.json")
    add("--result-file", required=True, help="answer file (.jsonl)")
    add("--output-file", type=science_qa.GRADED, help="write every problem, sorted into correct and incorrect, as JSON")
    add("--output-result", type=science_qa.SUMMARY, help="write the summary with every prediction as JSON")
    add("--split", default="test", help="split of pid_splits.json")
    add("--options", type=list, default=options, help="option letters, written as one word")
    add("--json", type=SCORES, metavar="PATH", help="write the scores as JSON (percent)")
    args = parser.parse_args(argv)
    science_qa.conclude_run(score_files(args.base_dir, args.result_file, args.split, args.options), args)


if __name__ == "__main__":
    main()
