"""The table of a comparison again, its paired differences, or its place in a document.

python -m llava.eval.compare_report results/compare/compare.json --matrix --insert docs/comparison.md
python -m llava.eval.compare_report results/compare/compare.json --versus "autoprune 64"
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.common.outputs import DOCUMENT
from llava.eval.common.tables import print_or_insert
from llava.eval.reports.comparison_tables import describe
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Print the table of a comparison, or put it into a document.")
    parser.add_argument("result", help="compare.json, written by llava.eval.compare")
    parser.add_argument("--matrix", action="store_true", help="methods by budgets, mean accuracy only")
    parser.add_argument(
        "--insert", type=DOCUMENT, metavar="DOCUMENT", help="replace the text between the markers of this file"
    )
    parser.add_argument("--marker", default="comparison", help="name of the markers: <!-- NAME: begin -->, end")
    parser.add_argument(
        "--versus", nargs="+", metavar="LABEL",
        help="instead of the table: differences from the first setting, paired over the questions; the others named, "
        "or all of its budget (dense: all). A label is method and budget: 'autoprune 64'",
    )  # fmt: skip
    args = parser.parse_args(argv)
    print_or_insert(describe(args.result, args.matrix, args.versus), args.insert, args.marker)


if __name__ == "__main__":
    main()
