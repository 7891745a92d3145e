"""Many settings of one model answering the same questions, taking turns on each batch.

Knows batches and whose turn it is; what becomes of an answer is the contender's business. Used by `demo` and `compare`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from llava.eval.questions import Question
from llava.eval.runner import Answered, Answerer, SampleError


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


def take_turns(
    answerer: Answerer,
    questions: Sequence[Question],
    contenders: Sequence[Contender],
    batch_size: int,
    on_skip: Callable[[Question, str], None] | None = None,
    bar: tqdm | None = None,
) -> None:
    """Has every contender answer every question it wants.

    The contenders take turns on each batch, in an order that rotates, so that whatever else the machine does meets all
    of them alike. What comes before the decoder is the same for all and done once; prefill times do not include it.
    Batches are cut from all questions, so a resumed run forms the batches that the interrupted one formed.

    on_skip: called with a question whose image cannot be read and the reason; without it the `SampleError` is raised.
    bar: advanced by one for each answer.
    """
    # Prompts of one length share a batch: less padding, and the attention kernels run without a mask.
    ordered = sorted(questions, key=lambda question: len(answerer.prompt_ids(question)))
    for number, chunk in enumerate(batches(ordered, batch_size)):
        encoded: dict[tuple[int, ...], Any] = {}
        samples: dict[int, Any] | None = None
        for turn in range(len(contenders)):
            contender = contenders[(number + turn) % len(contenders)]
            wanted = [question for question in chunk if contender.wants(question)]
            if not wanted:
                continue
            if samples is None:
                samples = _prepare(answerer, chunk, on_skip)
            key = tuple(question.index for question in wanted if question.index in samples)
            if key and key not in encoded:
                encoded[key] = answerer.encode([samples[index] for index in key], with_cls_attention=True)
            if key:
                with contender.method.attach(answerer.model) as run:
                    contender.add(answerer.generate(encoded[key], run))
            if bar is not None:
                bar.update(len(wanted))


def _prepare(
    answerer: Answerer, questions: Sequence[Question], on_skip: Callable[[Question, str], None] | None
) -> dict[int, Any]:
    samples = {}
    for question in questions:
        try:
            samples[question.index] = answerer.prepare(question)
        except SampleError as error:
            if on_skip is None:
                raise
            on_skip(question, str(error))
    return samples


def progress_bar(total: int, description: str) -> tqdm:
    """A bar over answers on stderr."""
    return tqdm(total=total, desc=description, unit="q", mininterval=2.0, file=sys.stderr)
