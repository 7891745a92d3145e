"""Comparison tables: of finished benchmark runs, with the paper's rows beside them, and of the demo.

python -m llava.eval.table --table 1
python -m llava.eval.table --checkpoint llava-v1.5-7b --benchmarks gqa,pope --csv gqa_pope.csv
python -m llava.eval.table results/demo/demo.json --insert README.md
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.tables import replace_between as replace_between
from llava.eval.reports.paper_tables import retained_percent as retained_percent
from llava.eval.reports.table import build_parser, run
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
