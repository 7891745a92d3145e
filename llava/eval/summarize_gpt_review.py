"""LLaVA-Bench: adds up reviews, in which GPT-4 gave two answers to a question a grade from 1 to 10 each.

    python -m llava.eval.summarize_gpt_review --dir reviews
    python -m llava.eval.summarize_gpt_review --files reviews/llava-v1.5-7b.jsonl --ignore 3

Knows the review files of LLaVA's evaluation (`tuple`: reference grade, model grade; `category`); asks no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import iter_jsonl, require_folder, write_json
from llava.eval.common.outputs import JsonObject
from llava.eval.tasks.scoring import shorten, warn
from llava.schema import NUMBER, ListOf
from llava.utils import UserError, cli_main, visible

_GRADES = ListOf(NUMBER, least=2, most=2)


def summarize(reviews: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Category (and `all`) -> (model / reference in percent, reference, model), the latter two on 0-100.

    reviews: `tuple` and perhaps `category`. Rounded as LLaVA prints them: means to three decimals, then everything to
    one.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for review in reviews:
        pair = tuple(review["tuple"])
        for name in ("all", *([str(review["category"])] if review.get("category") is not None else [])):
            groups.setdefault(name, []).append(pair)
    summary = {}
    for name, pairs in sorted(groups.items()):
        reference, model = (round(sum(values) / len(pairs), 3) for values in zip(*pairs, strict=True))
        ratio = round(model / reference * 100, 1) if reference else 0.0
        summary[name] = (ratio, round(reference * 10, 1), round(model * 10, 1))
    return summary


def load_reviews(path: str, ignore: Sequence[str] = ()) -> tuple[list[dict[str, Any]], int]:
    """Reviews of a file but for the questions `ignore` (ids), and how many carry no grades (-1: the reviewer's text
    could not be read). Reviews of the older kind have their grades under `score`.
    """
    reviews, failed = [], 0
    known: set[str] = set()
    for number, record in iter_jsonl(path, "review file"):
        known.add(str(record.get("question_id")))
        if str(record.get("question_id")) in ignore:
            continue
        pair = record.get("tuple", record.get("score"))
        if _GRADES.problem(pair) is not None:
            raise UserError(f"{path}:{number}: needs 'tuple', two grades")
        if min(pair) < 0:
            failed += 1
        else:
            reviews.append({**record, "tuple": pair})
    if not reviews:
        raise UserError(f"{path}: holds no review with grades" + (" besides those ignored" if ignore else ""))
    unknown = [name for name in ignore if name not in known]
    if unknown:
        warn(f"{path}: no review is about question {shorten(unknown)}, named with --ignore")
    return reviews, failed


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Add up the reviews of LLaVA-Bench.")
    parser.add_argument("-d", "--dir", help="summarize every .jsonl of this folder")
    parser.add_argument("-v", "--version", help="only reviews by this GPT-4: 0613 if the name says so, else 0314")
    parser.add_argument("-f", "--files", nargs="*", default=[], help="review files (.jsonl), below --dir if given")
    parser.add_argument("-s", "--select", nargs="*", default=[], help="only files whose name holds all of these")
    parser.add_argument(
        "-i", "--ignore", nargs="*", default=[], metavar="ID", help="question ids to leave out",
    )  # fmt: skip
    parser.add_argument(
        "--json",
        type=JsonObject("a summary of reviews", ("reviews", "failed")),
        metavar="PATH",
        help="write the summary of a single file as JSON (percent)",
    )
    args = parser.parse_args(argv)
    if args.dir and args.files:
        folder = require_folder(args.dir, "review folder")
        files = [folder / name if (folder / name).is_file() else Path(name) for name in args.files]
    elif args.dir:
        files = list(require_folder(args.dir, "review folder").glob("*.jsonl"))
    else:
        files = [Path(name) for name in args.files]
    chosen = [
        path
        for path in sorted(files)
        if all(part in path.name for part in args.select)
        and args.version in (None, "0613" if "0613" in path.name else "0314")
    ]
    if not chosen:
        raise UserError("no review file: give --dir or --files, and check --select and --version")
    if args.json and len(chosen) > 1:
        raise UserError("--json goes with one review file")
    for path in chosen:
        reviews, failed = load_reviews(str(path), args.ignore)
        summary = summarize(reviews)
        print(visible(path.stem.replace("gpt4_text_", "")))
        for name, (ratio, reference, model) in summary.items():
            print(visible(name), ratio, reference, model)
        print("=================================")
        if failed:
            warn(f"{failed} reviews of {path} have no grades and are left out")
        if args.json:
            flat = {name: ratio for name, (ratio, _, _) in summary.items()}
            write_json(args.json, {**flat, "reviews": len(reviews), "failed": failed})


if __name__ == "__main__":
    main()
