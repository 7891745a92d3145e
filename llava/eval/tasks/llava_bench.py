"""LLaVA-Bench: reviews, in which GPT-4 gave two answers to a question a grade from 1 to 10 each, added up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import iter_jsonl, require_folder, write_json
from llava.eval.common.outputs import JsonObject
from llava.eval.tasks.join import shorten, warn
from llava.eval.tasks.task import Column, Task, figure
from llava.schema import NUMBER, ListOf
from llava.utils import UserError, visible

SUMMARY = JsonObject("a summary of reviews", ("reviews", "failed"))
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
        pair: Any = record.get("tuple", record.get("score"))
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


def review_files(folder: str | None, names: Sequence[str], select: Sequence[str], version: str | None) -> list[Path]:
    """The review files that the flags name, sorted; `UserError` if none is left."""
    files = [Path(name) for name in names]
    if folder:
        root = require_folder(folder, "review folder")
        inside = [root / name if (root / name).is_file() else Path(name) for name in names]
        files = inside or list(root.glob("*.jsonl"))
    chosen = [
        path
        for path in sorted(files)
        if all(part in path.name for part in select) and version in (None, "0613" if "0613" in path.name else "0314")
    ]
    if not chosen:
        raise UserError("no review file: give --dir or --files, and check --select and --version")
    return chosen


def print_summary(path: Path, ignore: Sequence[str], json_path: str | None) -> None:
    """Adds up one file and prints it as LLaVA does; the ratios also go into a JSON file if asked for."""
    reviews, failed = load_reviews(str(path), ignore)
    summary = summarize(reviews)
    print(visible(path.stem.replace("gpt4_text_", "")))
    for name, (ratio, reference, model) in summary.items():
        print(visible(name), ratio, reference, model)
    print("=================================")
    if failed:
        warn(f"{failed} reviews of {path} have no grades and are left out")
    if json_path:
        flat = {name: ratio for name, (ratio, _, _) in summary.items()}
        write_json(json_path, {**flat, "reviews": len(reviews), "failed": failed})


TASK = Task(
    name="llavabench",
    title="LLaVA-Bench",
    folder="llava-bench-in-the-wild",
    question_file="questions.jsonl",
    image_folder="images",
    tool="model_vqa",
    source="the data set liuhaotian/llava-bench-in-the-wild",
    server="a review by GPT-4",
    local=False,
    columns=(Column("llavabench", "LLaVA-Bench", figure("all")),),
)
