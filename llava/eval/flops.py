"""FLOPs of AutoPrune without running a model: the decoder's geometry, a prompt length and the planned schedule.

python -m llava.eval.flops --budgets 192,128,64
python -m llava.eval.flops --question-files playground/data/eval/*/llava_*.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.reports.flops import build_parser, run
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
