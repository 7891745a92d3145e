"""Answers MMBench with LLaVA under a pruning method.

    python -m llava.eval.model_vqa_mmbench --model-path CKPT --question-file mmbench_dev_20230712.tsv \\
        --answers-file A.jsonl --single-pred-prompt --target-token-num 64

Images are in the tsv, so there is no image folder. Exit status: 0 all questions answered, 2 wrong input, 3 some samples
were skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.answering.tools import answer_mmbench as eval_model
from llava.eval.answering.tools import mmbench_parser as build_parser
from llava.utils import cli_main

__all__ = ["build_parser", "eval_model", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
