"""Asks one question about one or more images.

    python -m llava.eval.run_llava --model-path CKPT --image-file a.png,b.png --query "What is this?" \\
        --target-token-num 64

The answer goes to stdout, what pruning did to stderr.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.answering.asking import build_parser, eval_model
from llava.utils import cli_main

__all__ = ["build_parser", "eval_model", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    eval_model(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    main()
