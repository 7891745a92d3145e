"""Runs side by side in the browser: answers, surviving patches layer by layer, curves; one HTML file.

python -m llava.eval.report results/pope/dense.jsonl results/pope/autoprune.jsonl --output report.html
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.reports.look.report import build_parser, run
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
