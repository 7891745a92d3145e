"""Answers a question file with LLaVA under a pruning method.

    python -m llava.eval.model_vqa_loader --model-path CKPT --image-folder IMAGES --question-file Q.jsonl \\
        --answers-file A.jsonl --target-token-num 64

Exit status: 0 all questions answered, 2 wrong input, 3 some samples were skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.answering.command import ZERO, add_padding_argument, add_running_arguments, run_questions
from llava.eval.common.arguments import Parser, add_generation_arguments, add_model_arguments, add_pruning_arguments
from llava.eval.common.outputs import ANSWERS
from llava.eval.common.questions import chunk, read_questions
from llava.utils import UserError, cli_main


def build_parser(padding_attention: str = ZERO) -> argparse.ArgumentParser:
    """All flags of the tool. padding_attention: the default that --help tells."""
    parser = Parser(
        prog="python -m llava.eval.model_vqa_loader",
        description="Answer a question file with LLaVA under a visual-token pruning method.",
    )
    add_model_arguments(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--image-folder", default="", help="folder that the image names are relative to")
    data.add_argument("--question-file", default="tables/question.jsonl", help="one JSON object per line")
    data.add_argument("--answers-file", type=ANSWERS, default="answer.jsonl", help="written line by line")
    data.add_argument("--num-chunks", type=int, default=1, help="parts the question file is cut into")
    data.add_argument("--chunk-idx", type=int, default=0, help="the part to answer, from 0")
    data.add_argument("--limit", type=int, default=None, help="only the first LIMIT questions; default: all")
    add_generation_arguments(parser)
    add_pruning_arguments(parser)
    add_padding_argument(parser, padding_attention)
    add_running_arguments(parser)
    return parser


def eval_model(args: argparse.Namespace, padding_attention: str = ZERO) -> int:
    """Runs what the flags say; returns the exit status. padding_attention: see `run_questions`."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    questions = read_questions(args.question_file)[: args.limit]
    questions = chunk(questions, args.num_chunks, args.chunk_idx)
    return run_questions(args, questions, padding_attention=padding_attention)


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
