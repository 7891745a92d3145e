"""The answer file of a run: one JSON object per line, appended and flushed as answers come, resumable.

Knows LLaVA's answer format and nothing of models. Line order at the end of a run is question order.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import shortuuid

from llava.eval.jsonio import iter_jsonl, require_keys, write_text_atomic
from llava.eval.questions import Question
from llava.utils import UserError

TOKENS = "tokens"  # key in the metadata for what differs from sample to sample


class AnswerFile:
    """Answers of one run. Use: construct (checks), `pending`, `open`, `append` ..., `close`.

    Constructing reads what is there and proves that the file can be written, before any model is loaded; it
    changes nothing. `open` repairs a torn last line or, without resume, starts an empty file.

    model_id, metadata: written to every answer. Answers of a run with another model or other metadata are
    refused rather than mixed.
    """

    def __init__(self, path: str | Path, model_id: str, metadata: Mapping[str, Any], resume: bool = True) -> None:
        self.path = Path(path)
        self.model_id = model_id
        self.metadata = dict(metadata)
        self.resume = resume
        self._stream: IO[str] | None = None
        self._check_writable()
        self.existing: list[dict[str, Any]] = []
        # Bytes of the file that are whole lines; what is behind them was torn by a kill or a full disk.
        self._whole_bytes = 0
        if resume:
            self._whole_bytes = _whole_lines(self.path)
            self._read_existing()

    def _check_writable(self) -> None:
        if self.path.is_dir():
            raise UserError(f"answers file is a folder: {self.path}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            existed = self.path.exists()
            with open(self.path, "ab"):
                pass
            if not existed:
                self.path.unlink()
        except OSError as error:
            raise UserError(f"cannot write answers file {self.path}: {error.strerror or error}") from None

    def _read_existing(self) -> None:
        if not self._whole_bytes:
            return
        records = iter_jsonl(self.path, "answers file", limit_bytes=self._whole_bytes)
        for number, record in records:
            where = f"{self.path}:{number}"
            require_keys(record, ("question_id", "prompt", "text"), where)
            self._check_same_run(record, where)
            self.existing.append(record)

    def _check_same_run(self, record: Mapping[str, Any], where: str) -> None:
        found = {"model_id": record.get("model_id"), **(record.get("metadata") or {})}
        found.pop(TOKENS, None)
        wanted = {"model_id": self.model_id, **self.metadata}
        for key in [*wanted, *found]:
            if found.get(key) != wanted.get(key):
                raise UserError(
                    f"{where}: answer of another run ({key} {found.get(key)!r}, now {wanted.get(key)!r}); "
                    "give another --answers-file, or --no-resume to start over"
                )

    def pending(self, questions: Sequence[Question]) -> list[Question]:
        """The questions that have no answer yet."""
        answered = Counter((str(record["question_id"]), record["prompt"]) for record in self.existing)
        todo = []
        for question in questions:
            if answered[question.key] > 0:
                answered[question.key] -= 1
            else:
                todo.append(question)
        return todo

    def open(self) -> None:
        """Starts writing."""
        self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._stream.truncate(self._whole_bytes)

    def append(self, question: Question, text: str, tokens: Mapping[str, Any] | None = None) -> None:
        """Writes one answer and flushes it, so that a killed run loses at most the line being written."""
        assert self._stream is not None, "open() comes first"
        metadata = self.metadata if tokens is None else {**self.metadata, TOKENS: dict(tokens)}
        record = {
            "question_id": question.id,
            "prompt": question.text,
            "text": text,
            # Derived, not random: the same run writes the same file.
            "answer_id": shortuuid.uuid(name=f"{self.model_id}|{question.index}|{question.id}|{text}"),
            "model_id": self.model_id,
            "metadata": metadata,
            **question.fields,
        }
        self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self, questions: Sequence[Question] = ()) -> None:
        """Stops writing. With `questions`, brings the lines into their order if a resumed run left another;
        answers to none of them stay at the end.
        """
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if questions and self.existing:
            self._sort(questions)

    def _sort(self, questions: Sequence[Question]) -> None:
        places: dict[tuple[str, str], list[int]] = {}
        for question in reversed(questions):
            places.setdefault(question.key, []).append(question.index)
        lines = [line for line in self.path.read_text(encoding="utf-8").split("\n") if line.strip()]
        ranks = []
        for line in lines:
            record = json.loads(line)
            waiting = places.get((str(record["question_id"]), record["prompt"]))
            ranks.append(waiting.pop() if waiting else float("inf"))
        order = sorted(range(len(lines)), key=ranks.__getitem__)
        if order != list(range(len(lines))):
            write_text_atomic(self.path, "".join(lines[i] + "\n" for i in order))


def _whole_lines(path: Path) -> int:
    """Size in bytes of the file up to its last line break; 0 if there is no file."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - 65536, 0)
            file.seek(start)
            position = file.read(end - start).rfind(b"\n")
            if position >= 0:
                return start + position + 1
            end = start
    return 0
