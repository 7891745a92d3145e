"""Which answers differ between two runs, and since which layer other patches survived."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava.eval.common.arguments import Parser, check_range
from llava.eval.common.jsonio import write_json
from llava.eval.common.outputs import JsonObject
from llava.eval.common.tables import markdown_table
from llava.eval.reports.look.html import REPORT, write_report
from llava.eval.reports.look.joined import Entry, join
from llava.eval.reports.look.sources import AnswerSet, add_source_arguments, read_sets
from llava.eval.reports.look.traces import Looked, first_difference
from llava.utils import UserError, visible

DIFFERENT_STATUS = 1
DIFFERENCES = JsonObject("differences of two runs", ("runs", "compared", "differences"))
_WIDTH = 32  # characters of a question or an answer in the table


@dataclass(frozen=True)
class Difference:
    """One question with two different answers.

    change: `became wrong` or `became right` where the credit fell or rose, `changed` otherwise; credits: 0 to 1, None
    without truth; mutual_information: bits of layer 1, and slope, of the run that has them, the second one's if both;
    layer: the first one after which other tokens are left, None if there is none or the traces do not say it.
    """

    benchmark: str
    question_id: str | int
    question: str
    answers: tuple[str, str]
    change: str
    credits: tuple[float | None, float | None]
    mutual_information: float | None
    slope: float | None
    layer: int | None


def compare(entry: Entry) -> Difference | None:
    """What differs in a question that both runs have answered; None if nothing does."""
    one, other = entry.sets
    if one is None or other is None:
        return None
    first, second = one.answers[entry.key], other.answers[entry.key]
    if first["text"] == second["text"]:
        return None
    credits = one.truth.credit(first), other.truth.credit(second)
    traces = [_trace(own, entry.key) for own in (one, other)]
    told = [trace for trace in reversed(traces) if trace is not None]
    return Difference(
        entry.benchmark,
        first["question_id"],
        str(first.get("prompt") or ""),
        (first["text"], second["text"]),
        _change(*credits),
        credits,
        next((trace.information[1] for trace in told if trace.information[1] is not None), None),
        next((trace.slope for trace in told if trace.slope is not None), None),
        first_difference(*traces),
    )


def _trace(own: AnswerSet, key: int) -> Looked | None:
    return own.traces.get(key)


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or before == after:
        return "changed"
    return "became wrong" if after < before else "became right"


def table(differences: Sequence[Difference], names: Sequence[str]) -> str:
    """One line for each difference."""
    header = ["question", "id", *names, "", "MI", "slope", "first layer"]
    rows = [
        [
            _short(difference.question.split("\n")[0]),
            _short(str(difference.question_id)),
            *map(_short, difference.answers),
            difference.change,
            _number(difference.mutual_information),
            _number(difference.slope),
            "" if difference.layer is None else str(difference.layer),
        ]
        for difference in differences
    ]
    return markdown_table(header, rows, labels=5)


def _short(text: str) -> str:
    line = " ".join(visible(text).split()).replace("|", "\\|")
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def build_parser() -> Parser:
    """All flags of the tool."""
    parser = Parser(
        prog="python -m llava.eval.diff_answers",
        description="Which answers differ between two runs. Exit status 1 if any does, 0 if none, 2 for a mistake.",
    )
    parser.add_argument("files", nargs=2, metavar="[NAME=]ANSWERS", help="two answer files, or folders of them")
    parser.add_argument("--json", type=DIFFERENCES, default=None, help="also write the differences here")
    parser.add_argument("--html", type=REPORT, default=None, help="also write a report of the questions that differ")
    parser.add_argument("--most", type=int, default=50, help="lines of the table at most; 0: all")
    add_source_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints and writes the differences; returns the exit status."""
    check_range("--most", args.most, 0)
    sides = [read_sets(args, [argument]) for argument in args.files]
    names = _names(args.files, sides)
    sets = []
    for name, side in zip(names, sides, strict=True):
        for own in side:
            own.run = name
        sets += side
    joined = join(sets)
    # A dense run comes first in a report; here the first one does.
    joined.entries = [_in_order(entry, joined.runs, names) for entry in joined.entries]
    joined.runs = names
    both = [entry for entry in joined.entries if None not in entry.sets]
    if not both:
        raise UserError(f"{args.files[0]} and {args.files[1]}: have no question in common")
    alone = [sum(entry.sets[1 - side] is None for entry in joined.entries) for side in (0, 1)]
    compared = [(entry, compare(entry)) for entry in both]
    differences = [difference for _, difference in compared if difference is not None]
    result = _result(names, len(both), alone, differences)
    if differences:
        shown = differences[: args.most or None]
        print(table(shown, names) + "\n")
        if len(shown) < len(differences):
            print(f"{len(differences) - len(shown)} more: --most 0 shows all\n")
    print(_sentence(result))
    if args.json is not None:
        write_json(args.json, result)
    if args.html is not None:
        entries = [entry for entry, difference in compared if difference is not None]
        write_report(args.html, joined, entries or both, f"{names[0]} and {names[1]}: what differs")
    return DIFFERENT_STATUS if differences or any(alone) else 0


def _names(arguments: Sequence[str], sides: Sequence[Sequence[AnswerSet]]) -> list[str]:
    """Names of the two runs: those that were given, else method and budget; numbered where those are alike."""
    names = [side[0].run if len({own.run for own in side}) == 1 else "" for side in sides]
    for argument, name in zip(arguments, names, strict=True):
        if not name:
            raise UserError(f"{argument}: holds several runs; give one of them, or NAME={argument} if it is one")
    return names if names[0] != names[1] else [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _in_order(entry: Entry, runs: Sequence[str], names: Sequence[str]) -> Entry:
    return Entry(entry.benchmark, entry.key, [entry.sets[runs.index(name)] for name in names])


def _result(
    names: Sequence[str], compared: int, alone: Sequence[int], differences: Sequence[Difference]
) -> dict[str, Any]:
    changes = [difference.change for difference in differences]
    return {
        "runs": list(names),
        "compared": compared,
        "only_in": dict(zip(names, alone, strict=True)),
        "differ": len(differences),
        "became_wrong": changes.count("became wrong"),
        "became_right": changes.count("became right"),
        "differences": [asdict(difference) for difference in differences],
    }


def _sentence(result: Mapping[str, Any]) -> str:
    parts = [
        f"{result['differ']} of {result['compared']} answers differ: {result['became_wrong']} became wrong, "
        f"{result['became_right']} became right"
    ]
    for name, count in result["only_in"].items():
        if count:
            parts.append(f"{count} {'question is' if count == 1 else 'questions are'} only in {visible(name)}")
    return "; ".join(parts)
