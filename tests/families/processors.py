"""Real processors of transformers for the tiny models, built of parts on disk: a tokenizer of whole words, an image
processor on Pillow. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.families.models import END, FAMILIES, IMAGE, NEWLINE, PAD, START, VIDEO, VOCABULARY

WORDS = "what is shown here how many red blue shapes are there say yes or no user assistant : ? . and".split()
_LLAVA = {"image_token": "<image>", "video_token": "<video>"}
_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def tokenizer(folder: Path, tokens: dict[str, str]) -> Any:
    """A tokenizer of whole words whose special tokens have the ids that the tiny models expect."""
    words = {word: 3 + number for number, word in enumerate(WORDS)}
    words |= {"<pad>": PAD, "<s>": 1, "<unk>": 2}
    ids = {
        "image_token": IMAGE, "context_image_token": IMAGE, "video_token": VIDEO, "vision_start_token": START,
        "start_image_token": START, "vision_end_token": END, "end_image_token": END, "fake_image_token": NEWLINE,
        "global_image_token": START, "end_of_utterance_token": END,
    }  # fmt: skip
    words |= {text: ids[name] for name, text in tokens.items()}
    words |= {f"<row_{r}_col_{c}>": 60 + 4 * r + c for r in (1, 2) for c in (1, 2)}
    assert max(words.values()) < VOCABULARY and len(set(words.values())) == len(words)
    whole = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [*tokens.values(), *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))]
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=special, extra_special_tokens=tokens,
    )  # fmt: skip
    made.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def processor(name: str, folder: Path) -> Any:
    """The family's processor; of parts that were written to ``folder`` and read again."""
    square = {"height": 24, "width": 24}
    if name == "llava":
        parts = transformers.LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size=square)
        own, extra = _LLAVA, {"patch_size": 4, "vision_feature_select_strategy": "default"}
        extra["num_additional_image_tokens"] = 1
        kind = transformers.LlavaProcessor
    elif name == "llava_next":
        pinpoints = FAMILIES[name].build().image_grid_pinpoints
        parts = transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size=square, image_grid_pinpoints=pinpoints
        )
        own, extra = _LLAVA, {"patch_size": 4, "vision_feature_select_strategy": "default"}
        extra["num_additional_image_tokens"] = 1
        kind = transformers.LlavaNextProcessor
    elif name == "llava_onevision":
        pinpoints = FAMILIES[name].build().image_grid_pinpoints
        parts = transformers.LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints)
        own, extra = _LLAVA, {"num_image_tokens": 36, "vision_feature_select_strategy": "full"}
        extra["vision_aspect_ratio"] = "anyres_max_2"
        kind = transformers.LlavaOnevisionProcessor
    elif name == "internvl":
        parts = transformers.GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=4)
        own, extra, kind = _INTERN, {"image_seq_length": 9}, transformers.InternVLProcessor
    elif name in ("idefics3", "smolvlm"):
        title = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[name]
        if name == "smolvlm":
            pytest.importorskip("num2words", reason="SmolVLM's processor needs it")
        parts = getattr(transformers, f"{title}ImageProcessorPil")(
            size={"longest_edge": 48}, max_image_size={"longest_edge": 24}
        )
        own, extra, kind = _IDEFICS, {"image_seq_len": 9}, getattr(transformers, f"{title}Processor")
    else:
        parts = transformers.Qwen2VLImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=16 * 16, max_pixels=48 * 48
        )
        title = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name]
        own, extra, kind = _QWEN, {}, getattr(transformers, f"{title}Processor")
    parts.save_pretrained(folder)
    parts = type(parts).from_pretrained(folder)

    class Images(kind):
        """Without its part for videos, which needs torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    if name in ("llava", "llava_next", "idefics3"):
        return kind(image_processor=parts, tokenizer=tokenizer(folder, own), **extra)
    made = Images(image_processor=parts, tokenizer=tokenizer(folder, own), video_processor=None, **extra)
    if name == "smolvlm":  # asks for these with every prompt, also without a film
        made.video_processor = SimpleNamespace(num_frames=4, fps=1)
    return made


def save(made: Any, folder: Path) -> None:
    """What a published checkpoint has of its processor; the part for videos cannot be made without torchvision."""
    kind = next(kind for kind in type(made).__mro__ if kind.__module__.startswith("transformers"))
    made.image_processor.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(made.chat_template)
    names = inspect.signature(kind.__init__).parameters.keys() - {"image_processor", "tokenizer", "video_processor"}
    fields = {name: getattr(made, name) for name in names if isinstance(getattr(made, name, None), (int, str))}
    fields.pop("chat_template")
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind.__name__, **fields}))


def placeholder(name: str) -> str:
    """What stands for an image in a prompt's text."""
    if name.startswith("qwen"):
        return "<|vision_start|><|image_pad|><|vision_end|>"
    return "<IMG_CONTEXT>" if name == "internvl" else "<image>"


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Noise, so that patches differ."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def chat_template(name: str) -> str:
    """A template that puts images where the conversation has them."""
    return (
        "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + placeholder(name) + " {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %} {% endfor %}assistant :"
    )


def inputs_of(made: Any, name: str, questions: list[str], images: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
    """Model inputs of several prompts, each with its images in front of its question."""
    texts = [
        f"user : {' '.join([placeholder(name)] * len(own))} {question} assistant :"
        for question, own in zip(questions, images, strict=True)
    ]
    nested = name in ("idefics3", "smolvlm", "llava_onevision", "llava_next", "llava", "internvl")
    flat = [image for own in images for image in own]
    return dict(made(text=texts, images=images if nested else flat, return_tensors="pt", padding=True))
