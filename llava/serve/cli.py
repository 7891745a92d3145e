"""Chat with LLaVA in the terminal about one or more images.

    python -m llava.serve.cli --model-path CKPT --image-file a.png --target-token-num 64

An empty line, Ctrl-D or Ctrl-C ends it. Answers are streamed to stdout; what pruning kept in each turn goes to
stderr.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.answering.terminal import build_parser, run_chat
from llava.utils import cli_main

__all__ = ["build_parser", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    run_chat(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    main()
