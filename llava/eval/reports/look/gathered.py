"""Runs that were just answered, as a report takes them: traces are gathered while the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.answering.answer_file import trace_record
from llava.eval.reports.look.sources import AnswerSet, Truth, answers_of, hash_of
from llava.eval.reports.look.traces import Looked, read_line
from llava.eval.tasks.task import Task


class Gathered:
    """Listens to a `Cell` of an experiment and keeps what its answer file does not hold.

    also: told of every `Answered` too.
    """

    def __init__(self, cell: Any, also: Any = None) -> None:
        self.cell = cell
        self.traces: dict[int, Looked] = {}
        self._also = also
        cell.answered = self._hear

    def _hear(self, answered: Any) -> None:
        line = trace_record(answered, kept=True)
        self.traces[hash_of(line)] = read_line(line, str(self.cell.path))
        if self._also is not None:
            self._also(answered)


def answer_sets(gathered: Sequence[Sequence[Gathered]], tasks: Sequence[Task], data_dir: Path) -> list[AnswerSet]:
    """What `joined.join` takes, of a row of listeners per task, one for every setting."""
    sets = []
    for task, row in zip(tasks, gathered, strict=True):
        asked = row[0].cell.asked
        questions = {hash_of({"question_id": q.id, "prompt": q.text}): q for q in asked.questions}
        known = {"questions": questions, "image_folder": asked.image_folder}
        truth = Truth(task, data_dir, task.grader(data_dir), task.truths(data_dir), **known)
        for own in row:
            answers, options, model = answers_of(own.cell.path)
            label = own.cell.setting.label
            sets.append(AnswerSet(label, task.title, own.cell.path, answers, own.traces, options, model, truth))
    return sets
