"""The tool for tables: of finished benchmark runs, with the paper's rows beside them, and of the demo."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llava.eval.common.arguments import DEFAULT_METHOD, Parser, split_names
from llava.eval.common.budgets import BUDGETS_HELP, Budget, falling, parse_budgets
from llava.eval.common.jsonio import write_json, write_text_atomic
from llava.eval.common.outputs import DOCUMENT, TABLE_MARKDOWN, JsonObject, Text
from llava.eval.common.tables import print_or_insert
from llava.eval.reports import paper_tables
from llava.eval.reports.runs import COMPLETE, discover
from llava.eval.tasks.registry import COLUMNS, TASK_OF, TASKS, get_task
from llava.places import DATA
from llava.utils import UserError


def build_parser() -> Parser:
    """All flags of the tool."""
    parser = Parser(prog="python -m llava.eval.table", description="Tables of finished runs, or of a demo result.")
    parser.add_argument("result", nargs="?", help="demo.json of llava.eval.demo; without: finished runs")
    parser.add_argument(
        "--insert", type=DOCUMENT, metavar="DOCUMENT", help="demo: replace the text between the markers of this file"
    )
    runs = parser.add_argument_group("finished runs")
    runs.add_argument("--table", choices=tuple(paper_tables.TABLES), help="table of the paper: 7B, 13B, 1.6-7B")
    runs.add_argument("--checkpoint", help="name of the checkpoint; default: that of --table")
    runs.add_argument("--data-dir", default=str(DATA), help="benchmark data, upstream's layout")
    runs.add_argument("--out-dir", help="where <benchmark>/answers/ lies; default: --data-dir")
    runs.add_argument("--benchmarks", help="names by commas; default: those of --table, else all with runs")
    runs.add_argument("--methods", help="names by commas; default: autoprune for --table, else all that have runs")
    runs.add_argument("--budgets", help=f"{BUDGETS_HELP}; default: those of --table, else all that have runs")
    runs.add_argument("--limit", type=int, help="runs were limited to that many questions and are whole with them")
    runs.add_argument(
        "--csv",
        type=Text("a table of runs as CSV", "checkpoint,method,tokens,source,"),
        metavar="PATH",
        help="write the table as CSV",
    )
    runs.add_argument(
        "--json",
        type=JsonObject("a table of runs", ("table", "columns", "rows")),
        metavar="PATH",
        help="write the table as JSON",
    )
    runs.add_argument("--markdown", type=TABLE_MARKDOWN, metavar="PATH", help="write the table as markdown")
    runs.add_argument("--missing", action="store_true", help="only list what has to run: script, budget, method")
    return parser


def describe_table(args: Any) -> tuple[paper_tables.Table, list[tuple[str, Budget | None]]]:
    """The table that the flags ask for, and its rows as (method, budget), dense first."""
    given = paper_tables.TABLES.get(args.table)
    checkpoint = args.checkpoint or (given.checkpoint if given else None)
    if checkpoint is None:
        raise UserError("give --table, or --checkpoint, or a demo result")
    found: set[tuple[str, Budget | None]] = set()
    names = split_names(args.benchmarks)
    if given is None:
        present = {task.name: set(discover(task, args.out_dir, checkpoint)) for task in TASKS}
        names = [get_task(name).name for name in names or [name for name, runs in present.items() if runs]]
        found = set().union(*(present[name] for name in names)) if names else set()
        if not found:
            raise UserError(f"{args.out_dir}: no run of {checkpoint!r} among the answers of any benchmark asked for")
        columns = tuple(key for key in COLUMNS if TASK_OF[key].name in names)
        # One figure of MME takes part in the mean: the sum, as most pruning papers have it.
        given = paper_tables.Table(checkpoint, (), tuple(k for k in columns if k != "mme_perception"))
        given = replace(given, extra=tuple(key for key in columns if key == "mme_perception"))
    elif names:
        wanted = {get_task(name).name for name in names}
        columns = tuple(key for key in given.columns if TASK_OF[key].name in wanted)
        extra = tuple(key for key in given.extra if TASK_OF[key].name in wanted)
        given = replace(given, columns=columns, extra=extra)
        if not (columns or extra):
            raise UserError(f"--benchmarks: none of {args.benchmarks} is part of table {args.table}")
    methods = split_names(args.methods) or (
        [DEFAULT_METHOD] if args.table else sorted({method for method, _ in found} - {"dense"})
    )
    budgets = parse_budgets(args.budgets) if args.budgets is not None else list(given.budgets)
    settings: list[tuple[str, Budget | None]] = [("dense", None)]
    for method in methods:
        own_budgets = [budget for name, budget in found if name == method and budget is not None]
        own = budgets or sorted(own_budgets, key=falling)
        settings += [(method, budget) for budget in own if method != "dense"]
    return replace(given, checkpoint=checkpoint), settings


def run(args: argparse.Namespace) -> None:
    """Prints the table that the flags ask for, and writes it where they say."""
    if args.result:
        from llava.eval.reports import demo

        return print_or_insert(demo.markdown_report(demo.read_result(args.result)), args.insert, demo.MARKER)
    if args.insert:
        raise UserError("--insert goes with a demo result; use --markdown")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    args.out_dir = args.out_dir or args.data_dir
    table, settings = describe_table(args)
    collected = paper_tables.collect(table, args.out_dir, args.data_dir, table.checkpoint, settings, args.limit)
    if args.missing:
        return print_missing(settings, collected)
    data = paper_tables.build(table, table.checkpoint, collected, args.limit)
    text = paper_tables.markdown(data)
    print(text)
    if args.csv:
        write_text_atomic(args.csv, paper_tables.csv_text(data))
    if args.json:
        write_json(args.json, {**data, "table": args.table})
    if args.markdown:
        write_text_atomic(args.markdown, text + "\n")


def print_missing(settings: Sequence[tuple[str, Budget | None]], collected: Mapping[Any, Mapping[str, Any]]) -> None:
    """One line for each run that is not complete: script, budget, method."""
    from llava.pruning import get_method

    for method in {method for method, _ in settings}:
        get_method(method)  # an unknown name is told now, not after the dense runs
    for (method, budget), runs in collected.items():
        for name, found in runs.items():
            if found.status != COMPLETE:
                print(name, "dense" if budget is None else budget, method)
