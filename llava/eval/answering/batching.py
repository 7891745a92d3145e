"""Which questions share a forward pass, and what happens when one pass fails.

Questions of similar length share a batch, a batch that does not fit into memory is halved, and a sample that fails is
told from those that only shared its batch.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch

from llava.eval.answering.adapter import SampleError, is_out_of_memory
from llava.eval.answering.workers import prepared
from llava.eval.common.arguments import AUTO
from llava.utils import UserError, is_user_error

MAX_AUTO = 64
# Samples that are looked at together to find those of similar length; bounded, since their pixels wait in memory.
_WINDOW_BATCHES = 8
_MAX_WINDOW = 128
# A batch size has to be this much faster per sample than half of it to be kept.
_GAIN = 0.95
_TRIALS = 2


class BatchSize:
    """How many samples share a forward pass: a fixed number, or found while running.

    `auto` doubles as long as a sample gets faster by at least 5%, up to 64. Both halve for good when memory runs out.
    """

    def __init__(self, value: int | str) -> None:
        self.current = 1 if value == AUTO else int(value)
        self._searching = value == AUTO
        self._times: list[float] = []
        self._previous: float | None = None

    @property
    def window(self) -> int:
        """Samples among which batches are formed."""
        return min(_WINDOW_BATCHES * self.current, max(_MAX_WINDOW, self.current)) if self.current > 1 else 1

    def shrink(self, failed: int) -> None:
        """Memory ran out with `failed` samples."""
        self.current = max(min(self.current, failed // 2), 1)
        self._searching = False

    def tell(self, samples: int, seconds_per_sample: float) -> None:
        """A batch was answered; grows if that is worth it."""
        if not self._searching or samples < self.current:
            return
        self._times.append(seconds_per_sample)
        if len(self._times) < _TRIALS:
            return
        best, self._times = min(self._times), []
        if self._previous is not None and best > _GAIN * self._previous:
            self.current, self._searching = self.current // 2, False
        elif self.current >= MAX_AUTO:
            self._searching = False
        else:
            self.current, self._previous = 2 * self.current, best


def sample_length(sample: Any) -> tuple[int, int]:
    """What the length of a sample's row grows with: views of its images, then tokens of the prompt."""
    views = sum(pixels.shape[0] if getattr(pixels, "ndim", 3) == 4 else 1 for pixels in sample.pixels or ())
    return views, len(sample.input_ids)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Batcher:
    """Answers prepared samples batch by batch.

    answerer: an `Answerer`; run: what a method's `attach` returned. on_skip: told of a sample that found no memory even
    alone or does not fit the model, on_fail: of one whose numbers are not finite; without them these are `UserError`s.
    """

    def __init__(
        self,
        answerer: Any,
        run: Any,
        size: BatchSize,
        on_skip: Callable[[Any, str], None] | None = None,
        on_fail: Callable[[Any, str], None] | None = None,
    ) -> None:
        self.answerer, self.run, self.size = answerer, run, size
        self.on_skip, self.on_fail = on_skip, on_fail

    def answer_all(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Yields an `Answered` for every sample that has an answer, in the order of answering."""
        window: list[Any] = []
        for sample in samples:
            window.append(sample)
            if len(window) >= self.size.window:
                yield from self._answer_window(window)
                window = []
        yield from self._answer_window(window)

    def _answer_window(self, window: Sequence[Any]) -> Iterator[Any]:
        # The longest first: where memory is short it shows at once. Sorting is stable, so equal ones keep their order.
        waiting = sorted(window, key=sample_length, reverse=True)
        while waiting:
            batch, waiting = waiting[: self.size.current], waiting[self.size.current :]
            yield from self._answer(batch)

    def _answer(self, batch: Sequence[Any]) -> Iterator[Any]:
        failure: Exception | None = None
        try:
            answered = self.answerer.answer(batch, self.run)
        except Exception as error:
            if is_user_error(error):
                raise
            # Not handled here: the traceback would keep the tensors of the failed pass alive.
            failure = error.with_traceback(None)
            failed_for_memory = is_out_of_memory(error)
            original = error.__traceback__ if not failed_for_memory else None
        if failure is None:
            self.size.tell(len(batch), answered[0].seconds)
            for item in answered:
                if item.failed is None:
                    yield item
                else:
                    self._fail(item.question, item.failed)
        elif failed_for_memory:
            yield from self._halve(batch)
        elif len(batch) > 1:  # one of them, perhaps: the others must not suffer from it
            for sample in batch:
                yield from self._answer([sample])
        elif isinstance(failure, SampleError):
            self._report(self.on_skip, batch[0].question, str(failure))
        else:
            self._explain(batch[0], failure.with_traceback(original))

    def _halve(self, batch: Sequence[Any]) -> Iterator[Any]:
        _release_memory()
        if len(batch) == 1:
            self._report(self.on_skip, batch[0].question, "out of memory even alone")
            return
        self.size.shrink(len(batch))
        half = len(batch) // 2
        yield from self._answer(batch[:half])
        yield from self._answer(batch[half:])

    def _explain(self, sample: Any, failure: Exception) -> None:
        """A pass over one sample raised: its numbers, or a defect of the program, which is raised again."""
        place = self.answerer.adapter.first_not_finite([sample], self.run.needs_cls_attention)
        if place is None:
            raise failure
        self._fail(sample.question, f"numbers that are not finite, first in {place}")

    def _fail(self, question: Any, reason: str) -> None:
        self._report(self.on_fail, question, reason)

    @staticmethod
    def _report(tell: Callable[[Any, str], None] | None, question: Any, reason: str) -> None:
        if tell is None:
            raise UserError(f"{question.source} (question {question.id}): {reason}")
        tell(question, reason)


def answer_questions(
    answerer: Any,
    questions: Sequence[Any],
    run: Any,
    batch_size: int | BatchSize = 1,
    on_skip: Callable[[Any, str], None] | None = None,
    on_fail: Callable[[Any, str], None] | None = None,
    num_workers: int = 0,
) -> Generator[Any, None, None]:
    """Yields answers as they come: in question order for batch size 1, otherwise longer questions of a stretch first.

    A question whose image cannot be read goes to `on_skip(question, reason)` and costs nothing but itself;
    without `on_skip` it is a `UserError`. One whose numbers are not finite goes to `on_fail` likewise.
    num_workers: processes that prepare samples ahead of the model.
    """
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
    batcher = Batcher(answerer, run, size, on_skip, on_fail)
    if num_workers < 1:
        samples = ((question, answerer.try_prepare(question)) for question in questions)
    else:
        samples = prepared(answerer, questions, num_workers, size.window)
    with contextlib.closing(samples) as stream:  # whatever happens, worker processes end here
        yield from batcher.answer_all(_readable(stream, on_skip))


def _readable(stream: Iterator[tuple[Any, Any]], on_skip: Callable[[Any, str], None] | None) -> Iterator[Any]:
    for question, sample in stream:
        if not isinstance(sample, SampleError):
            yield sample
        elif on_skip is None:
            raise UserError(f"{question.source}: {sample}")
        else:
            on_skip(question, str(sample))
