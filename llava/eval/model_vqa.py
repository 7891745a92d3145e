"""Answers open questions with LLaVA under a pruning method: MM-Vet, LLaVA-Bench.

    python -m llava.eval.model_vqa --model-path CKPT --image-folder IMAGES --question-file Q.jsonl \\
        --answers-file A.jsonl --target-token-num 64

The tool is `model_vqa_loader` with room for long answers and, as published, with the CLS attention on padding left as
it is; files and exit statuses are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.answering.tools import answer_open_ended as eval_model
from llava.eval.answering.tools import open_ended_parser as build_parser
from llava.utils import cli_main

__all__ = ["build_parser", "eval_model", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
