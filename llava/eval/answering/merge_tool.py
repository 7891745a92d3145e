"""Merging files of answers by hand: what `merge_answers` does with its flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.eval.answering.merging import Part, check_same_run, merge, read_part
from llava.eval.answering.metadata import file_sha256
from llava.eval.common.jsonio import require_file
from llava.eval.common.locking import FileLock
from llava.eval.common.questions import Question
from llava.eval.tasks.readers import questions_of_run
from llava.utils import UserError


def questions_of(path: str, parts: Sequence[Part]) -> Sequence[Question]:
    """The questions of the whole run, read as the tool read them that the parts' metadata point to."""
    options = next((part.options for part in parts if part.options is not None), {})
    metas = [part.meta for part in parts if part.meta is not None]
    for meta in metas[:1]:
        wanted = (meta.get("question_file") or {}).get("sha256")
        if wanted is not None and wanted != file_sha256(require_file(path, "question file")):
            raise UserError(f"{path} is not the question file of the parts, or was changed since (sha256 differs)")
    limit = next(((meta.get("arguments") or {}).get("limit") for meta in metas), None)
    return questions_of_run(path, options, limit)


def merge_files(answers_file: str, question_file: str, paths: Sequence[str], allow_missing: bool) -> dict[str, int]:
    """Checks and merges answer files of parts; returns how many questions are answered and missing.

    Raises:
        UserError: a part is missing, unfinished, given twice or of another run; see `choose_lines`.
    """
    target = Path(answers_file)
    resolved = [Path(path).resolve() for path in paths]
    if target.resolve() in resolved:
        raise UserError(f"--answers-file {target} is one of the parts")
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UserError(f"part {paths[i]} is given twice")
    parts = [read_part(path) for path in paths]
    check_same_run(parts)
    questions = questions_of(question_file, parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target, "answers file")
    try:
        return merge(target, questions, parts, allow_missing, arguments={"num_chunks": 1, "chunk_idx": 0})
    finally:
        lock.release()
