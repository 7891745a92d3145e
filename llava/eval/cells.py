"""One setting's answers to one set of questions: what is there, what is missing, what comes.

Knows answer files and costs; takes no turns (`turns`) and computes no figures (`compare_report`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.answers import AnswerFile
from llava.eval.compare_report import Grade
from llava.eval.evaluation import token_summary
from llava.eval.questions import Question
from llava.eval.variants import Setting


@dataclass(frozen=True)
class Task:
    """A set of questions with what is needed to ask and, if there is ground truth, to grade them."""

    name: str
    key: str
    questions: Sequence[Question]
    available: int
    image_folder: Path
    answerer: Mapping[str, Any] = field(default_factory=dict)
    grade: Grade | None = None


class Cell:
    """One setting's answers to one task: knows what is missing, writes what comes.

    Constructing only looks: the file is locked and open from `start` to `finish`, so that a large comparison does not
    hold thousands of files.
    """

    def __init__(self, setting: Setting, task: Task, path: Path, model_id: str, options: Mapping, resume: bool) -> None:
        self.setting, self.method, self.task, self.path = setting, setting.method, task, path
        own = {name: value for name, value in asdict(setting.method).items() if value is not None}
        self._arguments = model_id, {"method": setting.method.name, **own, **options}, resume
        self._answers = self._look()
        self._answers.close()
        self.peak_bytes: int | None = None

    def _look(self) -> AnswerFile:
        answers = AnswerFile(self.path, *self._arguments, option="--output-dir")
        self._pending = {question.index for question in answers.pending(self.task.questions)}
        return answers

    @property
    def pending(self) -> int:
        """Number of questions still to be answered."""
        return len(self._pending)

    def start(self) -> None:
        """Opens the file for writing."""
        self._answers = self._look()
        self._answers.open()

    def finish(self) -> None:
        """Closes it, with the answers in question order."""
        self._answers.close(self.task.questions)

    def wants(self, question: Question) -> bool:
        """Whether the question is still to be answered."""
        return question.index in self._pending

    def add(self, answers: Sequence[Any]) -> None:
        """Takes the answers of one batch."""
        for answer in answers:
            costs = {
                **token_summary(answer.trace),
                "selection_flops": answer.trace.selection_flops(),
                "kv_bytes": answer.trace.kv_bytes(),
                "prefill_ms": round(1000 * answer.prefill_seconds, 4),
                "peak_bytes": self.peak_bytes,
            }
            self._answers.append(answer.question, answer.text, costs)
            self._pending.discard(answer.question.index)


def file_name(label: str) -> str:
    """A label as the name of a file."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", label).strip("_")
