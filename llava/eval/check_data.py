"""Says what of a benchmark's data is missing or misplaced, before a run of hours starts.

    python -m llava.eval.check_data textvqa --data-dir playground/data/eval
    python -m llava.eval.check_data all

Checks that the files are where the scripts look for them, that questions and truth can be read and belong together, and
that images exist (a sample of them; with --all-images every one). Loads no model. Exit status: 0 everything is there,
2 something is not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.common.arguments import Parser
from llava.eval.common.questions import Question, read_questions
from llava.eval.tasks.catalog import ENTRIES, Entry, get_entry
from llava.eval.tasks.scoring import shorten, warn
from llava.utils import USER_ERROR_STATUS, UserError, cli_main, visible

DEFAULT_DATA_DIR = Path(__file__).resolve().parents[2] / "playground" / "data" / "eval"
SAMPLED_IMAGES = 200
_SEARCH_DEPTH = 3
_SEARCH_LIMIT = 200_000  # directory entries: a search for a lost file must not take longer than a look


@dataclass
class Report:
    """What was found, in the order of checking: problems, what a run can live with, and what is there."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)


def check_benchmark(entry: Entry, data_dir: str | Path, all_images: bool = False) -> Report:
    """Everything that is wrong with the data of one benchmark; never stops at the first problem where it can go on."""
    report = Report()
    folder = Path(data_dir) / entry.folder
    if not folder.is_dir():
        report.problems.append(f"{folder} is missing; {entry.source}")
        return report
    wanted = [entry.question_file, *entry.truth]
    if entry.image_folder and entry.image_folder not in wanted:
        wanted.append(entry.image_folder)
    missing = [name for name in wanted if not (folder / name).exists()]
    for name in missing:
        report.problems.append(_missing(name, folder, Path(data_dir), entry))
    questions: list[Question] = []
    if entry.question_file not in missing:
        try:
            questions = load_questions(entry, folder / entry.question_file)
            report.found.append(f"{entry.question_file}: {len(questions)} questions")
        except UserError as error:
            report.problems.append(str(error))
    check = _TRUTH_CHECKS.get(entry.name)
    if questions and check and not set(entry.truth) & set(missing):
        try:
            report.found.append(check(folder, entry, questions))
        except UserError as error:
            report.problems.append(str(error))
    if questions and entry.image_folder is not None and entry.image_folder not in missing:
        _check_images(report, folder / entry.image_folder, questions, all_images)
    return report


def _missing(name: str, folder: Path, data_dir: Path, entry: Entry) -> str:
    elsewhere = find_misplaced(Path(name).name, folder, data_dir)
    remedy = f"it is at {elsewhere}: move it" if elsewhere else entry.source
    return f"{folder / name} is missing; {remedy}"


def find_misplaced(name: str, folder: Path, data_dir: Path) -> Path | None:
    """A file or folder called `name` elsewhere: within the benchmark's folder first, then below the data folder."""
    for root in (folder, data_dir):
        for path in _walk(root):
            # Folders called "images" or "test" belong to many benchmarks: they only count inside the own one.
            if path.name == name and (root is folder or path.is_file()):
                return path
    return None


def _walk(root: Path) -> Iterator[Path]:
    """Files and folders below `root`, breadth first, to a limited depth and number."""
    level, seen = [root], 0
    for _ in range(_SEARCH_DEPTH):
        below: list[Path] = []
        for place in level:
            try:
                with os.scandir(place) as entries:
                    for item in entries:
                        seen += 1
                        if seen > _SEARCH_LIMIT:
                            return
                        yield Path(item.path)
                        if item.is_dir(follow_symlinks=False):
                            below.append(Path(item.path))
            except OSError:
                continue
        level = below


def load_questions(entry: Entry, path: Path) -> list[Question]:
    """The questions as the benchmark's answering tool reads them."""
    if entry.tool == "model_vqa_science":
        from llava.eval.model_vqa_science import read_conversations

        return read_conversations(str(path))
    if entry.tool == "model_vqa_mmbench":
        from llava.eval.model_vqa_mmbench import read_rows

        rows, images = read_rows(str(path))
        blind = [name for name, cell in images.items() if not cell]
        if blind:
            raise UserError(f"{path}: {len(blind)} rows have no image ({shorten(blind)})")
        return [question for row in rows for question in row]
    return read_questions(path)


