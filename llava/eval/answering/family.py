"""Answering with a model of transformers: a folder of any family of `llava.families`.

Prompts go through the processor's chat template, images through its image processor; the family's reader finds the
visual tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from llava.eval.answering.adapter import Answered, Encoded, FiniteWatch, Sample, where_not_finite
from llava.eval.answering.metadata import default_dtype
from llava.eval.answering.places import family_rasters
from llava.eval.answering.rasters import Raster, numbered
from llava.eval.common.arguments import GenerationOptions
from llava.families import list_families
from llava.utils import UserError

# llava-hf's layout of these is read by the package's own loader.
_OWN = ("llava", "llava_next")


def family_folder(model_path: str) -> str | None:
    """The family of a local checkpoint that transformers loads, by `model_type` in its `config.json`; None for LLaVA's
    own, and for what is no folder.
    """
    try:
        kind = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None  # the loader says what is wrong
    return kind if kind in list_families() and kind not in _OWN else None


def load_family(args: argparse.Namespace) -> tuple[Any, Any]:
    """Processor and model for the model flags."""
    import transformers
    from transformers.utils import logging as transformers_logging

    if args.model_base is not None:
        raise UserError("--model-base is for LLaVA checkpoints: a model of transformers is one folder")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device: {args.device!r} is not a device") from None
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # as for LLaVA's own checkpoints
    dtype = default_dtype(str(device)) if args.dtype == "auto" else args.dtype
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if args.attn_implementation is not None:
        kwargs["attn_implementation"] = args.attn_implementation
    try:
        processor = load_processor(args.model_path)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(args.model_path, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--model-path {args.model_path}: transformers cannot load it ({reason})") from None
    processor.tokenizer.padding_side = "left"
    return processor, model.to(device).eval()


def load_processor(folder: str) -> Any:
    """The folder's processor; where its part for videos needs a package that is missing, without that part."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return AutoProcessor.from_pretrained(folder)
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
    kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder))]

    class Images(kind):  # type: ignore[misc,valid-type]
        """The processor of images and text alone."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (ImportError, ValueError):  # not every class is known by its backend
        image_processor = _pillow_class(folder).from_pretrained(folder)
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    own = Path(folder) / "processor_config.json"
    fields = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    plain = {name: value for name, value in fields.items() if not isinstance(value, dict) and name != "processor_class"}
    template = Path(folder) / "chat_template.jinja"
    if template.is_file():
        plain["chat_template"] = template.read_text(encoding="utf-8")
    made = Images(**parts, video_processor=None, **plain)
    made.video_processor = _NoFilms()
    return made


class _NoFilms:
    """Where the part for videos would be. Some processors ask it for its settings with every prompt."""

    num_frames = fps = None
    model_input_names: tuple[str, ...] = ()

    def __call__(self, *films: Any, **options: Any) -> Any:
        raise ImportError("videos need torchvision; install it")


def _pillow_class(folder: str) -> Any:
    """The folder's image processor as it runs on Pillow."""
    import transformers

    values = json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8"))
    name = values.get("image_processor_type", "").removesuffix("Fast").removesuffix("Pil") + "Pil"
    if not hasattr(transformers, name):
        raise ImportError(f"{name} is not known to this transformers; install torchvision")
    return getattr(transformers, name)


class FamilyAdapter:
    """A model of transformers behind its processor. processor: of the model's folder; family: its name."""

    def __init__(self, processor: Any, model: Any, family: str) -> None:
        self.processor, self.model, self.family = processor, model, family
        if getattr(processor, "chat_template", None) is None:
            raise UserError(f"--model-path: the processor of this {family} has no chat template")

    def prompt(self, text: str, images: int) -> str:
        """The question in the chat template, behind its images."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        return self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

    def prompt_ids(self, prompt: str) -> torch.Tensor:
        """Of the text alone: the processor counts the tokens of an image when it sees the batch."""
        return torch.tensor(self.processor.tokenizer(prompt).input_ids)

    def pixels(self, image: Image.Image) -> Image.Image:
        return image

    def most_visual_tokens(self) -> int | None:
        return None

    def arrangement(self) -> str | None:
        return None

    def first_not_finite(self, samples: Sequence[Sample], with_cls_attention: bool) -> str | None:
        values = self.encode(samples, with_cls_attention).inputs
        embeddings = self.model.get_input_embeddings()(values["input_ids"])
        return where_not_finite(self.model, embeddings, values["attention_mask"])

    def encode(self, samples: Sequence[Sample], with_cls_attention: bool) -> Encoded:
        """What the processor makes of a batch, on the model's device; the tower runs in `generate`."""
        started = time.perf_counter()
        values = self.inputs([sample.prompt for sample in samples], [list(sample.pixels) for sample in samples])
        return Encoded(tuple(samples), values, time.perf_counter() - started)

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """What the model takes, on its device, of prompts with their images."""
        given: dict[str, Any] = {"text": list(prompts), "return_tensors": "pt", "padding": True}
        if any(images):
            # Idefics3 counts images by prompt; the others want them in reading order, OneVision by prompt too.
            given["images"] = list(images) if self._nests else [own for own in images if own]
            if not self._nests and self.family != "llava_onevision":
                given["images"] = [image for own in images for image in own]
        values = self.processor(**given).to(self.model.device)
        return {
            name: value.to(self.model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in values.items()
        }

    @property
    def pad_id(self) -> int:
        """What fills rows that are done."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def _nests(self) -> bool:
        return self.family in ("idefics3", "smolvlm")

    def generate(self, encoded: Encoded, run: Any, generation: GenerationOptions) -> list[Answered]:
        """Answers a batch; `run` is what a method's `attach` returned for this model."""
        first, count = encoded.samples[0].question, len(encoded.samples)
        if generation.samples:
            # Seeded by position, so that a resumed run draws what an uninterrupted one draws.
            torch.manual_seed(generation.seed + first.index)
        run.traces.clear()
        run.prefill_seconds.clear()
        run.sample_ids = [sample.question.index for sample in encoded.samples]
        watch = FiniteWatch(count)
        started = time.perf_counter()
        tokenizer, values = self.processor.tokenizer, encoded.inputs
        with torch.inference_mode():
            output = self.model.generate(
                **values,
                pad_token_id=self.pad_id,
                logits_processor=LogitsProcessorList([watch]),
                **generation.generate_kwargs,
            )
        texts = tokenizer.batch_decode(output[:, values["input_ids"].shape[1] :], skip_special_tokens=True)
        seconds = (encoded.seconds + time.perf_counter() - started) / count
        prefill = sum(run.prefill_seconds) / count
        failed = ["logits that are not finite" if bad else None for bad in watch.bad()]
        return [
            Answered(
                *(sample.question, text.strip(), trace, prefill, seconds, encoded.seconds / count, failure),
                rasters=partial(self.rasters, encoded, row, trace),
            )
            for row, (sample, text, trace, failure) in enumerate(
                zip(encoded.samples, texts, run.traces, failed, strict=True)
            )
        ]

    def rasters(self, encoded: Encoded, row: int, trace: Any) -> list[Raster] | None:
        """Where the visual tokens of a prompt of a batch lie in its pictures."""
        sizes = [sample.image_sizes for sample in encoded.samples]
        images = family_rasters(self.family, self.processor, encoded.inputs, sizes)[row]
        return numbered(images, trace.visual_tokens)
