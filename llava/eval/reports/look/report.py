"""The report of one or several runs: flags, and what becomes of them."""

from __future__ import annotations

import argparse

from llava.eval.common.arguments import Parser, check_range
from llava.eval.reports.look.html import REPORT, write_report
from llava.eval.reports.look.joined import choose, join
from llava.eval.reports.look.sources import add_source_arguments, read_sets

LIMIT = 1000


def build_parser() -> Parser:
    """All flags of the tool."""
    parser = Parser(
        prog="python -m llava.eval.report",
        description="Look at runs in the browser: one HTML file with answers, surviving patches and curves.",
    )
    parser.add_argument(
        "take", nargs="+", metavar="[NAME=]ANSWERS",
        help="answer files, or folders of them; files of one NAME are one run over several benchmarks; default names: "
        "method and budget",
    )  # fmt: skip
    parser.add_argument("--output", type=REPORT, default="report.html", help="the report")
    parser.add_argument("--title", default=None, help="title of the report; default: the names of the runs")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help="questions at most, spread over the benchmarks; 0: all of them"
    )
    add_source_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Reads the runs and writes the report."""
    check_range("--limit", args.limit, 0)
    joined = join(read_sets(args, args.take))
    title = ", ".join(joined.runs) if args.title is None else args.title
    write_report(args.output, joined, choose(joined.entries, args.limit), title)