def _check_images(report: Report, folder: Path, questions: Sequence[Question], all_images: bool) -> None:
    names = list(dict.fromkeys(name for question in questions for name in question.images))
    step = 1 if all_images else max(len(names) // SAMPLED_IMAGES, 1)
    sample = names[::step]
    absent = [name for name in sample if not (folder / name).is_file()]
    if absent:
        looked = "" if step == 1 else " looked for"
        text = f"{folder}: {len(absent)} of {len(sample)} images{looked} are missing: {shorten(absent)}"
        # A run skips single missing images and says so; without any image it is pointless.
        (report.problems if len(absent) == len(sample) else report.warnings).append(text)
    else:
        report.found.append(f"{len(sample)} of {len(names)} images looked for, all there")


def _covered(known: Any, questions: Sequence[Question], key: Callable[[Question], Any], what: str) -> str:
    unknown = [str(question.id) for question in questions if key(question) not in known]
    if unknown:
        raise UserError(f"{what} does not cover {len(unknown)} of {len(questions)} questions: {shorten(unknown)}")
    return f"{what}: covers all questions"


def _vqav2(folder: Path, entry: Entry, questions: Sequence[Question]) -> str:
    whole = {str(question.id) for question in read_questions(folder / entry.truth[0])}
    return _covered(whole, questions, lambda q: str(q.id), entry.truth[0])


def _gqa(folder: Path, entry: Entry, questions: Sequence[Question]) -> str:
    from llava.eval.eval_gqa import load_questions

    return _covered(load_questions(str(folder / entry.truth[0])), questions, lambda q: str(q.id), entry.truth[0])


def _sqa(folder: Path, entry: Entry, questions: Sequence[Question]) -> str:
    from llava.eval.eval_science_qa import load_problems

    problems, _ = load_problems(str(folder))
    return _covered(problems, questions, lambda q: str(q.id), "problems.json, split test")


def _textvqa(folder: Path, entry: Entry, questions: Sequence[Question]) -> str:
    from llava.eval.eval_textvqa import find_key, load_annotations
    from llava.eval.tasks.scoring import QuestionIndex

    annotations = load_annotations(str(folder / entry.truth[0]))
    known = {(str(item["image_id"]), item["question"].lower()) for item in annotations}
    index = QuestionIndex(known)
    return _covered(known, questions, lambda q: find_key(index, str(q.id), q.text), entry.truth[0])


def _pope(folder: Path, entry: Entry, questions: Sequence[Question]) -> str:
    from llava.eval.eval_pope import evaluate_pope, load_labels, load_questions

    labels = load_labels(str(folder / entry.truth[0]))
    evaluate_pope(labels, load_questions(str(folder / entry.question_file)), [])  # raises where they do not line up
    return f"{entry.truth[0]}: {', '.join(labels)} line up with the questions"


def _mme(folder: Path, entry: Entry, questions: Sequence[Question]) -> str:
    from llava.eval.eval_mme import Lookup, load_truth

    truth = load_truth(str(folder / entry.truth[0]))
    lookup = Lookup(truth)
    return _covered(truth, questions, lambda q: lookup.find(str(q.id), q.text), entry.truth[0])


def _seed(folder: Path, entry: Entry, questions: Sequence[Question]) -> str:
    from llava.eval.convert import load_seed

    known = {str(question["question_id"]) for question in load_seed(str(folder / entry.truth[0]))[0]}
    return _covered(known, questions, lambda q: str(q.id), entry.truth[0])


_TRUTH_CHECKS: dict[str, Callable[[Path, Entry, Sequence[Question]], str]] = {
    "vqav2": _vqav2, "gqa": _gqa, "sqa": _sqa, "textvqa": _textvqa, "pope": _pope, "mme": _mme, "seed": _seed,
}  # fmt: skip


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    names = ", ".join(entry.name for entry in ENTRIES)
    parser = Parser(description="Say what of a benchmark's data is missing or misplaced.")
    parser.add_argument("benchmarks", nargs="+", metavar="BENCHMARK", help=f"all, or some of: {names}")
    parser.add_argument("--data-dir", default=str(DEFAULT_DATA_DIR), help="benchmark data, upstream's layout")
    parser.add_argument("--all-images", action="store_true", help="look for every image, not for a sample")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    args = parser.parse_args(argv)
    entries = ENTRIES if "all" in args.benchmarks else [get_entry(name) for name in args.benchmarks]
    failed = False
    for entry in entries:
        report = check_benchmark(entry, args.data_dir, args.all_images)
        failed = failed or bool(report.problems)
        for problem in report.problems:
            print(visible(f"error: {entry.name}: {problem}"), file=sys.stderr)
        for text in report.warnings:
            warn(f"{entry.name}: {text}")
        if not args.quiet:
            print(f"{entry.name}: {'incomplete' if report.problems else 'complete'}")
            for line in report.found:
                print(f"  {visible(line)}")
            if entry.server:
                print(f"  graded by: {entry.server}")
    return USER_ERROR_STATUS if failed else 0


if __name__ == "__main__":
    main()
