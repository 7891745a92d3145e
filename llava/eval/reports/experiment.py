"""Settings crossed with sets of questions, answered by one model: the loop behind `demo` and `compare`.

Settings take turns on every batch, so that whatever else the machine does meets all of them alike, and every answer is
written as it comes: an experiment that was interrupted continues.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.answering.adapter import Answered, Encoded, Sample, SampleError
from llava.eval.answering.answer_file import AnswerFile
from llava.eval.answering.answerer import Answerer
from llava.eval.answering.progress import Progress
from llava.eval.answering.sums import token_counts
from llava.eval.common.questions import Question
from llava.eval.reports.memory import PeakMemory
from llava.eval.reports.settings import Setting
from llava.pruning.engine.notices import missed_budgets
from llava.utils import UserError

CACHED_IMAGES = 256

Skip = Callable[[Question, str], None]


@dataclass(frozen=True)
class QuestionSet:
    """Questions with what is needed to ask them and, if there is ground truth, to grade the answers.

    available: how many questions the file holds; answerer: further arguments of `Answerer`; grade: the credit
    of an answer, 0 to 1, or None where the truth does not know its question.
    """

    name: str
    key: str
    questions: Sequence[Question]
    available: int
    image_folder: Path
    answerer: Mapping[str, Any] = field(default_factory=dict)
    grade: Callable[[Mapping[str, Any]], float | None] | None = None


class Cell:
    """One setting's answers to one set of questions: what is missing, and the file that takes what comes.

    Constructing only looks: the file is locked and open from `start` to `finish`, so that a large comparison does not
    hold thousands of files.

    Attributes:
        batch_ms: decoder prefill per sample of each batch answered in this process, in milliseconds.
        answered: told of every `Answered` of a batch while the method is attached, for what an answer file does not
            hold; its trace says what merged tokens are made of.
    """

    def __init__(
        self, setting: Setting, asked: QuestionSet, path: Path, model_id: str, options: Mapping[str, Any], resume: bool
    ) -> None:
        self.setting, self.method, self.asked, self.path = setting, setting.method, asked, path
        own = {name: value for name, value in setting.method.settings().items() if value is not None}
        self._arguments = model_id, {"method": setting.method.name, **own, **options}, resume
        self._answers = self._look()
        self._answers.close()
        self.peak_bytes: int | None = None
        self.batch_ms: list[float] = []
        self.answered: Callable[[Answered], None] | None = None

    def _look(self) -> AnswerFile:
        answers = AnswerFile(self.path, *self._arguments, option="--output-dir")
        self._pending = {question.index for question in answers.pending(self.asked.questions)}
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
        self._answers.close(self.asked.questions)

    def wants(self, question: Question) -> bool:
        """Whether the question is still to be answered."""
        return question.index in self._pending

    def add(self, answers: Sequence[Answered]) -> None:
        """Takes the answers of one batch."""
        if answers:
            self.batch_ms.append(1000 * answers[0].prefill_seconds)
        for answer in answers:
            costs = {
                **token_counts(answer.trace),
                "selection_flops": answer.trace.selection_flops(),
                "kv_bytes": answer.trace.kv_bytes(),
                "prefill_ms": round(1000 * answer.prefill_seconds, 4),
                "peak_bytes": self.peak_bytes,
            }
            self._answers.append(answer.question, answer.text, costs)
            self._pending.discard(answer.question.index)
            if self.answered is not None:
                self.answered(answer)


def file_name(label: str) -> str:
    """A label as the name of a file."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", label).strip("_")


