"""Many methods and budgets on the miniature benchmarks or on any question file: one model, one table, one plot.

    python -m llava.eval.compare --methods autoprune,fastv,random --budgets 192,128,64 --output-dir results/compare
    python -m llava.eval.compare --ablations --budgets 128,64 --output-dir results/ablations
    python -m llava.eval.compare --methods fastv --budgets 64 --question-file q.jsonl --image-folder images

Exit status: 0 all answered, 2 wrong input, 3 some images could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.reports.comparison import build_parser, run
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
