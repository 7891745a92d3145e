"""The main job on the embedded default: dense and pruned LLaVA on the four miniature benchmarks.

python -m llava.eval.demo --output-dir results/demo
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.reports.demo import build_parser, run
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