class Experiment:
    """Every setting answers every set of questions, into `folder/SET/SETTING.jsonl`.

    options: what must be equal for earlier answers to be kept, beside the method's own options.

    Attributes:
        cells: set by set, a cell per setting, in the order of `settings`.

    Raises:
        UserError: a file holds answers of another run or cannot be written, or two labels give one file name.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        sets: Sequence[QuestionSet],
        folder: Path,
        model_id: str,
        options: Mapping[str, Any],
        resume: bool = True,
    ) -> None:
        self.settings, self.sets = settings, sets
        names = [file_name(setting.label) for setting in settings]
        if len(set(names)) < len(names):
            raise UserError("two variants have labels that give the same file name; change one of them")
        self.cells = [
            [
                Cell(setting, asked, folder / asked.key / f"{name}.jsonl", model_id, options, resume)
                for setting, name in zip(settings, names, strict=True)
            ]
            for asked in sets
        ]

    @property
    def pending(self) -> int:
        """Answers that are missing, over all cells."""
        return sum(cell.pending for row in self.cells for cell in row)

    def answer_missing(
        self,
        make_answerer: Callable[..., Answerer],
        batch_size: int,
        quiet: bool = False,
        strict: bool = False,
    ) -> int:
        """Answers what the cells lack; returns the number of questions that could not be asked.

        make_answerer: builds an answerer from an image folder and keywords, around the loaded model. strict: a
        question that cannot be asked is a `UserError` instead of being skipped with a line.
        """
        skipped: set[tuple[str, int]] = set()
        peaks: dict[str, int | None] = {}
        with missed_budgets(), Progress(self.pending, "", quiet, what="answers") as progress:
            for row in self.cells:
                asked = row[0].asked
                todo = [cell for cell in row if cell.pending]
                if not todo:
                    continue
                answerer = make_answerer(asked.image_folder, image_cache=CACHED_IMAGES, **asked.answerer)

                def skip(question: Question, reason: str, asked: QuestionSet = asked) -> None:
                    if strict:
                        raise UserError(f"{asked.name}: {reason}")
                    if (asked.key, question.index) not in skipped:
                        skipped.add((asked.key, question.index))
                        progress.message(f"skipped {question.source}: {reason}")

                progress.relabel(asked.name)
                new = [cell for cell in todo if cell.setting.label not in peaks]
                peaks |= measure_memory(answerer, asked.questions[:batch_size], new)
                with ExitStack() as files:
                    for cell in todo:
                        cell.peak_bytes = peaks.get(cell.setting.label)
                        cell.start()
                        files.callback(cell.finish)
                    take_turns(answerer, asked.questions, todo, batch_size, skip, progress)
        return len(skipped)


class Encodings:
    """What comes before the decoder, computed once for all settings that see the same prompts.

    Methods that work in front of the decoder have prompts of their own; so may dense runs of LLaVA-1.6, which arrange
    crops differently.
    """

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._encoded: dict[Any, Encoded] = {}

    def of(self, samples: Sequence[Sample], run: Any) -> Encoded:
        """The encoded batch; `run` must be attached."""
        own = run.method if run.shapes_prompt else None
        key = (tuple(sample.question.index for sample in samples), self._answerer.adapter.arrangement(), own)
        if key not in self._encoded:
            self._encoded[key] = self._answerer.encode(
                samples, with_cls_attention=own is None or run.needs_cls_attention
            )
        return self._encoded[key]


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def take_turns(
    answerer: Answerer,
    questions: Sequence[Question],
    cells: Sequence[Cell],
    batch_size: int,
    skip: Skip,
    progress: Progress,
) -> None:
    """Asks every question under each setting that lacks its answer.

    Settings take turns on each batch, in an order that rotates. What comes before the decoder is shared where it can
    be; prefill times do not include it. Batches are cut from all questions, so a resumed run forms the batches that the
    interrupted one formed.

    skip: called with a question whose image cannot be read, or whose numbers are not finite, and the reason.
    progress: told of every answer.
    """
    # Prompts of one length share a batch: less padding, and the attention kernels run without a mask.
    ordered = sorted(questions, key=lambda question: _prompt_length(answerer, question))
    for number, chunk in enumerate(batches(ordered, batch_size)):
        encodings = Encodings(answerer)
        samples: dict[int, Sample] | None = None
        for turn in range(len(cells)):
            cell = cells[(number + turn) % len(cells)]
            wanted = [question for question in chunk if cell.wants(question)]
            if not wanted:
                continue
            if samples is None:
                samples = _prepare(answerer, chunk, skip)
            batch = [samples[question.index] for question in wanted if question.index in samples]
            if batch:
                with cell.method.attach(answerer.model) as run:
                    run.notes_members = cell.answered is not None
                    answers = _answers(answerer, encodings, batch, run, skip)
                    cell.add([answer for answer in answers if answer.failed is None])
                for answer in answers:
                    if answer.failed is not None:
                        skip(answer.question, answer.failed)
            progress.advance(count=len(wanted))


def _prompt_length(answerer: Answerer, question: Question) -> int:
    try:
        return len(answerer.prompt_ids(question))
    except SampleError:  # told when it is the question's turn
        return 0


def _answers(answerer: Answerer, encodings: Encodings, batch: Sequence[Sample], run: Any, skip: Skip) -> list[Answered]:
    try:
        return answerer.generate(encodings.of(batch, run), run)
    except SampleError as error:  # one of them does not fit the model
        if len(batch) == 1:
            skip(batch[0].question, str(error))
            return []
        return [answer for sample in batch for answer in _answers(answerer, encodings, [sample], run, skip)]


def _prepare(answerer: Answerer, questions: Sequence[Question], skip: Skip) -> dict[int, Sample]:
    samples = {}
    for question in questions:
        try:
            samples[question.index] = answerer.prepare(question)
        except SampleError as error:
            skip(question, str(error))
    return samples


def measure_memory(answerer: Answerer, questions: Sequence[Question], cells: Sequence[Cell]) -> dict[str, int | None]:
    """Peak memory of each cell's setting on one batch, by label; untimed, so that it also warms up."""
    samples = list(_prepare(answerer, questions, lambda question, reason: None).values())  # told at their turn
    peaks: dict[str, int | None] = {}
    if not samples or not cells:
        return peaks
    encodings = Encodings(answerer)
    # The very first pass pays for what the libraries set up; its figure is overwritten.
    for cell in [cells[0], *cells]:
        with missed_budgets(report=False), cell.method.attach(answerer.model) as run:
            encoded = encodings.of(samples, run)
            with PeakMemory(answerer.model.device) as peak:
                answerer.generate(encoded, run)
        peaks[cell.setting.label] = peak.bytes
    return peaks


def describe_conditions(model_path: str, batch_size: int, model: Any) -> dict[str, Any]:
    """Under which conditions a table was measured."""
    import torch
    import transformers

    device = model.device
    return {
        "model": Path(model_path).name,
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
