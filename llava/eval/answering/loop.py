"""One run over a list of questions: its files, counts, times, progress and summary, and what is kept when something
goes wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.eval.answering.answer_file import AnswerFile, TraceFile
from llava.eval.answering.metadata import RunMetadata, describe_run, make_room, read_metadata
from llava.eval.answering.progress import Progress
from llava.eval.answering.sums import TokenTotals, token_counts
from llava.eval.common.questions import Question
from llava.utils import INCOMPLETE_STATUS, UserError, visible

METADATA_INTERVAL = 30.0  # seconds between updates of the metadata while a run lasts


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop. `exit_status` is what a shell expects: 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Interrupts:
    """Context in which SIGINT and SIGTERM raise `Interrupted` in the main thread, but not inside `held()`.

    Outside the main thread it does nothing: only the main thread may set handlers.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._holds = 0
        self._waiting: int | None = None
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked child that has not set its own handlers yet
            os._exit(128 + number)
        if self._holds:
            self._waiting = number
        else:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What happens inside is finished before a signal takes effect; keep it short."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._waiting is not None and not self._holds:
            number, self._waiting = self._waiting, None
            raise Interrupted(number)


@dataclass
class Statistics:
    """What this process has answered so far."""

    samples: int = 0
    prefill_seconds: float = 0.0
    tokens: TokenTotals = field(default_factory=TokenTotals)

    def add(self, answer: Any, counts: Mapping[str, Any]) -> None:
        """Counts an answer and the tokens of its sample."""
        self.samples += 1
        self.prefill_seconds += answer.prefill_seconds
        self.tokens.add(counts)


