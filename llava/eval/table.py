"""The comparison table: rows of scores and costs as markdown, and its place in a document.

    python -m llava.eval.table results/demo/demo.json --insert README.md

Knows the row format that `demo` writes; computes ratios to the dense row, loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.arguments import Parser
from llava.eval.jsonio import read_json, read_text, write_text_atomic
from llava.utils import UserError, cli_main

BEGIN, END = "<!-- demo table: begin -->", "<!-- demo table: end -->"


def retained_percent(scores: Mapping[str, float], dense: Mapping[str, float]) -> float:
    """Mean over the benchmarks of score / dense score, in percent, as the paper's tables do; a benchmark where
    the dense score is 0 is left out.
    """
    ratios = [scores[name] / dense[name] for name in dense if dense[name]]
    return 100 * sum(ratios) / len(ratios) if ratios else 0.0


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


def insert(document: str, text: str, where: str) -> str:
    """`document` with what is between the two markers replaced; raises `UserError` if they are not there."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise UserError(f"{where}: needs the lines {BEGIN} and {END} once each, in this order")
    head, rest = document.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Print the table of a demo result, or put it into a document.")
    parser.add_argument("result", help="demo.json, written by llava.eval.demo")
    parser.add_argument("--insert", metavar="DOCUMENT", help="replace the text between the markers of this file")
    args = parser.parse_args(argv)
    result = read_json(args.result, "result file")
    if not isinstance(result, dict) or not {"benchmarks", "rows", "run"} <= set(result):
        raise UserError(f"{args.result}: not a result of llava.eval.demo")
    report = markdown_report(result)
    if args.insert:
        document = read_text(args.insert, "document")
        write_text_atomic(Path(args.insert), insert(document, report, args.insert))
    else:
        print(report)


if __name__ == "__main__":
    main()
