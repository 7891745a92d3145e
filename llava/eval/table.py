"""Comparison tables: of finished benchmark runs, with the paper's rows beside them, and of the demo.

    python -m llava.eval.table --table 1
    python -m llava.eval.table --checkpoint llava-v1.5-7b --benchmarks gqa,pope --csv gqa_pope.csv
    python -m llava.eval.table results/demo/demo.json --insert README.md

Knows its command line and the demo's layout; runs are found by `runs`, the paper's tables made in `paper_tables`.
Loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.eval import paper_tables
from llava.eval.arguments import DEFAULT_METHOD, Parser
from llava.eval.catalog import ENTRIES, get_entry
from llava.eval.check_data import DEFAULT_DATA_DIR
from llava.eval.jsonio import read_json, read_text, write_json, write_text_atomic
from llava.eval.paper_tables import retained_percent as retained_percent
from llava.eval.runs import COMPLETE, discover
from llava.utils import UserError, cli_main

DEMO = "demo table"


def markdown_table(result: Mapping[str, Any]) -> str:
    """The table of a result: one row per setting, the first one dense."""
    benchmarks = result["benchmarks"]
    header = ["", *(f"{b['name']} ({b['metric']})" for b in benchmarks), "mean accuracy", "retained"]
    header += ["tokens, nominal", "tokens, processed", "FLOPs", "prefill time"]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in result["rows"]:
        cells = [row["label"]]
        cells += [f"{row['scores'][b['name']]['score']:.1f}" for b in benchmarks]
        cells += [f"{row['mean_accuracy']:.1f}%", f"{row['retained']:.1f}%"]
        cells += [f"{row['tokens_nominal']:.1f}", f"{row['tokens_processed']:.1f}"]
        cells += [f"{100 * row['flops_ratio']:.1f}%", f"{100 * row['prefill_ratio']:.1f}% ({row['prefill_ms']:.1f} ms)"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown_notes(result: Mapping[str, Any]) -> str:
    """What was measured, on what: the lines below the table."""
    run = result["run"]
    counts = ", ".join(f"{b['name']} {b['samples']} of {b['available']}" for b in result["benchmarks"])
    return (
        f"Model `{run['model']}`, questions answered: {counts}. Mean accuracy: share of right answers, averaged over "
        "the benchmarks (TextVQA: soft accuracy). Retained: mean of score / dense score. Tokens: visual tokens per "
        f"decoder layer, of {run['visual_tokens']:.0f}; FLOPs: decoder prefill from processed tokens, "
        "relative to dense. "
        f"Prefill time: decoder with selection, per sample, relative to dense; median over interleaved batches of "
        f"{run['batch_size']} on {run['device']} ({run['threads']} threads, {run['dtype']}, torch {run['torch']}, "
        f"transformers {run['transformers']})."
    )


def markdown_report(result: Mapping[str, Any]) -> str:
    """Table and notes."""
    return f"{markdown_table(result)}\n\n{markdown_notes(result)}"


def replace_between(document: str, name: str, text: str, where: str) -> str:
    """`document` with what is between the markers of `name` replaced; raises `UserError` if they are not there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise UserError(f"{where}: needs the lines {begin} and {end} once each, in this order")
    head, rest = document.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def insert(document: str, text: str, where: str) -> str:
    """`document` with the demo's table replaced."""
    return replace_between(document, DEMO, text, where)


def build_parser() -> Parser:
    """All flags of the tool."""
    parser = Parser(prog="python -m llava.eval.table", description="Tables of finished runs, or of a demo result.")
    parser.add_argument("result", nargs="?", help="demo.json of llava.eval.demo; without: finished runs")
    parser.add_argument("--insert", metavar="DOCUMENT", help="demo: replace the text between the markers of this file")
    runs = parser.add_argument_group("finished runs")
    runs.add_argument("--table", choices=tuple(paper_tables.TABLES), help="table of the paper: 7B, 13B, 1.6-7B")
    runs.add_argument("--checkpoint", help="name of the checkpoint; default: that of --table")
    runs.add_argument("--data-dir", default=str(DEFAULT_DATA_DIR), help="benchmark data, upstream's layout")
    runs.add_argument("--out-dir", help="where <benchmark>/answers/ lies; default: --data-dir")
    runs.add_argument("--benchmarks", help="names by commas; default: those of --table, else all with runs")
    runs.add_argument("--methods", help="names by commas; default: autoprune for --table, else all that have runs")
    runs.add_argument("--budgets", help="numbers by commas; default: those of --table, else all that have runs")
    runs.add_argument("--limit", type=int, help="runs were limited to that many questions and are whole with them")
    runs.add_argument("--csv", metavar="PATH", help="write the table as CSV")
    runs.add_argument("--json", metavar="PATH", help="write the table as JSON")
    runs.add_argument("--markdown", metavar="PATH", help="write the table as markdown")
    runs.add_argument("--missing", action="store_true", help="only list what has to run: script, budget, method")
    return parser


