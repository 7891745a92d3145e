"""Answers open questions with LLaVA under a pruning method: MM-Vet, LLaVA-Bench.

    python -m llava.eval.model_vqa --model-path CKPT --image-folder IMAGES --question-file Q.jsonl \\
        --answers-file A.jsonl --target-token-num 64

The tool is `model_vqa_loader` with room for long answers and, as published, with the CLS attention on padding left as
it is; files and exit statuses are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval import model_vqa_loader
from llava.eval.answering.command import KEEP
from llava.utils import cli_main

MAX_NEW_TOKENS = 1024


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = model_vqa_loader.build_parser(KEEP)
    parser.prog = "python -m llava.eval.model_vqa"
    parser.description = "Answer open questions with LLaVA under a visual-token pruning method."
    parser.set_defaults(max_new_tokens=MAX_NEW_TOKENS)
    return parser


def eval_model(args: argparse.Namespace) -> int:
    """Runs what the flags say; returns the exit status."""
    return model_vqa_loader.eval_model(args, KEEP)


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
