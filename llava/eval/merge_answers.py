"""Merges the answer files of parts of one run into one file, in question order.

    python -m llava.eval.merge_answers --answers-file ALL.jsonl --question-file Q.jsonl 3_0.jsonl 3_1.jsonl 3_2.jsonl

Parts come from `--num-chunks/--chunk-idx`, or from several processes. Refused by name: a part that is missing or
unfinished, parts of different runs, answers to no question, questions without an answer. The merged file and its
metadata appear whole or not at all. Exit status: 0 merged, 2 refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.eval.answering.merge_tool import merge_files
from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import ANSWERS
from llava.utils import cli_main, visible


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    description = "Merge the answers of parts of one run, in question order."
    parser = Parser(prog="python -m llava.eval.merge_answers", description=description)
    parser.add_argument("--answers-file", type=ANSWERS, required=True, help="the merged file")
    parser.add_argument("--question-file", required=True, help="the questions of the whole run")
    parser.add_argument("--allow-missing", action="store_true", help="merge although questions have no answer")
    parser.add_argument("parts", nargs="+", metavar="PART", help="answer file of a part")
    args = parser.parse_args(argv)
    counts = merge_files(args.answers_file, args.question_file, args.parts, args.allow_missing)
    text = f"merged {counts['answered']} answers of {len(args.parts)} parts into {args.answers_file}"
    skipped = f"; {counts['missing']} questions were skipped" if counts["missing"] else ""
    print(visible(text + skipped), file=sys.stderr)


if __name__ == "__main__":
    main()
