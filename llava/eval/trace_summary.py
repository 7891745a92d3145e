"""Summary of trace files: tokens, mutual information, slopes and times, one block per file.

python -m llava.eval.trace_summary pope=results/pope.trace.jsonl gqa=results/gqa.trace.jsonl --plot curves.png
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.reports.trace_summary import build_parser, run
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
