"""What of a benchmark's data is missing or misplaced."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava.eval.common.questions import Question
from llava.eval.tasks.join import shorten, warn
from llava.eval.tasks.task import Task
from llava.utils import USER_ERROR_STATUS, UserError, visible

SAMPLED_IMAGES = 200
_SEARCH_DEPTH = 3
_SEARCH_LIMIT = 200_000  # directory entries: a search for a lost file must not take longer than a look


@dataclass
class Report:
    """What was found, in the order of checking: problems, what a run can live with, and what is there."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)


def check_benchmark(task: Task, data_dir: str | Path, all_images: bool = False) -> Report:
    """Everything that is wrong with the data of one benchmark; never stops at the first problem where it can go on."""
    report = Report()
    folder = Path(data_dir) / task.folder
    if not folder.is_dir():
        report.problems.append(f"{folder} is missing; {task.source}")
        return report
    wanted = [task.question_file, *task.truth]
    if task.image_folder and task.image_folder not in wanted:
        wanted.append(task.image_folder)
    missing = [name for name in wanted if not (folder / name).exists()]
    for name in missing:
        report.problems.append(_missing(name, folder, Path(data_dir), task))
    questions: Sequence[Question] = []
    if task.question_file not in missing:
        try:
            questions = task.read_questions(folder / task.question_file)
            report.found.append(f"{task.question_file}: {len(questions)} questions")
        except UserError as error:
            report.problems.append(str(error))
    if questions and not set(task.truth) & set(missing):
        try:
            if (found := task.check_truth(folder, questions)) is not None:
                report.found.append(found)
        except UserError as error:
            report.problems.append(str(error))
    if questions and task.image_folder is not None and task.image_folder not in missing:
        _check_images(report, folder / task.image_folder, questions, all_images)
    return report


def _missing(name: str, folder: Path, data_dir: Path, task: Task) -> str:
    elsewhere = find_misplaced(Path(name).name, folder, data_dir)
    remedy = f"it is at {elsewhere}: move it" if elsewhere else task.source
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


def report_all(tasks: Sequence[Task], data_dir: str | Path, all_images: bool, quiet: bool) -> int:
    """Checks and prints one benchmark after the other; the exit status."""
    failed = False
    for task in tasks:
        report = check_benchmark(task, data_dir, all_images)
        failed = failed or bool(report.problems)
        for problem in report.problems:
            print(visible(f"error: {task.name}: {problem}"), file=sys.stderr)
        for text in report.warnings:
            warn(f"{task.name}: {text}")
        if not quiet:
            print(f"{task.name}: {'incomplete' if report.problems else 'complete'}")
            for line in report.found:
                print(f"  {visible(line)}")
            if task.server:
                print(f"  graded by: {task.server}")
    return USER_ERROR_STATUS if failed else 0
