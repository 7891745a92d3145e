"""The questions of a finished run, read as the tool read them that left its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.common.questions import Question, read_questions
from llava.eval.tasks.mmbench_rows import read_rows
from llava.eval.tasks.science_conversations import read_conversations


def questions_of_run(path: str, options: Mapping[str, Any], limit: int | None = None) -> Sequence[Question]:
    """The first `limit` questions of a file (MMBench: the questions of its first rows).

    options: those of the run, as its answers carry them; they tell which tool it was.
    """
    if "all_rounds" in options:
        rows, _ = read_rows(path, options["all_rounds"])
        return [question for row in rows[:limit] for question in row]
    if "single_pred_prompt" in options:
        return read_conversations(path, options["single_pred_prompt"])[:limit]
    return read_questions(path)[:limit]


def images_of_run(path: str, options: Mapping[str, Any]) -> Mapping[str, str]:
    """Name -> base64 of the images that the question file itself holds (MMBench); none where they are files."""
    return read_rows(path, options["all_rounds"])[1] if "all_rounds" in options else {}
