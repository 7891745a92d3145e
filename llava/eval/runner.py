"""The runner behind all question-answering tools: prompts, images, batches, generation.

Knows LLaVA's prompting and the model's `generate`; nothing of command lines, answer files or metrics.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import conv_templates
from llava.eval.arguments import MAX_IMAGE_PIXELS, GenerationOptions
from llava.eval.batching import Batcher, BatchSize
from llava.eval.images import SampleError, decode_image, open_image
from llava.eval.input_pipeline import prepared
from llava.eval.numerics import FiniteWatch
from llava.eval.questions import Question
from llava.mm_utils import process_images, tokenizer_image_token
from llava.utils import UserError

__all__ = ["Answered", "Answerer", "Sample", "SampleError", "answer_questions", "decode_image", "open_image"]


@dataclass(frozen=True)
class Sample:
    """A question ready for the model: prompt ids `[T]`, pixels (None without image) and image size (w, h)."""

    question: Question
    input_ids: torch.Tensor
    pixels: torch.Tensor | None
    image_size: tuple[int, int] | None


@dataclass(frozen=True)
class Encoded:
    """A batch as the decoder gets it: the model's `MultimodalInputs`, and the seconds that encoding took."""

    samples: tuple[Sample, ...]
    inputs: Any
    seconds: float


@dataclass(frozen=True)
class Answered:
    """An answer, the trace of its pruning and its share of the time of its batch, in seconds: in all, of the vision
    tower with prompt assembly, and of the decoder's prefill.

    failed: why the text is worthless (the model's numbers were not finite), None for an answer.
    """

    question: Question
    text: str
    trace: Any
    prefill_seconds: float
    seconds: float
    encode_seconds: float = 0.0
    failed: str | None = None


@dataclass
class Statistics:
    """Running sums over answered samples. Token means are over samples with an image."""

    samples: int = 0
    with_image: int = 0
    nominal: float = 0.0
    processed: float = 0.0
    visual: int = 0
    flops: float = 0.0
    dense_flops: float = 0.0
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, answer: Answered) -> None:
        self.samples += 1
        self.prefill_seconds += answer.prefill_seconds
        self.seconds += answer.seconds
        self.flops += answer.trace.flops()
        self.dense_flops += answer.trace.dense_flops()
        if answer.trace.visual_tokens:
            self.with_image += 1
            self.visual += answer.trace.visual_tokens
            self.nominal += answer.trace.mean_tokens("nominal")
            self.processed += answer.trace.mean_tokens("processed")

    def means(self) -> dict[str, float]:
        """Means per sample: tokens (nominal, processed, visual: before pruning), flops_ratio (0 to 1, decoder
        prefill), prefill_ms, seconds.
        """
        images, samples = max(self.with_image, 1), max(self.samples, 1)
        return {
            "nominal": self.nominal / images,
            "processed": self.processed / images,
            "visual": self.visual / images,
            "flops_ratio": self.flops / self.dense_flops if self.dense_flops else 1.0,
            "prefill_ms": 1000 * self.prefill_seconds / samples,
            "seconds": self.seconds / samples,
        }


def check_conv_mode(name: str) -> None:
    """Raises `UserError` for an unknown conversation template."""
    if name not in conv_templates:
        raise UserError(f"--conv-mode: unknown template {name!r}; known: {', '.join(sorted(conv_templates))}")


def build_prompt(text: str, with_image: bool, conv_mode: str, mm_use_im_start_end: bool = False) -> str:
    """The full prompt of a question: the image placeholder on a line of its own, in the template."""
    if with_image:
        image = DEFAULT_IMAGE_TOKEN
        if mm_use_im_start_end:
            image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
        text = f"{image}\n{text}"
    conversation = conv_templates[conv_mode].copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