def demo_table(args: Any) -> None:
    """Prints the table of a demo result, or puts it into a document."""
    result = read_json(args.result, "result file")
    if not isinstance(result, dict) or not {"benchmarks", "rows", "run"} <= set(result):
        raise UserError(f"{args.result}: not a result of llava.eval.demo")
    report = markdown_report(result)
    if args.insert:
        document = read_text(args.insert, "document")
        write_text_atomic(Path(args.insert), insert(document, report, args.insert))
    else:
        print(report)


def describe_table(args: Any) -> tuple[paper_tables.Table, list[tuple[str, int | None]]]:
    """The table that the flags ask for, and its rows as (method, tokens), dense first."""
    given = paper_tables.TABLES.get(args.table)
    checkpoint = args.checkpoint or (given.checkpoint if given else None)
    if checkpoint is None:
        raise UserError("give --table, or --checkpoint, or a demo result")
    found: set[tuple[str, int | None]] = set()
    names = split_names(args.benchmarks)
    if given is None:
        present = {entry.name: set(discover(entry, args.out_dir, checkpoint)) for entry in ENTRIES}
        names = [get_entry(name).name for name in names or [name for name, runs in present.items() if runs]]
        found = set().union(*(present[name] for name in names)) if names else set()
        if not found:
            raise UserError(f"{args.out_dir}: no run of {checkpoint!r} among the answers of any benchmark asked for")
        columns = tuple(key for key, column in paper_tables.COLUMNS.items() if column.benchmark in names)
        # One figure of MME takes part in the mean: the sum, as most pruning papers have it.
        given = paper_tables.Table(checkpoint, (), tuple(k for k in columns if k != "mme_perception"))
        given = replace(given, extra=tuple(key for key in columns if key == "mme_perception"))
    elif names:
        wanted = {get_entry(name).name for name in names}
        columns = tuple(key for key in given.columns if paper_tables.COLUMNS[key].benchmark in wanted)
        extra = tuple(key for key in given.extra if paper_tables.COLUMNS[key].benchmark in wanted)
        given = replace(given, columns=columns, extra=extra)
        if not (columns or extra):
            raise UserError(f"--benchmarks: none of {args.benchmarks} is part of table {args.table}")
    methods = split_names(args.methods) or (
        [DEFAULT_METHOD] if args.table else sorted({method for method, _ in found} - {"dense"})
    )
    budgets = [parse_budget(text) for text in split_names(args.budgets)] or list(given.budgets)
    settings: list[tuple[str, int | None]] = [("dense", None)]
    for method in methods:
        own = budgets or sorted((tokens for name, tokens in found if name == method), reverse=True)
        settings += [(method, tokens) for tokens in own if method != "dense"]
    return replace(given, checkpoint=checkpoint), settings


def split_names(text: str | None) -> list[str]:
    """`a,b` as a list; blanks around names are ignored."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def parse_budget(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--budgets: {text!r} is not a number of at least 1")
    return int(text)


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.result:
        return demo_table(args)
    if args.insert:
        raise UserError("--insert goes with a demo result; use --markdown")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    args.out_dir = args.out_dir or args.data_dir
    table, settings = describe_table(args)
    collected = paper_tables.collect(table, args.out_dir, args.data_dir, table.checkpoint, settings, args.limit)
    if args.missing:
        from llava.pruning import get_method

        for method in {method for method, _ in settings}:
            get_method(method)  # an unknown name is told now, not after the dense runs
        for (method, tokens), runs in collected.items():
            for name, run in runs.items():
                if run.status != COMPLETE:
                    print(name, "dense" if tokens is None else tokens, method)
        return
    data = paper_tables.build(table, table.checkpoint, collected, args.limit)
    text = paper_tables.markdown(data)
    print(text)
    if args.csv:
        write_text_atomic(args.csv, paper_tables.csv_text(data))
    if args.json:
        write_json(args.json, {**data, "table": args.table})
    if args.markdown:
        write_text_atomic(args.markdown, text + "\n")


if __name__ == "__main__":
    main()
