"""Which answers differ between two runs, with mutual information, slope and the first layer with other survivors.

python -m llava.eval.diff_answers results/pope/dense.jsonl results/pope/autoprune.jsonl --html changed.html
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.reports.look.diff import build_parser, run
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
