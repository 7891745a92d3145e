"""A conversation with a model of transformers, through its processor's chat template.

Like the one with LLaVA, every turn runs the whole conversation as one prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import with_image_tokens
from llava.eval.answering.chat import Reply, Talk, check_length
from llava.eval.answering.family import FamilyAdapter
from llava.eval.common.arguments import GenerationOptions
from llava.utils import UserError


def message_parts(text: str, images: int) -> list[dict[str, str]]:
    """A message as chat templates take it: its texts, and the images where the text has them, else in front.

    Raises:
        UserError: placeholders were written, but not one per image.
    """
    placed = with_image_tokens(text, images)
    if not any(mark in text for mark in (DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER)):
        return [{"type": "image"}] * images + [{"type": "text", "text": text}]
    pieces = re.split(f"({re.escape(DEFAULT_IMAGE_TOKEN)})", placed)
    return [
        {"type": "image"} if piece == DEFAULT_IMAGE_TOKEN else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]


class FamilyChat(Talk):
    """A conversation with a model of transformers about `images` (RGB, shown with the first question).

    Attributes:
        messages: the turns so far, as chat templates take them.
    """

    roles = ("USER", "ASSISTANT")

    def __init__(self, adapter: FamilyAdapter, images: Sequence[Image.Image], generation: GenerationOptions) -> None:
        self.adapter, self.images, self.generation = adapter, images, generation
        self.model, self.tokenizer = adapter.model, adapter.processor.tokenizer
        self.messages: list[Any] = []
        config = self.model.config
        self._limit = config.get_text_config().max_position_embeddings
        # Texts that the processor would take for the place of an image or a video.
        names = [name for name in ("image_token_id", "video_token_id") if getattr(config, name, None) is not None]
        self._placeholders = self.tokenizer.convert_ids_to_tokens([getattr(config, name) for name in names])
        if generation.samples:
            torch.manual_seed(generation.seed)

    def prompt(self) -> str:
        if not self.messages:
            return ""
        processor = self.adapter.processor
        return processor.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)

    def _turns(self) -> list[Any]:
        return self.messages

    def _begin(self, text: str) -> None:
        parts = message_parts(text, 0 if self.messages else len(self.images))
        for token in self._placeholders:
            if any(token in part.get("text", "") for part in parts):
                raise UserError(f"the text holds {token}, this model's own mark; an image is {IMAGE_PLACEHOLDER}")
        self.messages.append({"role": "user", "content": parts})

    def _settle(self, answer: str) -> None:
        # A placeholder that the model itself wrote is the place of no image.
        for token in self._placeholders:
            answer = answer.replace(token, IMAGE_PLACEHOLDER)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})

    def _generate(self, run: Any, streamer: Any) -> Reply:
        values = self.adapter.inputs([self.prompt()], [list(self.images)])
        length = values["input_ids"].shape[1]
        check_length(length, self._limit)
        run.traces.clear()
        with torch.inference_mode():
            output = self.model.generate(
                **values, pad_token_id=self.adapter.pad_id, streamer=streamer, **self.generation.generate_kwargs
            )
        text = self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)[0]
        return Reply(text.strip(), run.traces[-1])
