"""Answers ScienceQA with LLaVA under a pruning method.

    python -m llava.eval.model_vqa_science --model-path CKPT --image-folder images/test \\
        --question-file llava_test_CQM-A.json --answers-file A.jsonl --single-pred-prompt --target-token-num 64

The question file is in LLaVA's conversation format: one JSON list of `id`, optional `image`, `conversations`. Exit
status: 0 all questions answered, 2 wrong input, 3 some samples were skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.answering.tools import answer_science as eval_model
from llava.eval.answering.tools import science_parser as build_parser
from llava.utils import cli_main

__all__ = ["build_parser", "eval_model", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
