"""What the converters for servers share: lenient reading of answers, joining, writing.

What is written is dumped with the json module's defaults, as upstream does, so that the files agree byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import parse_line, read_records, require_file, write_text_atomic
from llava.eval.tasks.join import Coverage, as_answer, join_answers, shorten, warn
from llava.schema import ID, TEXT, Fields
from llava.utils import INCOMPLETE_STATUS, UserError


def load_questions(path: str, with_image: bool = False) -> list[dict[str, Any]]:
    """The records of a question file (JSON lines), each with `question_id` and, if asked for, `image`; at least one."""
    shape = Fields({"question_id": ID, "image": TEXT} if with_image else {"question_id": ID})
    questions = read_records(path, "question file", shape)
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions


def load_whole_answers(path: str) -> tuple[list[dict[str, Any]], int]:
    """Answers of an answer file, and the number of lines that are none (cut off by a kill or a full disk).

    A file without a single answer is an error.
    """
    lines = require_file(path, "answer file").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    answers, bad = [], 0
    for line in lines:
        try:
            record = parse_line(line, path, "answer file")
            if record is not None:
                answers.append(as_answer(record, path))
        except UserError:
            bad += 1
    if not answers:
        raise UserError(f"{path}: holds no answer" + (f" ({bad} malformed lines)" if bad else ""))
    return answers, bad


def join(
    questions: Sequence[Mapping[str, Any]], answers: Sequence[dict[str, Any]], where: str
) -> tuple[dict[str, str], Coverage]:
    """Texts by question id (as a string: numbers and strings are alike) and coverage; `UserError` if nothing joins."""
    ids = [str(question["question_id"]) for question in questions]
    texts, coverage = join_answers(ids, answers, lambda answer: str(answer["question_id"]))
    if not texts:
        raise UserError(f"{where}: no answer belongs to a question of the question file")
    return texts, coverage


def require_all(coverage: Coverage, upload: str) -> None:
    """Raises `UserError` if questions have no answer, for servers that refuse such an upload."""
    if coverage.missing:
        raise UserError(
            f"{len(coverage.missing)} of {coverage.expected} questions have no answer ({shorten(coverage.missing)}); "
            f"finish the run first; {upload} is not written"
        )


def report_bad_lines(bad: int, path: str | Path) -> int:
    """Says that `bad` lines of an answer file were no answers; the exit status that goes with it."""
    if not bad:
        return 0
    warn(f"{bad} lines of {path} are no answers and are left out; run the answering tool again for their questions")
    return INCOMPLETE_STATUS


def write_upload(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Writes JSON as `json.dump` does with its defaults (escaped, no line break at the end), whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=indent))
