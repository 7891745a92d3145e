"""Many settings of one model answering the same questions, taking turns on each batch.

Knows batches and whose turn it is; what becomes of an answer is the contender's business. Used by `demo` and `compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from llava.eval.progress import Progress
from llava.eval.questions import Question
from llava.eval.runner import Answered, Answerer, Encoded, Sample, SampleError


class Contender(Protocol):
    """One setting."""

    method: Any

    def wants(self, question: Question) -> bool:
        """Whether the question is still to be answered."""

    def add(self, answers: Sequence[Answered]) -> None:
        """Takes the answers of one batch."""


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
        key = (tuple(sample.question.index for sample in samples), self._answerer.model.merge_type(), own)
        if key not in self._encoded:
            self._encoded[key] = self._answerer.encode(
                samples, with_cls_attention=own is None or run.needs_cls_attention
            )
        return self._encoded[key]


def take_turns(
    answerer: Answerer,
    questions: Sequence[Question],
    contenders: Sequence[Contender],
    batch_size: int,
    on_skip: Callable[[Question, str], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Has every contender answer every question it wants.

    The contenders take turns on each batch, in an order that rotates, so that whatever else the machine does meets all
    of them alike. What comes before the decoder is shared where it can be; prefill times do not include it.
    Batches are cut from all questions, so a resumed run forms the batches that the interrupted one formed.

    on_skip: called with a question whose image cannot be read, or whose numbers are not finite, and the reason; without
    it a `SampleError` is raised.
    progress: told of every answer.
    """
    # Prompts of one length share a batch: less padding, and the attention kernels run without a mask.
    ordered = sorted(questions, key=lambda question: len(answerer.prompt_ids(question)))
    for number, chunk in enumerate(batches(ordered, batch_size)):
        encodings = Encodings(answerer)
        samples: dict[int, Any] | None = None
        for turn in range(len(contenders)):
            contender = contenders[(number + turn) % len(contenders)]
            wanted = [question for question in chunk if contender.wants(question)]
            if not wanted:
                continue
            if samples is None:
                samples = _prepare(answerer, chunk, on_skip)
            batch = [samples[question.index] for question in wanted if question.index in samples]
            if batch:
                with contender.method.attach(answerer.model) as run:
                    answers = answerer.generate(encodings.of(batch, run), run)
                contender.add([answer for answer in answers if answer.failed is None])
                for answer in answers:
                    if answer.failed is not None:
                        _report(on_skip, answer.question, SampleError(answer.failed))
            if progress is not None:
                progress.advance(count=len(wanted))


def _prepare(
    answerer: Answerer, questions: Sequence[Question], on_skip: Callable[[Question, str], None] | None
) -> dict[int, Any]:
    samples = {}
    for question in questions:
        try:
            samples[question.index] = answerer.prepare(question)
        except SampleError as error:
            _report(on_skip, question, error)
    return samples


def _report(on_skip: Callable[[Question, str], None] | None, question: Question, error: SampleError) -> None:
    if on_skip is None:
        raise error
    on_skip(question, str(error))
