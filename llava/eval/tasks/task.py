"""What a benchmark is to the tools of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.common.budgets import Budget, budget_name
from llava.eval.common.questions import Question, read_questions
from llava.eval.tasks.join import shorten
from llava.utils import UserError

EVAL_ZIP = "LLaVA's eval.zip"  # where upstream's question files come from

Answers = Sequence[Any]  # answers as dictionaries
Grader = Callable[[Mapping[str, Any]], float | None]
"""An answer (``question_id``, ``prompt``, ``text``) to its credit from 0 to 1, None if there is no truth for it."""
Truths = Callable[[Mapping[str, Any]], str | None]
"""An answer (``question_id``, ``prompt``) to what would be right, in words, None if there is no truth for it."""


@dataclass(frozen=True)
class Score:
    """The published figure of a benchmark, and the share of right answers in percent.

    The two differ for POPE (F1) and MME (a sum of accuracies); TextVQA's accuracy is the soft one.
    """

    score: float
    accuracy: float
    samples: int


@dataclass(frozen=True)
class Asked:
    """The questions of a benchmark, and what an answerer needs beside them.

    answerer: keyword arguments of `Answerer`: `prompt_text` where the prompt is not the question's text,
    `images` where they are not files.
    """

    questions: Sequence[Question]
    answerer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of the paper's tables: how it is read from the scorer's JSON; digits: as the papers print it."""

    key: str
    title: str
    read: Callable[[Mapping[str, Any]], float]
    digits: int = 1


def figure(name: str, factor: float = 1.0) -> Callable[[Mapping[str, Any]], float]:
    """Reads one key of a scorer's JSON."""
    return lambda result: factor * result[name]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark in upstream's layout. A benchmark whose questions or truth differ overrides the methods.

    Paths are relative to `folder`, which is relative to the data folder.

    Attributes:
        name: of the script in `scripts/v1_5/eval`.
        tool: the `llava.eval` module that answers.
        image_folder: None where the images are in the question file.
        truth: files and folders that scoring needs.
        split, merged: where answers go, see `answers_file`.
        source: where the data come from, for messages.
        server: who grades, for messages.
        local: scored here, from the public files.
        metric: name of the published figure, for benchmarks that `demo` and `compare` can score; None for others.
        columns: its columns in the paper's tables.
    """

    name: str
    title: str
    folder: str
    question_file: str
    image_folder: str | None
    tool: str = "model_vqa_loader"
    truth: tuple[str, ...] = ()
    split: str = ""
    merged: bool = False
    source: str
    server: str = ""
    local: bool = True
    metric: str | None = None
    columns: tuple[Column, ...] = ()

    @property
    def key(self) -> str:
        """The name in `compare`'s options and file names."""
        return self.title.lower().replace("-", "_")

    def questions_path(self, data_dir: Path) -> Path:
        """The question file."""
        return data_dir / self.folder / self.question_file

    def images_path(self, data_dir: Path) -> Path:
        """The folder that the images' names are relative to."""
        return data_dir / self.folder / (self.image_folder or "")

    def truth_path(self, data_dir: Path, number: int = 0) -> Path:
        """One of the `truth`."""
        return data_dir / self.folder / self.truth[number]

    def answers_file(self, out_dir: str | Path, run: str) -> Path:
        """Answers of a run, `CHECKPOINT/METHOD/n_TOKENS` or `CHECKPOINT/dense`."""
        folder = Path(out_dir) / self.folder / "answers" / self.split
        return folder / run / "merge.jsonl" if self.merged else folder / f"{run}.jsonl"

    def read_questions(self, path: str | Path) -> Sequence[Question]:
        """The questions as the answering tool reads them; `UserError` if the file is missing or wrong."""
        return read_questions(path)

    def ask(self, data_dir: Path) -> Asked:
        """The questions as `compare` asks them: with the instruction to answer briefly, where a flag adds it."""
        return Asked(self.read_questions(self.questions_path(data_dir)))

    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str | None:
        """Reads the truth and compares it with the questions; what to say if all is well, None if there is none.

        Raises:
            UserError: the truth cannot be read, or does not belong to the questions.
        """
        return None

    def grader(self, data_dir: Path) -> Grader | None:
        """Gives the credit of single answers, as the scorer does, so that their mean is its accuracy.

        None where the truth is not public and not there.
        """
        return None

    def truths(self, data_dir: Path) -> Truths | None:
        """Says what would be right, for people; None where the truth is not public and not there, or no text."""
        return None

    def score(self, data_dir: Path, answers: Answers) -> Score:
        """Scores whatever was answered, with the published metric; only for tasks with a `metric`."""
        raise NotImplementedError(f"{self.title} is not scored here")


def covered(known: Any, questions: Sequence[Question], key: Callable[[Question], Any], what: str) -> str:
    """Says that the truth `known` has every question; `UserError` with the first few it lacks."""
    unknown = [str(question.id) for question in questions if key(question) not in known]
    if unknown:
        raise UserError(f"{what} does not cover {len(unknown)} of {len(questions)} questions: {shorten(unknown)}")
    return f"{what}: covers all questions"


def id_of(item: Question) -> str:
    """A question's id as truth files have it."""
    return str(item.id)


def run_name(checkpoint: str, method: str, budget: Budget | None = None) -> str:
    """`CHECKPOINT/METHOD/n_TOKENS`, with a share as budget `r_SHARE`, and `CHECKPOINT/dense` without pruning."""
    return f"{checkpoint}/dense" if budget is None else f"{checkpoint}/{method}/{budget_name(budget)}"
