"""DriveLM without an API: accuracy, language, match and coverage of the graph; with GPT's grades the final score too.

    python -m llava.eval.eval_drivelm --truth drivelm_truth.json --result-file answers.jsonl

Words are found without the Java program of the original, which shifts `language` a little.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.drivelm import flat_result, print_scores, score_files
from llava.eval.tasks.join import conclude
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="DriveLM's figures that need no API.")
    parser.add_argument("--truth", required=True, help="scenes with tagged questions (.json)")
    parser.add_argument("--result-file", required=True, help="answer file (.jsonl)")
    parser.add_argument("--gpt-scores", help="GPT's grades, {question id: 0 to 100} (.json): adds the final score")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result as JSON")
    args = parser.parse_args(argv)
    result = score_files(args.truth, args.result_file, args.gpt_scores)
    print_scores(result)
    conclude(result["coverage"], flat_result(result), args.json)


if __name__ == "__main__":
    main()
