"""LLaVA-Bench: adds up reviews, in which GPT-4 gave two answers to a question a grade from 1 to 10 each.

python -m llava.eval.summarize_gpt_review --dir reviews
python -m llava.eval.summarize_gpt_review --files reviews/llava-v1.5-7b.jsonl --ignore 3
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.tasks.llava_bench import SUMMARY, load_reviews, print_summary, review_files, summarize
from llava.utils import UserError, cli_main

__all__ = ["load_reviews", "main", "summarize"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Add up the reviews of LLaVA-Bench.")
    add = parser.add_argument
    add("-d", "--dir", help="summarize every .jsonl of this folder")
    add("-v", "--version", help="only reviews by this GPT-4: 0613 if the name says so, else 0314")
    add("-f", "--files", nargs="*", default=[], help="review files (.jsonl), below --dir if given")
    add("-s", "--select", nargs="*", default=[], help="only files whose name holds all of these")
    add("-i", "--ignore", nargs="*", default=[], metavar="ID", help="question ids to leave out")
    add("--json", type=SUMMARY, metavar="PATH", help="write the summary of a single file as JSON (percent)")
    args = parser.parse_args(argv)
    files = review_files(args.dir, args.files, args.select, args.version)
    if args.json and len(files) > 1:
        raise UserError("--json goes with one review file")
    for path in files:
        print_summary(path, args.ignore, args.json)


if __name__ == "__main__":
    main()
