"""A web demo: a question about a picture, answered dense and pruned side by side, with what survives in every layer.

python -m llava.serve.gradio_app --model-path CKPT
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.serve.web import build_parser, serve
from llava.utils import cli_main

__all__ = ["build_parser", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    serve(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
