"""TextVQA accuracy of a LLaVA answer file.

python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import SCORES
from llava.eval.tasks.textvqa import load_annotations, question_of_prompt, score_all, score_file, textvqa_accuracy
from llava.utils import cli_main

__all__ = ["load_annotations", "main", "question_of_prompt", "score_file", "textvqa_accuracy"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="TextVQA accuracy of a LLaVA answer file.")
    parser.add_argument("--annotation-file", required=True, help="TextVQA_0.5.1_val.json")
    parser.add_argument("--result-file", help="answer file (.jsonl)")
    parser.add_argument("--result-dir", help="score every .jsonl of this folder")
    parser.add_argument("--json", type=SCORES, metavar="PATH", help="write the result of --result-file as JSON")
    args = parser.parse_args(argv)
    score_all(args.annotation_file, args.result_file, args.result_dir, args.json)


if __name__ == "__main__":
    main()
