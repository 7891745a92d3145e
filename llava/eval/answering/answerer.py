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

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import build_prompt, conv_templates
from llava.eval.answering.batching import Batcher, BatchSize, is_out_of_memory
from llava.eval.answering.images import SampleError, decode_image, image_path, open_image
from llava.eval.answering.numerics import FiniteWatch
from llava.eval.answering.workers import prepared
from llava.eval.common.arguments import MAX_IMAGE_PIXELS, GenerationOptions
from llava.eval.common.questions import Question
from llava.mm_utils import ImageTooLarge, process_images, tokenizer_image_token
from llava.utils import UserError

__all__ = [
    "Answered",
    "Answerer",
    "Sample",
    "SampleError",
    "answer_questions",
    "build_prompt",
    "decode_image",
    "open_image",
]


@dataclass(frozen=True)
class Sample:
    """A question ready for the model: prompt ids `[T]` and, for each of its images, pixels and size (w, h)."""

    question: Question
    input_ids: torch.Tensor
    pixels: tuple[torch.Tensor, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()


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


def question_problem(question: Question, text: str, conv_mode: str, image_folder: Path | None) -> str | None:
    """Why the question cannot be asked, as far as that shows before an image is opened; None if it can.

    text: what the model is asked, without template. image_folder: None if the images are no files.
    """
    if question.problem is not None:
        return question.problem
    try:
        build_prompt(text, len(question.images), conv_mode)
        if image_folder is not None:
            for name in question.images:
                image_path(image_folder, name)
    except (UserError, SampleError) as error:
        return str(error)
    return None


@dataclass
class Answerer:
    """A loaded model with all that turns questions into answers.

    image_cache: processed images kept for following questions about the same image. max_image_pixels: larger images
    are refused unread. masks_padding: the CLS attention of patches that only pad a picture to a square counts as 0.
    """

    tokenizer: Any
    model: Any
    image_processor: Any
    image_folder: Path
    conv_mode: str = "vicuna_v1"
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    image_cache: int = 8
    max_image_pixels: int = MAX_IMAGE_PIXELS
    masks_padding: bool = True
    _cache: OrderedDict[str, tuple[torch.Tensor, tuple[int, int]]] = field(default_factory=OrderedDict)

    def prepare(self, question: Question) -> Sample:
        """Tokenizes the prompt and loads the images; raises `SampleError` if that fails."""
        if question.problem is not None:
            raise SampleError(question.problem)
        try:
            images = [self._pixels(name) for name in question.images]
            ids = self.prompt_ids(question)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise SampleError("out of memory while the question was prepared") from None
        # Questions that follow one another are often about the same images.
        while len(self._cache) > max(self.image_cache, 2 * len(question.images), 1):
            self._cache.popitem(last=False)
        return Sample(question, ids, tuple(pixels for pixels, _ in images), tuple(size for _, size in images))

    def prompt_ids(self, question: Question) -> torch.Tensor:
        """Ids `[T]` of the question's prompt, with a placeholder for each image; raises `SampleError`."""
        start_end = getattr(self.model.config, "mm_use_im_start_end", False)
        try:
            prompt = build_prompt(question.text, len(question.images), self.conv_mode, start_end)
        except UserError as error:
            raise SampleError(str(error)) from None
        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

    def _pixels(self, name: str) -> tuple[torch.Tensor, tuple[int, int]]:
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        image = self.load_image(name)
        try:
            pixels = process_images([image], self.image_processor, self.model.config)[0]
        except ImageTooLarge as error:
            raise SampleError(f"image {name}: {error}") from None
        self._cache[name] = (pixels.to(self.model.dtype), image.size)
        return self._cache[name]

    def forget_images(self) -> None:
        """Empties the cache of processed images; for measurements."""
        self._cache.clear()

    def encode(self, samples: Sequence[Sample], with_cls_attention: bool) -> Encoded:
        """Runs the vision tower and puts prompts together; the result can be answered under several methods."""
        started = time.perf_counter()
        input_ids, mask = left_pad([sample.input_ids for sample in samples], self._pad_id())
        device = self.model.device
        images: Any = [pixels.to(device) for sample in samples for pixels in sample.pixels] or None
        if images is not None and all(image.ndim == 3 for image in images):
            images = torch.stack(images)  # as LLaVA's tools: a list would mean images cut into crops
        with torch.inference_mode():
            inputs = self.model.prepare_multimodal_inputs(
                input_ids,
                images=images,
                image_sizes=[size for sample in samples for size in sample.image_sizes] or None,
                attention_mask=mask,
                image_masks=None if self.masks_padding or images is None else [None] * len(images),
                with_cls_attention=with_cls_attention,
            )
        longest = inputs.max_length
        for sample, length in zip(samples, inputs.lengths, strict=True):
            # One image and its question are cut as LLaVA does; several that do not fit would lose the question.
            if longest is not None and length > longest and len(sample.pixels) > 1:
                raise SampleError(
                    f"{len(sample.pixels)} images and the question are {length} tokens, and this model takes "
                    f"{longest}: show fewer images, or have --visual-token-num leave fewer tokens of each image"
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
