"""docs/performance.md and the tables beside the results, from the files below benchmarks/results.

    python -m benchmarks.report
    python -m benchmarks.report --check

The document gets the targets and a picture for each question, its text stays; the tables go into a file of their own.
Measures nothing: what is written depends on the results alone; `--check` says whether it is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks import targets
from benchmarks.report_plots import SOURCE, draw, drawn_from, leftovers, picture_name
from benchmarks.report_tables import order, section, titles
from benchmarks.saved import RESULTS, Result, read_results
from llava.eval.common import outputs
from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_text, write_text_atomic
from llava.eval.common.tables import replace_between, wrap
from llava.utils import UserError, cli_main

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
_TABLES = (
    "# Results\n\nMade by `python -m benchmarks.report` from the JSON files of this folder; what the figures mean is "
    "in docs/performance.md."
)
TABLES = outputs.Text("tables of benchmark results", r"# Results")
PLOTS = outputs.OutputFolder({"*--*.png": outputs.Picture("a plot of a saved result", SOURCE.encode())})
_TARGETS = (
    "Figures of AutoPrune by budget (target tokens), computed from the results below, on every hardware that they were "
    "measured on. CPU targets: geometry cpu-1024x24 or cpu-qwen-1024x24, float32, sdpa, fixed allocator unless said "
    "otherwise; GPU: bfloat16, sdpa."
)


def in_order(results: Iterable[Result]) -> list[Result]:
    """As the document has them; `UserError` where two say the same of the same thing."""
    found = sorted(results, key=order)
    for one, other in pairwise(found):
        if order(one) == order(other):
            raise UserError(
                f"{other.stem}.json: says the same tool, hardware, versions and allocator as {one.stem}.json; "
                "remove one of them"
            )
    return found


@dataclass(frozen=True)
class Rendered:
    """The generated part of the document, the tables, and the results that have a picture in the document."""

    document: str
    tables: str
    drawn: list[Result]


def render(results: Sequence[Result], folder: str) -> Rendered:
    """folder: of the pictures, from the document."""
    results = in_order(results)
    shown = [f"### Targets\n\n{wrap(_TARGETS)}", targets.table(targets.outcomes(results))]
    tables, drawn = [_TABLES], []
    for result, heading in zip(results, titles(results), strict=True):
        name = picture_name(result)
        if name:
            drawn.append(result)
            shown.append(f"![{heading}]({folder}/{name})")
        tables.append(section(result, heading))
    return Rendered("\n\n".join(shown), wrap("\n\n".join(tables)) + "\n", drawn)


def outdated(documents: Mapping[Path, str], pictures: Path, drawn: Sequence[Result]) -> list[str]:
    """What `--check` complains about."""
    found = [
        f"{path}: its tables are not those of the results"
        for path, text in documents.items()
        if not path.is_file() or read_text(path, "document") != text
    ]
    for path, digest in ((pictures / f"{result.stem}.png", result.digest) for result in drawn):
        if drawn_from(path) != digest:
            found.append(f"{path}: {'drawn from other figures' if path.is_file() else 'missing'}")
    return found + [f"{path}: no result has this picture" for path in leftovers(pictures, drawn)]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Render the tables and plots of docs/performance.md from the saved results.")
    parser.add_argument("--results-dir", default=str(RESULTS), help="folder with the results")
    parser.add_argument(
        "--document", type=outputs.DOCUMENT, default=str(DOCUMENT), help="markdown file with the markers"
    )
    parser.add_argument(
        "--tables", type=TABLES, default=None, help="markdown file of the tables; default: README.md beside the results"
    )
    parser.add_argument(
        "--plots", type=PLOTS, default=None, help="folder of the plots; default: images/ beside the document"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if something is not up to date"
    )
    args = parser.parse_args(argv)
    results = read_results(Path(args.results_dir))
    if not results:
        raise UserError(f"--results-dir: holds no results: {args.results_dir}; run a benchmark with --save first")
    document = Path(args.document)
    pictures = Path(args.plots) if args.plots else document.parent / "images"
    tables = Path(args.tables) if args.tables else Path(args.results_dir) / "README.md"
    TABLES.check(tables)
    rendered = render(results, pictures.name)
    text = replace_between(read_text(document, "document"), "results", rendered.document, str(document))
    if args.check:
        complaints = outdated({document: text, tables: rendered.tables}, pictures, rendered.drawn)
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        print("up to date" if not complaints else "not up to date: run python -m benchmarks.report")
        return 1 if complaints else 0
    for result in rendered.drawn:
        draw(result, pictures)
    for path in leftovers(pictures, rendered.drawn):
        path.unlink()
        print(f"removed {path}: no result has this picture")
    write_text_atomic(document, text)
    write_text_atomic(tables, rendered.tables)
    print(f"wrote {len(results)} results into {document} and {tables}")
    return 0


if __name__ == "__main__":
    main()
