"""The files of a run, answers and traces: one JSON object per line, appended and flushed as answers come, resumable.

At the end of a run the lines are in question order.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shortuuid

from llava.eval.answering.rasters import as_json
from llava.eval.answering.records import RecordFile, doubled, key_hash, match, question_hashes
from llava.eval.answering.sums import FAILED, TOKENS, TokenTotals, first_difference, run_options
from llava.eval.common.jsonio import require_keys
from llava.eval.common.outputs import ANSWERS, TRACES
from llava.eval.common.questions import Question
from llava.utils import UserError


class AnswerFile:
    """Answers of one run. Use: construct (checks), `pending`, `open`, `append` ..., `close`.

    Constructing reads what is there, proves that the file can be written and keeps other processes off it, before any
    model is loaded; it changes nothing. `open` repairs a torn last line or, without resume, starts an empty file.

    model_id, metadata: written to every answer. Answers of a run with another model or other metadata are
    refused rather than mixed. option: the flag that says where answers go, for messages.

    Attributes:
        totals: tokens over all answers, those found included.
        failed: answers that are marked as failed, those found included.
        doubles: answers found that repeat a question, known after `pending`; `finish` removes them.
        appended: answers written by this process.
    """

    def __init__(
        self,
        path: str | Path,
        model_id: str,
        metadata: Mapping[str, Any],
        resume: bool = True,
        option: str = "--answers-file",
    ) -> None:
        self.path = Path(path)
        self._option = option
        self.model_id = model_id
        self.metadata = dict(metadata)
        self.resume = resume
        self.totals = TokenTotals()
        self.failed = 0
        self.doubles = 0
        self.appended = 0
        self._found = array("Q")
        self._file = RecordFile(path, "answers file", ANSWERS)
        try:
            if resume:
                self._read_existing()
        except BaseException:
            self._file.close()
            raise

    def _read_existing(self) -> None:
        for where, record in self._file.existing():
            require_keys(record, ("question_id", "prompt", "text"), where)
            self._check_same_run(record, where)
            self._count(record["metadata"], where)
            self._found.append(key_hash(record["question_id"], record["prompt"]))

    def _count(self, metadata: Mapping[str, Any], where: str = "") -> None:
        self.totals.add(metadata.get(TOKENS), where)
        self.failed += FAILED in metadata

    def _check_same_run(self, record: Mapping[str, Any], where: str) -> None:
        found = record.get("metadata")
        if not isinstance(found, dict) or not isinstance(found.get(TOKENS, {}), dict):
            raise UserError(f"{where}: this answer has no metadata of a run; give another {self._option}")
        wanted = {"model_id": self.model_id, **self.metadata}
        difference = first_difference({"model_id": record.get("model_id"), **run_options(found)}, wanted)
        if difference is not None:
            raise UserError(
                f"{where}: answer of another run ({difference}); "
                f"give another {self._option}, or --overwrite to start over"
            )

    @property
    def has_answers(self) -> bool:
        """Whether there are answers that this run continues."""
        return len(self._found) > 0

    @property
    def found(self) -> array:
        """Key hashes of the answers that were there at the start."""
        return self._found

    def pending(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions that have no answer yet. Of several answers to one the last counts, as for the scorers."""
        asked = question_hashes(questions)
        extra = doubled(asked, self._found)
        if extra.any():
            self._leave_out(extra)
        places = match(asked, self._found)
        todo = np.ones(len(questions), dtype=bool)
        todo[places[places >= 0]] = False
        return [questions[i] for i in np.flatnonzero(todo).tolist()]

    def _leave_out(self, extra: np.ndarray) -> None:
        self.doubles += int(extra.sum())
        self.totals, self.failed, kept = TokenTotals(), 0, array("Q")
        for (where, record), number, drop in zip(self._file.existing(), self._found, extra, strict=True):
            if not drop:
                kept.append(number)
                self._count(record["metadata"], where)
        self._found = kept

    def others(self, questions: Sequence[Question]) -> int:
        """How many of the answers that were there belong to none of the questions."""
        return int((match(question_hashes(questions), self._found) < 0).sum())

    def open(self) -> None:
        """Starts writing."""
        self._file.open(keep=self.resume)

    def clear(self) -> None:
        """Empties a file that is there."""
        if self.path.exists():
            self._file.open(keep=False)
            self._file.finish()

    def append(
        self,
        question: Question,
        text: str,
        tokens: Mapping[str, Any] | None = None,
        failed: str | None = None,
    ) -> None:
        """Writes one answer and flushes it, so that a killed run loses at most the line being written.

        failed: why the text is worthless (the model returned numbers that are not finite).
        """
        metadata = dict(self.metadata)
        if failed is not None:
            metadata[FAILED] = failed
        if tokens is not None:
            metadata[TOKENS] = dict(tokens)
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
        self._file.append(record)
        self.appended += 1
        self._count(metadata)

    def finish(self, questions: Sequence[Question] = ()) -> None:
        """Stops writing. With `questions`, brings the lines into their order, one for each; others stay behind."""
        self._file.finish(question_hashes(questions) if len(questions) else None, drop_repeats=True)

    def close(self, questions: Sequence[Question] = ()) -> None:
        """`finish`, then lets other processes at the file."""
        try:
            self.finish(questions)
        finally:
            self._file.close()


class TraceFile:
    """Appends traces; does nothing without a path. Constructing proves that the file can be written.

    A line is written before its answer, so no answer lacks one after a kill; a sample that is answered twice
    because of that keeps one line when the run ends.

    kept: also write the surviving visual tokens of every layer, which ones merged tokens are made of, and where tokens
    lie in the pictures (large).
    """

    def __init__(self, path: str | None, resume: bool, kept: bool = False) -> None:
        self._file = None if path is None else RecordFile(path, "trace file", TRACES)
        self._resume, self._kept = resume, kept

    def start(self) -> None:
        """Empties the file unless the run is resumed; only now, when everything that can be wrong is checked."""
        if self._file is not None:
            self._file.open(keep=self._resume)

    def append(self, answer: Any) -> None:
        """Writes the trace of an `Answered`."""
        if self._file is None:
            return
        self._file.append(trace_record(answer, self._kept))

    def close(self, questions: Sequence[Question] = ()) -> None:
        """Ends writing; with `questions`, one line per question in their order."""
        if self._file is not None:
            self._file.close(question_hashes(questions) if len(questions) else None, drop_repeats=True)


def trace_record(answer: Any, kept: bool) -> dict[str, Any]:
    """The line of a trace file for an `Answered`. kept: see `TraceFile`."""
    decode = max(answer.seconds - answer.encode_seconds - answer.prefill_seconds, 0.0)
    rasters = as_json(answer.rasters()) if kept else None
    return {
        "question_id": answer.question.id,
        "prompt": answer.question.text,
        **answer.trace.to_dict(kept=kept),
        **({} if rasters is None else {"rasters": rasters}),
        "encode_seconds": answer.encode_seconds,
        "prefill_seconds": answer.prefill_seconds,
        "decode_seconds": decode,
        "seconds": answer.seconds,
    }