class Evaluation:
    """Use: construct (checks and locks), `run`, `close`, `summarize`.

    args: the tools' flags. process: number of this process and how many share the work; then `args.answers_file` and
    `args.trace_file` are the parts of this one. extra: what else goes into the metadata.

    Attributes:
        pending: the questions without an answer.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        questions: Sequence[Question],
        model_id: str,
        options: Mapping[str, Any],
        process: tuple[int, int] = (0, 1),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.args, self.questions, self.process = args, questions, process
        self.statistics = Statistics()
        self.skipped = 0
        self.seconds = 0.0
        self._began: float | None = None
        self._saved = 0.0
        self._batch_size: Any = None
        self.answers = AnswerFile(args.answers_file, model_id, options, args.resume)
        try:
            make_room(args.answers_file)
            earlier = read_metadata(args.answers_file) if self.answers.has_answers else None
            self.metadata = RunMetadata(
                args.answers_file, {**describe_run(args, model_id, options, len(questions)), **(extra or {})}
            )
            self.metadata.continue_from(earlier)
            self.pending = self.answers.pending(questions)
            if extra is None and getattr(args, "num_chunks", 1) > 1 and (others := self.answers.others(questions)):
                raise UserError(other_chunk(args.answers_file, others))
            if self.answers.doubles:
                print(
                    f"warning: {args.answers_file}: {self.answers.doubles} answers repeat a question; "
                    "the last one of each is kept",
                    file=sys.stderr,
                )
            self.traces = TraceFile(args.trace_file, args.resume, args.trace_kept)
        except BaseException:
            self.answers.close()
            raise
        self._needs_metadata = (
            bool(self.pending or extra or self.answers.doubles) or earlier is None or not earlier.get("complete")
        )
        self.done = len(questions) - len(self.pending)
        if self.done and not args.quiet:
            print(f"{self.done} of {len(questions)} questions are already answered", file=sys.stderr)

    def counts(self) -> dict[str, int]:
        """Questions in all, answered (earlier ones included), skipped in this run, and failed."""
        return {
            "total": len(self.questions),
            "answered": self.done + self.answers.appended - self.answers.failed,
            "skipped": self.skipped,
            "failed": self.answers.failed,
        }

    def set_aside(self, problem: Callable[[Question], str | None]) -> None:
        """Skips, with a line, the pending questions of which `problem` says why they cannot be asked."""
        reasons = {i: reason for i, q in enumerate(self.pending) if (reason := problem(q)) is not None}
        for i, reason in reasons.items():
            print(visible(f"skipped {self.pending[i].source}: {reason}"), file=sys.stderr)
        if reasons:
            self.skipped += len(reasons)
            self.pending = [question for i, question in enumerate(self.pending) if i not in reasons]

    def run(self, answerer: Any, method: Any, interrupts: Interrupts) -> None:
        """Answers what is pending."""
        from llava.eval.answering.batching import BatchSize, answer_questions
        from llava.eval.answering.workers import default_workers

        args, model = self.args, answerer.model
        self.metadata.set_model(
            describe_device(model.device), str(model.dtype).removeprefix("torch."), answerer.adapter.arrangement()
        )
        if answerer.adapter.family is not None:
            self.metadata.values["family"] = answerer.adapter.family
        self.answers.open()
        self.traces.start()
        self._began = time.perf_counter()
        self.save_metadata()
        self._batch_size = BatchSize(args.batch_size)
        workers = default_workers(model.device) if args.num_workers is None else args.num_workers
        with (
            Progress(len(self.pending), args.method, args.quiet, self.process) as progress,
            method.attach(model) as run,
        ):
            run.notes_members = self.args.trace_file is not None and self.args.trace_kept

            def skip(question: Question, reason: str) -> None:
                progress.message(f"skipped {question.source}: {reason}")
                self.skipped += 1
                progress.advance()

            def fail(question: Question, reason: str) -> None:
                progress.message(f"failed {question.source} (question {question.id}): {reason}")
                with interrupts.held():
                    self.answers.append(question, "", failed=reason)
                progress.advance()

            on_skip, on_fail = (None, None) if args.strict else (skip, fail)
            stream = answer_questions(answerer, self.pending, run, self._batch_size, on_skip, on_fail, workers)
            with contextlib.closing(stream):  # whatever happens, worker processes end here
                for answer in stream:
                    with interrupts.held():
                        self.traces.append(answer)
                        counts = token_counts(answer.trace)
                        self.answers.append(answer.question, answer.text, counts)
                        self.statistics.add(answer, counts)
                    progress.advance((self.statistics.tokens.means() or {}).get("nominal"))
                    if time.perf_counter() - self._saved > METADATA_INTERVAL:
                        self.save_metadata()

    def save_metadata(self, finished: bool = False) -> None:
        """Writes what is known by now."""
        self._saved = time.perf_counter()
        if self._began is not None:
            self.seconds = self._saved - self._began
        self.metadata.save(
            self.counts(),
            self.answers.totals,
            self.seconds,
            self.statistics.samples,
            self.statistics.prefill_seconds,
            finished,
        )

    @property
    def attempted(self) -> bool:
        """Whether every question was tried."""
        counts = self.counts()
        return counts["total"] == sum(counts[kind] for kind in ("answered", "skipped", "failed"))

    def close(self) -> None:
        """Puts the lines in order, writes the metadata and lets other processes at the files."""
        started = self._began is not None or not self.pending
        questions = self.questions if started else ()
        try:
            if started and self._needs_metadata and self._began is None and not self.answers.has_answers:
                self.answers.open()  # no question at all: an empty file says that this part is done
            self.traces.close(questions)
            self.answers.finish(questions)
            if started and self._needs_metadata:
                self.save_metadata(finished=self.attempted)
        finally:
            # The lock goes last: who waits for it finds everything written.
            self.answers.close()

    def release(self) -> None:
        """Gives the files up without having written anything."""
        self.traces.close()
        self.answers.close()

    def explain_interruption(self, error: BaseException) -> None:
        """Says on stderr what is kept."""
        kept = self.done + self.answers.appended
        text = (
            f"{error or 'interrupted'}: {kept} of {len(self.questions)} answers are in {self.answers.path}; "
            "run the same command again to continue"
        )
        print(visible(text), file=sys.stderr)

    def summarize(self) -> int:
        """Prints the summary; returns the exit status."""
        batch_size = self.args.batch_size if self._batch_size is None else self._batch_size.current
        lines = summary_lines(self.statistics, len(self.pending), self.seconds, batch_size)
        if self.skipped:
            status = f"(exit status {INCOMPLETE_STATUS})"
            lines.append(f"{self.skipped} samples were skipped, see above; a rerun retries them {status}")
        if self.answers.failed:
            lines.append(
                f"{self.answers.failed} samples failed; their answers are empty and marked in the metadata "
                f"(exit status {INCOMPLETE_STATUS})"
            )
        if not self.args.quiet:
            print("\n".join(lines), file=sys.stderr)
        return INCOMPLETE_STATUS if self.skipped or self.answers.failed else 0


def other_chunk(answers_file: Any, others: int) -> str:
    """Why a chunk is refused."""
    return (
        f"--answers-file {answers_file}: holds {others} answers to questions of another chunk; give each chunk a file "
        "of its own and put them together with llava.eval.merge_answers"
    )


def describe_device(device: Any) -> str:
    """The name of the GPU, or the kind of device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def summary_lines(statistics: Statistics, total: int, seconds: float, batch_size: int) -> list[str]:
    """Counts, time and tokens of the answers of this process."""
    lines = [
        f"answered {statistics.samples} of {total} questions in {seconds:.1f} s"
        f" ({statistics.samples / max(seconds, 1e-9):.2f} questions/s, batch size {batch_size})"
    ]
    if statistics.samples:
        prefill = 1000 * statistics.prefill_seconds / statistics.samples
        lines.append(f"prefill: {prefill:.1f} ms per sample (decoder, with selection)")
        if means := statistics.tokens.means():
            ratio = statistics.tokens.flops_ratio() or 1.0
            lines.append(
                f"visual tokens per layer: nominal {means['nominal']:.1f}, processed {means['processed']:.1f}"
                f" of {means['visual']:.0f}; decoder prefill FLOPs {100 * ratio:.1f}% of dense"
            )
    return lines
