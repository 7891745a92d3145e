"""docs/performance.md from the CSVs below benchmarks/results: targets, tables, plots; the text around them stays.

    python -m benchmarks.report
    python -m benchmarks.report --check

Measures nothing. What stands in the document depends on the CSVs alone; `--check` says whether it is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import targets
from benchmarks.environment import RESULTS
from benchmarks.report_plots import SOURCE, draw, drawn_from, leftovers, picture_name
from benchmarks.report_tables import order, section, titles
from benchmarks.saved import Result, read_results
from llava.eval.common import outputs
from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_text, write_text_atomic
from llava.eval.common.tables import replace_between
from llava.utils import UserError, cli_main

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
PLOTS = outputs.OutputFolder({"*--*.png": outputs.Picture("a plot of a saved result", SOURCE.encode())})
_TARGETS = (
    "Figures of AutoPrune by budget (target tokens), computed from the results below, on every hardware that they were "
    "measured on. CPU targets: geometry cpu-1024x24, float32, sdpa, fixed allocator unless said otherwise; GPU: "
    "bfloat16, sdpa."
)


def paired(results: Iterable[Result]) -> list[tuple[Result, Result | None]]:
    """Results in the document's order; the default allocator's goes with the fixed one's of the same thing."""
    groups: dict[tuple[str, ...], dict[bool, Result]] = {}
    for result in sorted(results, key=order):
        env = result.env
        key = (result.tool, result.label, env["hardware"], env["threads"], env["torch"], env["transformers"])
        key += tuple(result.stem.split("--")[4:])
        group = groups.setdefault(key, {})
        if result.fixed in group:
            raise UserError(
                f"{result.stem}.csv: says the same tool, hardware, versions and allocator as "
                f"{group[result.fixed].stem}.csv; remove one of them"
            )
        group[result.fixed] = result
    return [(g[True], g.get(False)) if True in g else (g[False], None) for g in groups.values()]


def render(results: Sequence[Result], folder: str) -> tuple[str, list[Result]]:
    """The generated part, and the results that have a picture in it. folder: of the pictures, from the document."""
    pairs = paired(results)
    headings = titles([result for result, _ in pairs])
    parts = [f"### Targets\n\n{_TARGETS}", targets.table(targets.outcomes(results))]
    drawn = []
    for (result, other), heading in zip(pairs, headings, strict=True):
        name = picture_name(result)
        drawn += [result] if name else []
        parts.append(section(result, heading, [f"{folder}/{name}"] if name else [], other))
    return "\n\n".join(parts), drawn


def outdated(document: Path, text: str, pictures: Path, drawn: Sequence[Result]) -> list[str]:
    """What `--check` complains about."""
    found = []
    if read_text(document, "document") != text:
        found.append(f"{document}: its tables are not those of the CSVs")
    for result in drawn:
        source = drawn_from(pictures / f"{result.stem}.png")
        if source != result.digest:
            state = "missing" if not (pictures / f"{result.stem}.png").is_file() else "drawn from other figures"
            found.append(f"{pictures / result.stem}.png: {state}")
    old = leftovers(pictures, {f"{result.stem}.png" for result in drawn})
    return found + [f"{path}: no CSV has this picture" for path in old]


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Render the tables and plots of docs/performance.md from the saved results.")
    parser.add_argument("--results-dir", default=str(RESULTS), help="folder with the CSVs")
    parser.add_argument(
        "--document", type=outputs.DOCUMENT, default=str(DOCUMENT), help="markdown file with the markers"
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
        raise UserError(f"--results-dir: holds no CSV: {args.results_dir}; run a benchmark with --save first")
    document = Path(args.document)
    pictures = Path(args.plots) if args.plots else document.parent / "images"
    generated, drawn = render(results, pictures.name)
    text = replace_between(read_text(document, "document"), "results", generated, str(document))
    if args.check:
        complaints = outdated(document, text, pictures, drawn)
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        print("up to date" if not complaints else "not up to date: run python -m benchmarks.report")
        return 1 if complaints else 0
    for result in drawn:
        draw(result, pictures)
    for path in leftovers(pictures, {f"{result.stem}.png" for result in drawn}):
        path.unlink()
        print(f"removed {path}: no CSV has this picture")
    write_text_atomic(document, text)
    print(f"wrote {len(results)} results into {document}")
    return 0


if __name__ == "__main__":
    main()
