"""Answers a question file with LLaVA under a pruning method.

    python -m llava.eval.model_vqa_loader --model-path CKPT --image-folder IMAGES --question-file Q.jsonl \\
        --answers-file A.jsonl --target-token-num 64

Exit status: 0 all questions answered, 2 wrong input, 3 some samples were skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.answering.tools import answer_question_file as eval_model
from llava.eval.answering.tools import loader_parser as build_parser
from llava.utils import cli_main

__all__ = ["build_parser", "eval_model", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
