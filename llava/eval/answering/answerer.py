"""Samples from questions: prompts and images, read and cached; the model itself is behind an `Adapter`.

Nobody has checked the images of question files. What cannot be read costs one sample and is reported with its name. An
image name may come from anywhere, so it may not climb out of the image folder (`..`, absolute paths). What lies in the
folder is the user's own arrangement: symbolic links in it are followed, also out of it, as caches and data sets on
other disks need it. The content decides about the format, not the extension.
"""

from __future__ import annotations

import base64
import io
import os
import stat
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image

from llava.conversation import build_prompt, conv_templates
from llava.eval.answering.adapter import Adapter, Answered, Encoded, Sample, SampleError, is_out_of_memory
from llava.eval.common.arguments import MAX_IMAGE_PIXELS, GenerationOptions
from llava.eval.common.questions import Question
from llava.mm_utils import to_rgb
from llava.utils import UserError


@dataclass
class Answerer:
    """A loaded model with all that turns questions into answers.

    image_cache: processed images kept for following questions about the same image. max_image_pixels: larger images
    are refused unread. prompt_text: what the model is asked for a question, without image placeholder and template,
    where that is not the question's text; the answer file keeps `question.text`. images: name -> base64 of an image
    file; images that are not in it come from the image folder.
    """

    adapter: Adapter
    image_folder: Path
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    image_cache: int = 8
    max_image_pixels: int = MAX_IMAGE_PIXELS
    prompt_text: Callable[[Question], str] | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    _cache: OrderedDict[str, tuple[Any, tuple[int, int]]] = field(default_factory=OrderedDict)

    @property
    def model(self) -> Any:
        """What a method's `attach` takes."""
        return self.adapter.model

    def prepare(self, question: Question) -> Sample:
        """Tokenizes the prompt and loads the images; raises `SampleError` if that fails."""
        if question.problem is not None:
            raise SampleError(question.problem)
        try:
            images = [self._pixels(name) for name in question.images]
            prompt = self.prompt(question)
            ids = self.adapter.prompt_ids(prompt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise SampleError("out of memory while the question was prepared") from None
        # Questions that follow one another are often about the same images.
        while len(self._cache) > max(self.image_cache, 2 * len(question.images), 1):
            self._cache.popitem(last=False)
        return Sample(question, ids, tuple(pixels for pixels, _ in images), tuple(size for _, size in images), prompt)

    def try_prepare(self, question: Question) -> Sample | SampleError:
        """The sample, or why there is none."""
        try:
            return self.prepare(question)
        except SampleError as error:
            return error

    def prompt(self, question: Question) -> str:
        """The question in the model's template, with a placeholder for each image; raises `SampleError`."""
        text = question.text if self.prompt_text is None else self.prompt_text(question)
        return self.adapter.prompt(text, len(question.images))

    def prompt_ids(self, question: Question) -> torch.Tensor:
        """Ids `[T]` of the question's prompt; raises `SampleError`."""
        return self.adapter.prompt_ids(self.prompt(question))

    def _pixels(self, name: str) -> tuple[Any, tuple[int, int]]:
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        image = self.load_image(name)
        try:
            self._cache[name] = self.adapter.pixels(image), image.size
        except SampleError as error:
            raise SampleError(f"image {name}: {error}") from None
        return self._cache[name]

    def load_image(self, name: str) -> Image.Image:
        """The image of that name, RGB. Raises `SampleError`."""
        if name in self.images:
            return decode_image(lambda: io.BytesIO(base64.b64decode(self.images[name])), f"of row {name}")
        return open_image(self.image_folder, name, self.max_image_pixels)

    def forget_images(self) -> None:
        """Empties the cache of processed images; for measurements."""
        self._cache.clear()

    def encode(self, samples: Sequence[Sample], with_cls_attention: bool) -> Encoded:
        """See `Adapter.encode`."""
        return self.adapter.encode(samples, with_cls_attention)

    def generate(self, encoded: Encoded, run: Any) -> list[Answered]:
        """See `Adapter.generate`."""
        return self.adapter.generate(encoded, run, self.generation)

    def answer(self, samples: Sequence[Sample], run: Any) -> list[Answered]:
        """Encodes and answers one batch."""
        return self.generate(self.encode(samples, run.needs_cls_attention), run)


def check_conv_mode(name: str) -> None:
    """Raises `UserError` for an unknown conversation template."""
    if name not in conv_templates:
        raise UserError(f"--conv-mode: unknown template {name!r}; known: {', '.join(sorted(conv_templates))}")


def question_problem(
    question: Question, prompt_text: Callable[[Question], str] | None, conv_mode: str, image_folder: Path | None
) -> str | None:
    """Why the question cannot be asked, as far as that shows before an image is opened; None if it can.

    prompt_text: see `Answerer`. image_folder: None if the images are no files.
    """
    if question.problem is not None:
        return question.problem
    try:
        text = question.text if prompt_text is None else prompt_text(question)
        build_prompt(text, len(question.images), conv_mode)
        if image_folder is not None:
            for name in question.images:
                image_path(image_folder, name)
    except (UserError, SampleError) as error:
        return str(error)
    return None


def decode_image(open_source: Callable[[], Any], name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes an image fully, as RGB; raises `SampleError` with `name` and the reason.

    open_source: gives what PIL can open (a path, a stream); what it raises is a reason too. max_pixels: images with
    more are refused before they are decoded.
    """
    previous = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, palettes, bombs: what matters is an error
            Image.MAX_IMAGE_PIXELS = None  # PIL refuses only twice its limit, and without naming an option
            with Image.open(open_source()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ValueError(f"{width} x {height} pixels are more than --max-image-pixels {max_pixels}")
                if width < 1 or height < 1:
                    raise ValueError("no pixels")
                image.load()
                return to_rgb(image)
    except Exception as error:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, MemoryError):
            reason = "out of memory"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise SampleError(f"image {name} cannot be read ({reason})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = previous


def image_path(folder: Path, name: str) -> Path:
    """Where the image `name` lies; raises `SampleError` if it is no name or leads out of `folder`."""
    if "\0" in name:
        raise SampleError(f"image path {name!r} holds a null character")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or os.path.isabs(name):
        raise SampleError(f"image path {name!r} leaves the image folder")
    return folder / name


def open_image(folder: Path, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The image file `name` below `folder`, as RGB; raises `SampleError` with the reason."""
    path = image_path(folder, name)

    def existing() -> Path:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("a folder, not a file")
        if not stat.S_ISREG(mode):  # a pipe would block
            raise ValueError("not a regular file")
        return path

    return decode_image(existing, str(path), max_pixels)
