"""What an answerer asks of a model, and how LLaVA answers it.

An adapter puts a loaded model behind one surface: prompt ids, pixels, inputs of the decoder, generated texts. The
`Answerer`, its batches and the answer files above it are the same for every model. `LlavaAdapter` is this package's own
model; a family of transformers is another class with these methods, chosen in `answering.loading`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from llava import compat
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import build_prompt
from llava.eval.answering.places import llava_rasters
from llava.eval.answering.rasters import Raster
from llava.eval.common.arguments import GenerationOptions
from llava.eval.common.questions import Question
from llava.mm_utils import ImageTooLarge, process_images, tokenizer_image_token
from llava.utils import UserError


class SampleError(Exception):
    """One sample cannot be answered (its image is missing or damaged); the others can."""


@dataclass(frozen=True)
class Sample:
    """A question ready for the model: prompt ids `[T]` and, for each of its images, pixels and size (w, h).

    pixels: what `Adapter.pixels` made of the images. prompt: the text that the ids spell.
    """

    question: Question
    input_ids: Tensor
    pixels: tuple[Any, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    prompt: str = ""


@dataclass(frozen=True)
class Encoded:
    """A batch as the decoder gets it (opaque: its adapter's), and the seconds that encoding took."""

    samples: tuple[Sample, ...]
    inputs: Any
    seconds: float


@dataclass(frozen=True)
class Answered:
    """An answer, the trace of its pruning and its share of the time of its batch, in seconds: in all, of the vision
    tower with prompt assembly, and of the decoder's prefill.

    failed: why the text is worthless (the model's numbers were not finite), None for an answer. rasters: says where the
    visual tokens lie in the pictures (None: not known), as long as the method is attached.
    """

    question: Question
    text: str
    trace: Any
    prefill_seconds: float
    seconds: float
    encode_seconds: float = 0.0
    failed: str | None = None
    rasters: Callable[[], Sequence[Raster] | None] = lambda: None


class Adapter(Protocol):
    """A loaded model as an answerer sees it. `model` is what a method's `attach` takes."""

    model: Any
    family: str | None  # of `llava.families`, for metadata; None for this package's own model

    def prompt(self, text: str, images: int) -> str:
        """A question in the model's template, with a place for each image; raises `SampleError`."""

    def prompt_ids(self, prompt: str) -> Tensor:
        """Its ids `[T]`."""

    def pixels(self, image: Image.Image) -> Any:
        """An RGB image as `encode` takes it: a tensor on the CPU, or the image itself; raises `SampleError`."""

    def encode(self, samples: Sequence[Sample], with_cls_attention: bool) -> Encoded:
        """What comes before the decoder; the result can be answered under several methods. Raises `SampleError`."""

    def generate(self, encoded: Encoded, run: Any, generation: GenerationOptions) -> list[Answered]:
        """Answers an encoded batch; `run` is what a method's `attach` returned for this model."""

    def most_visual_tokens(self) -> int | None:
        """The most visual tokens that one image can have; None where that depends on the image."""

    def first_not_finite(self, samples: Sequence[Sample], with_cls_attention: bool) -> str | None:
        """Where the first number that is not finite appears in a dense forward; None if all are finite."""

    def arrangement(self) -> str | None:
        """How the crops of a tiled picture are put together, for metadata; None where there are none."""


class LlavaAdapter:
    """This package's LLaVA. masks_padding: the CLS attention of patches that only pad a picture counts as 0."""

    family: str | None = None

    def __init__(
        self, tokenizer: Any, model: Any, image_processor: Any, conv_mode: str = "vicuna_v1", masks_padding: bool = True
    ) -> None:
        self.tokenizer, self.model, self.image_processor = tokenizer, model, image_processor
        self.conv_mode, self.masks_padding = conv_mode, masks_padding

    def prompt(self, text: str, images: int) -> str:
        start_end = getattr(self.model.config, "mm_use_im_start_end", False)
        try:
            return build_prompt(text, images, self.conv_mode, start_end)
        except UserError as error:
            raise SampleError(str(error)) from None

    def prompt_ids(self, prompt: str) -> Tensor:
        ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        assert isinstance(ids, Tensor)
        return ids

    def pixels(self, image: Image.Image) -> Tensor:
        try:
            pixels = process_images([image], self.image_processor, self.model.config)[0]
        except ImageTooLarge as error:
            raise SampleError(str(error)) from None
        return pixels.to(self.model.dtype)

    def encode(self, samples: Sequence[Sample], with_cls_attention: bool) -> Encoded:
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

    def generate(self, encoded: Encoded, run: Any, generation: GenerationOptions) -> list[Answered]:
        first, count = encoded.samples[0].question, len(encoded.samples)
        inputs = encoded.inputs
        if generation.samples:
            # Seeded by position, so that a resumed run draws what an uninterrupted one draws.
            torch.manual_seed(generation.seed + first.index)
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
                **generation.generate_kwargs,
            )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        seconds = (encoded.seconds + time.perf_counter() - started) / count
        prefill = sum(run.prefill_seconds) / count
        failed = ["logits that are not finite" if bad else None for bad in watch.bad()]
        return [
            Answered(
                *(sample.question, text.strip(), trace, prefill, seconds, encoded.seconds / count, failure),
                rasters=partial(self.rasters, sample, trace),
            )
            for sample, text, trace, failure in zip(encoded.samples, texts, run.traces, failed, strict=True)
        ]

    def rasters(self, sample: Sample, trace: Any) -> list[Raster] | None:
        """Where the visual tokens of a prompt lie in its pictures; asked under the method that made the trace."""
        crops = [len(pixels) if pixels.ndim == 4 else 1 for pixels in sample.pixels]
        return llava_rasters(self.model, self.image_processor, sample.image_sizes, crops, trace.visual_tokens)

    def most_visual_tokens(self) -> int | None:
        return max_visual_tokens(self.model)

    def first_not_finite(self, samples: Sequence[Sample], with_cls_attention: bool) -> str | None:
        inputs = self.encode(samples, with_cls_attention).inputs
        return where_not_finite(self.model, inputs.inputs_embeds, inputs.attention_mask)

    def arrangement(self) -> str | None:
        return self.model.merge_type()

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def max_visual_tokens(model: Any) -> int:
    """The most visual tokens one image can have in this model: its patches, times the views if tiled."""
    if model.image_adapter is not None:
        return int(model.image_adapter.tokens)
    patches = model.get_vision_tower().num_patches
    config = model.config
    if getattr(config, "image_aspect_ratio", None) != "anyres":
        return patches
    from llava.mm_utils import parse_grid_pinpoints

    side = model.get_vision_tower().config.image_size
    grids = parse_grid_pinpoints(config.image_grid_pinpoints)
    return patches * (1 + max((w // side) * (h // side) for w, h in grids))


def left_pad(rows: Sequence[torch.Tensor], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[B, T]` with padding on the left and the attention mask (1: a token of the prompt)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


class FiniteWatch(LogitsProcessor):
    """Remembers which samples of a batch ever got NaN or infinite logits, and replaces those by zeros.

    Replaced, because sampling from NaN stops a GPU for good. Minus infinity alone is no fault: it is how processors of
    the checkpoint's generation settings forbid tokens.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~torch.isfinite(scores.amax(dim=-1))  # NaN and +inf survive amax, -inf only if there is nothing else
        by_sample = bad.view(self.samples, -1).any(dim=1)  # beams of a sample are neighbors
        self._bad = by_sample if self._bad is None else self._bad | by_sample
        return scores.masked_fill(bad[:, None], 0.0)

    def bad(self) -> list[bool]:
        """Per sample, whether its logits were not finite; waits for the device."""
        return [False] * self.samples if self._bad is None else self._bad.tolist()


def where_not_finite(model: Any, inputs_embeds: Tensor, attention_mask: Tensor | None) -> str | None:
    """Where the first number that is not finite appears in a dense forward of a prompt; None if all are finite."""
    if not torch.isfinite(inputs_embeds).all():
        return "the embeddings of the prompt or the image"
    decoder: Any = compat.find_decoder(model)
    found: list[str] = []

    def check(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not found and not torch.isfinite(hidden).all():
                found.append(f"decoder layer {index}")

        return hook

    hooks = [layer.register_forward_hook(check(index)) for index, layer in enumerate(decoder.layers)]
    # The pruned forward, if one is attached, is what failed: look at the stock one.
    attached = decoder.__dict__.pop("forward", None)
    try:
        with torch.inference_mode():
            decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
    finally:
        if attached is not None:
            decoder.forward = attached
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when the device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