@dataclass
class Answerer:
    """A loaded model with all that turns questions into answers.

    image_cache: processed images kept for following questions about the same image. max_image_pixels: larger images
    are refused unread.
    """

    tokenizer: Any
    model: Any
    image_processor: Any
    image_folder: Path
    conv_mode: str = "vicuna_v1"
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    image_cache: int = 8
    max_image_pixels: int = MAX_IMAGE_PIXELS
    _cache: OrderedDict[str, tuple[torch.Tensor, tuple[int, int]]] = field(default_factory=OrderedDict)

    def prepare(self, question: Question) -> Sample:
        """Tokenizes the prompt and loads the image; raises `SampleError` if that fails."""
        pixels, size = self._pixels(question.image) if question.image is not None else (None, None)
        return Sample(question, self.prompt_ids(question), pixels, size)

    def prompt_ids(self, question: Question) -> torch.Tensor:
        """Ids `[T]` of the question's prompt, with a placeholder for the image."""
        start_end = getattr(self.model.config, "mm_use_im_start_end", False)
        prompt = build_prompt(question.text, question.image is not None, self.conv_mode, start_end)
        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

    def _pixels(self, name: str) -> tuple[torch.Tensor, tuple[int, int]]:
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        image = self.load_image(name)
        pixels = process_images([image], self.image_processor, self.model.config)[0]
        self._cache[name] = (pixels.to(self.model.dtype), image.size)
        while len(self._cache) > max(self.image_cache, 1):
            self._cache.popitem(last=False)
        return self._cache[name]

    def forget_images(self) -> None:
        """Empties the cache of processed images; for measurements."""
        self._cache.clear()

    def encode(self, samples: Sequence[Sample], with_cls_attention: bool) -> Encoded:
        """Runs the vision tower and puts prompts together; the result can be answered under several methods."""
        started = time.perf_counter()
        input_ids, mask = left_pad([sample.input_ids for sample in samples], self._pad_id())
        device = self.model.device
        with_image = [sample for sample in samples if sample.pixels is not None]
        images: Any = [sample.pixels.to(device) for sample in with_image] or None
        if images is not None and all(image.ndim == 3 for image in images):
            images = torch.stack(images)  # as LLaVA's tools: a list would mean images cut into crops
        with torch.inference_mode():
            inputs = self.model.prepare_multimodal_inputs(
                input_ids,
                images=images,
                image_sizes=[s.image_size for s in with_image] if with_image else None,
                attention_mask=mask,
                with_cls_attention=with_cls_attention,
            )
        return Encoded(tuple(samples), inputs, time.perf_counter() - started)

    def generate(self, encoded: Encoded, run: Any) -> list[Answered]:
        """Answers an encoded batch; `run` is what a method's `attach` returned for this model."""
        first, count = encoded.samples[0].question, len(encoded.samples)
        inputs = encoded.inputs
        if self.generation.samples:
            # Seeded by position, so that a resumed run draws what an uninterrupted one draws.
            torch.manual_seed(self.generation.seed + first.index)
        run.traces.clear()
        run.prefill_seconds.clear()
        watch = FiniteWatch(count)
        started = time.perf_counter()
        with torch.inference_mode():
            # Methods that draw at random draw by sample: the same in resumed and chunked runs and in any order.
            ids = [sample.question.index for sample in encoded.samples]
            inputs.tell(run, sample_ids=ids)
            output = self.model.generate(
                inputs_embeds=inputs.inputs_embeds,
                attention_mask=inputs.generation_mask(),
                pad_token_id=self._pad_id(),
                logits_processor=LogitsProcessorList([watch]),
                **self.generation.generate_kwargs(),
            )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        seconds = (encoded.seconds + time.perf_counter() - started) / count
        prefill = sum(run.prefill_seconds) / count
        failed = ["logits that are not finite" if bad else None for bad in watch.bad()]
        return [
            Answered(sample.question, text.strip(), trace, prefill, seconds, encoded.seconds / count, failure)
            for sample, text, trace, failure in zip(encoded.samples, texts, run.traces, failed, strict=True)
        ]

    def load_image(self, name: str) -> Image.Image:
        """The image of that name, RGB; for subclasses whose images are not files. Raises `SampleError`."""
        return open_image(self.image_folder, name, self.max_image_pixels)

    def answer(self, samples: Sequence[Sample], run: Any) -> list[Answered]:
        """Encodes and answers one batch."""
        return self.generate(self.encode(samples, run.needs_cls_attention), run)

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def left_pad(rows: Sequence[torch.Tensor], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[B, T]` with padding on the left and the attention mask (1: a token of the prompt)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def answer_questions(
    answerer: Answerer,
    questions: Sequence[Question],
    run: Any,
    batch_size: int | BatchSize = 1,
    on_skip: Callable[[Question, str], None] | None = None,
    on_fail: Callable[[Question, str], None] | None = None,
    num_workers: int = 0,
) -> Iterator[Answered]:
    """Yields answers as they come: in question order for batch size 1, otherwise longer questions of a stretch first.

    A question whose image cannot be read goes to `on_skip(question, reason)` and costs nothing but itself;
    without `on_skip` it is a `UserError`. One whose numbers are not finite goes to `on_fail` likewise.
    num_workers: processes that prepare samples ahead of the model.
    """
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
    batcher = Batcher(answerer, run, size, on_skip, on_fail)
    with contextlib.closing(prepared(answerer, questions, num_workers, size.window)) as stream:
        yield from batcher.answer_all(_readable(stream, on_skip))


def _readable(
    stream: Iterator[tuple[Question, Sample | SampleError]], on_skip: Callable[[Question, str], None] | None
) -> Iterator[Sample]:
    for question, sample in stream:
        if not isinstance(sample, SampleError):
            yield sample
        elif on_skip is None:
            raise UserError(f"{question.source}: {sample}")
        else:
            on_skip(question, str(sample))
