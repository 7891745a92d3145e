"""Samples are prepared (prompt tokenized, images decoded and processed) ahead of the model, in worker processes.

A worker that dies (killed, crashed in a decoder) costs at most the sample that kills it again when it is tried alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava.eval.answering.adapter import SampleError

# Questions about one image go to one worker together, which then decodes it once.
_MAX_GROUP = 16
_START_METHOD = "fork"  # workers share the model's configuration and the tokenizer without copying or pickling them


def default_workers(device: Any) -> int:
    """Worker processes for a device: none for a CPU, which has nothing to wait for, else up to four."""
    if device.type == "cpu" or _START_METHOD not in multiprocessing.get_all_start_methods():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores - 1)


def prepared(
    answerer: Any, questions: Sequence[Any], num_workers: int = 0, ahead: int = 1
) -> Generator[tuple[Any, Any], None, None]:
    """Yields (question, `Sample` or the `SampleError` that says why there is none), in order.

    answerer: an `Answerer`. num_workers: 0 prepares in this process, when a sample is asked for. ahead: samples that
    workers may have ready and waiting.
    """
    if num_workers < 1 or _START_METHOD not in multiprocessing.get_all_start_methods():
        for question in questions:
            yield question, answerer.try_prepare(question)
        return
    # A tokenizer that was used before a fork says on stderr, once per worker, that it goes on without threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    yield from _Workers(answerer, questions, num_workers, ahead).stream()


class _Samples(Dataset):
    """Prepares the samples of a range of positions."""

    def __init__(self, answerer: Any, questions: Sequence[Any]) -> None:
        self.answerer, self.questions = answerer, questions

    def __getitem__(self, positions: range) -> list[tuple[Any, Any]]:
        pack = _Packer()
        return [(question, pack(self.answerer.try_prepare(question))) for question in map(self._question, positions)]

    def _question(self, position: int) -> Any:
        return self.questions[position]


class _Packer:
    """Samples as they go through a pipe: bytes instead of tensors, the pixels of one image once.

    torch would send tensors through shared memory, of which containers often have 64 MB; a worker that runs out of it
    dies. Bytes as numpy arrays know no bfloat16, so type and shape travel beside them.
    """

    def __init__(self) -> None:
        self._pixels: dict[int, tuple[Any, Any]] = {}

    def __call__(self, sample: Any) -> Any:
        if isinstance(sample, SampleError):
            return sample
        packed = tuple(self._packed(p) if isinstance(p, torch.Tensor) else p for p in sample.pixels)
        return replace(sample, input_ids=sample.input_ids.numpy(), pixels=packed)

    def _packed(self, pixels: torch.Tensor) -> Any:
        if id(pixels) not in self._pixels:
            raw = pixels.detach().contiguous().view(-1).view(torch.uint8).numpy()
            # The tensor is kept too, so that its id stays its own.
            self._pixels[id(pixels)] = pixels, (raw, pixels.dtype, tuple(pixels.shape))
        return self._pixels[id(pixels)][1]


def _unpacked(packed: tuple[Any, torch.dtype, tuple[int, ...]]) -> torch.Tensor:
    raw, dtype, shape = packed
    return torch.from_numpy(raw).view(dtype).view(shape)


def _unpack(sample: Any) -> Any:
    if isinstance(sample, SampleError):
        return sample
    pixels = tuple(_unpacked(packed) if isinstance(packed, tuple) else packed for packed in sample.pixels)
    return replace(sample, input_ids=torch.from_numpy(np.asarray(sample.input_ids)), pixels=pixels)


class _Groups:
    """Ranges of positions from `start` on: consecutive questions about the same images, at most `_MAX_GROUP`."""

    def __init__(self, questions: Sequence[Any], start: int, stop: int, largest: int = _MAX_GROUP) -> None:
        self.questions, self.start, self.stop, self.largest = questions, start, stop, largest

    def __iter__(self) -> Iterator[range]:
        begin, images = self.start, ()
        for position in range(self.start, self.stop):
            current = self.questions[position].images
            if position > begin and (not current or current != images or position - begin >= self.largest):
                yield range(begin, position)
                begin = position
            images = current
        if begin < self.stop:
            yield range(begin, self.stop)


def _identity(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    # Ctrl-C goes to the whole process group; the main process ends the workers when it has written what it has.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class WorkerDied(Exception):
    """A worker process ended before its work did."""


class _Workers:
    def __init__(self, answerer: Any, questions: Sequence[Any], num_workers: int, ahead: int) -> None:
        self.samples = _Samples(answerer, questions)
        self.questions, self.num_workers = questions, num_workers
        self.prefetch = max(2, -(-ahead // num_workers))

    def stream(self) -> Iterator[tuple[Any, Any]]:
        position, total = 0, len(self.questions)
        while position < total:
            try:
                for item in self._load(position, total, self.num_workers):
                    yield item
                    position += 1
            except WorkerDied:
                # Which sample was it? All that were under way are tried one by one.
                for _ in range(min(self.num_workers * self.prefetch * _MAX_GROUP, total - position)):
                    try:
                        (item,) = self._load(position, position + 1, 1)
                    except WorkerDied as error:
                        question = self.questions[position]
                        name = f"image {', '.join(question.images)}" if question.images else "the question"
                        item = question, SampleError(f"{name} ended the process that prepared it ({error})")
                        yield item
                        position += 1
                        break  # found: the others go on in parallel
                    yield item
                    position += 1

    def _load(self, start: int, stop: int, workers: int) -> Iterator[tuple[Any, Any]]:
        loader = DataLoader(
            self.samples,
            batch_size=None,  # a group of questions at a time; the batches are the batcher's
            sampler=_Groups(self.questions, start, stop),
            num_workers=workers,
            collate_fn=_identity,
            prefetch_factor=self.prefetch,
            worker_init_fn=_start_worker,
            multiprocessing_context=_START_METHOD,
        )
        handler = signal.getsignal(signal.SIGCHLD)
        groups = iter(loader)
        # torch's handler raises in whatever the main thread is doing when a worker dies, which could be the middle of a
        # batch. The queue notices as well, where it can be handled.
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        except ValueError:  # not in the main thread: torch has set none either
            pass
        try:
            while True:
                try:
                    group = next(groups, None)
                except RuntimeError as error:
                    if "DataLoader worker" not in str(error):
                        raise
                    raise WorkerDied(_short(error)) from None
                if group is None:
                    return
                for question, sample in group:
                    yield question, _unpack(sample)
        finally:
            del groups  # ends the workers


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
