"""A whole benchmark, from the questions to the score or the upload, by its script in `scripts/`.

    python -m llava.eval.benchmark textvqa 64 --model-path checkpoints/llava-v1.5-7b
    python -m llava.eval.benchmark pope dense --tiny --limit 60

Flags that are not listed go to the answering tool. Exit status: 0 done, 2 wrong input, 3 scored, but some samples were
skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.tasks.scripts import build_parser, run
from llava.utils import cli_main

__all__ = ["build_parser", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return run(*build_parser().parse_known_args(argv))


if __name__ == "__main__":
    main()
