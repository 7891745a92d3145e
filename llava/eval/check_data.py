"""Says what of a benchmark's data is missing or misplaced, before a run of hours starts.

    python -m llava.eval.check_data textvqa --data-dir playground/data/eval
    python -m llava.eval.check_data all

Checks that the files are where the scripts look for them, that questions and truth can be read and belong together, and
that images exist (a sample of them; with --all-images every one). Loads no model. Exit status: 0 everything is there,
2 something is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.tasks.data_check import check_benchmark, report_all
from llava.eval.tasks.registry import TASKS, get_task
from llava.places import DATA
from llava.utils import cli_main

__all__ = ["check_benchmark", "main"]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    names = ", ".join(task.name for task in TASKS)
    parser = Parser(description="Say what of a benchmark's data is missing or misplaced.")
    parser.add_argument("benchmarks", nargs="+", metavar="BENCHMARK", help=f"all, or some of: {names}")
    parser.add_argument("--data-dir", default=str(DATA), help="benchmark data, upstream's layout")
    parser.add_argument("--all-images", action="store_true", help="look for every image, not for a sample")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    args = parser.parse_args(argv)
    tasks = TASKS if "all" in args.benchmarks else [get_task(name) for name in args.benchmarks]
    return report_all(tasks, args.data_dir, args.all_images, args.quiet)


if __name__ == "__main__":
    main()
