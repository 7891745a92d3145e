"""The trace file of a run: what pruning did to each sample, one JSON object per line.

Knows the fields of a trace line; nothing of how pruning works. Read it with `trace_summary`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.eval.answering.records import RecordFile, question_hashes
from llava.eval.common.outputs import TRACES
from llava.eval.common.questions import Question


class TraceFile:
    """Appends traces; does nothing without a path. Constructing proves that the file can be written.

    A line is written before its answer, so no answer lacks one after a kill; a sample that is answered twice
    because of that keeps one line when the run ends.

    kept: also write the surviving visual tokens of every layer (large).
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
        decode = max(answer.seconds - answer.encode_seconds - answer.prefill_seconds, 0.0)
        self._file.append(
            {
                "question_id": answer.question.id,
                "prompt": answer.question.text,
                **answer.trace.to_dict(kept=self._kept),
                "encode_seconds": answer.encode_seconds,
                "prefill_seconds": answer.prefill_seconds,
                "decode_seconds": decode,
                "seconds": answer.seconds,
            }
        )

    def close(self, questions: Sequence[Question] = ()) -> None:
        """Ends writing; with `questions`, one line per question in their order."""
        if self._file is not None:
            self._file.close(question_hashes(questions) if len(questions) else None, drop_repeats=True)
