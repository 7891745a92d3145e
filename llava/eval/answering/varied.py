"""An `Answerer` for tools whose prompts or images are not those of a question file.

Knows that a prompt can differ from the text in the answer file, and images in base64; nothing of benchmarks.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image

from llava.eval.answering.answerer import Answerer
from llava.eval.answering.images import decode_image
from llava.eval.common.questions import Question


def _text_of(question: Question) -> str:
    return question.text


@dataclass
class VariedAnswerer(Answerer):
    """prompt_text: what the model is asked for a question, without image placeholder and template; the answer
    file keeps `question.text`. images: name -> base64 of an image file; images that are not in it come from the
    image folder.
    """

    prompt_text: Callable[[Question], str] = _text_of
    images: Mapping[str, str] = field(default_factory=dict)

    def prompt_ids(self, question: Question) -> torch.Tensor:
        return super().prompt_ids(dataclasses.replace(question, text=self.prompt_text(question)))

    def load_image(self, name: str) -> Image.Image:
        if name not in self.images:
            return super().load_image(name)
        return decode_image(lambda: io.BytesIO(base64.b64decode(self.images[name])), f"of row {name}")
