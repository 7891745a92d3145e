"""One conversation about images: questions in, answers and what pruning did out.

Behind `run_llava` (one turn) and `llava.serve.cli` (many).

Every turn runs the whole conversation as one prompt. The cache of the turn before could not be continued: which
visual tokens survive depends on the question, and those that the last question did without are gone from it.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, conv_templates, infer_conv_mode, with_image_tokens
from llava.eval.answering.adapter import SampleError, is_out_of_memory
from llava.eval.answering.answerer import check_conv_mode, decode_image
from llava.eval.common.arguments import GenerationOptions
from llava.eval.common.downloads import fetch
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token
from llava.utils import UserError, visible

URL_SECONDS = 30  # for the whole of a download
URL_BYTES = 100 * 2**20


def load_image(source: str, private_redirects: bool = False) -> Image.Image:
    """The image at a path or http(s) address, as RGB; raises `UserError` with the reason.

    private_redirects: an address may redirect to machines that are not public.
    """
    try:
        return decode_image(lambda: _open(source, private_redirects), source)
    except SampleError as error:
        raise UserError(f"{error}; --image-file takes files and http(s) addresses") from None


def _open(source: str, private_redirects: bool) -> Any:
    if source.lower().startswith(("http://", "https://")):
        return BytesIO(fetch(source, URL_SECONDS, URL_BYTES, private_redirects))
    path = Path(source)
    if not path.is_file():  # also: a pipe, which would block
        raise FileNotFoundError("not a file" if path.exists() else "does not exist")
    return path


def load_images(image_file: str | None, sep: str = ",", private_redirects: bool = False) -> list[Image.Image]:
    """The images of an `--image-file` value: names joined by `sep`, or None. private_redirects: see `load_image`."""
    if image_file is None:
        return []
    if not sep:
        raise UserError("--sep must not be empty")
    names = [name.strip() for name in image_file.split(sep)]
    if not all(names):
        raise UserError(f"--image-file: {image_file!r} has an empty name (names are separated by {sep!r}, see --sep)")
    try:
        return [load_image(name, private_redirects) for name in names]
    except UserError as error:
        if len(names) == 1:
            raise
        raise UserError(
            f"{error}; {image_file!r} was split at {sep!r}: if that is part of a name, give another --sep"
        ) from None


def choose_conv_mode(requested: str | None, model_name: str) -> str:
    """The template to use: the requested one or, without a request, what the model's name says.

    Warns on stderr where the two differ, as LLaVA does, and where the name says nothing.
    """
    inferred = infer_conv_mode(model_name)
    if requested is None:
        if inferred == "llava_v0":
            text = f"[WARNING] the name {model_name!r} tells no version: using the oldest conversation mode, llava_v0; "
            print(visible(text) + "LLaVA-1.5 and later take --conv-mode vicuna_v1", file=sys.stderr)
        return inferred
    check_conv_mode(requested)
    if requested != inferred:
        print(
            f"[WARNING] the conversation mode inferred from the name is {inferred}, but --conv-mode is {requested}: "
            f"using {requested}",
            file=sys.stderr,
        )
    return requested


def token_report(trace: Any) -> str:
    """What pruning did to one prompt, in a line."""
    if not trace.visual_tokens:
        return "no image, nothing pruned"
    return (
        f"{trace.visual_tokens} visual tokens; kept per layer: nominal {trace.mean_tokens('nominal'):.1f}, "
        f"processed {trace.mean_tokens('processed'):.1f}; decoder prefill FLOPs "
        f"{100 * trace.flops() / trace.dense_flops():.1f}% of dense"
    )


def require_unicode(text: str, what: str) -> None:
    """Raises a `UserError` for text with bytes that were not UTF-8 where it was typed: no tokenizer takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{what} holds bytes that are not UTF-8: {text!r}") from None


@contextlib.contextmanager
def _memory_in_words() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: ask something shorter, show fewer images, or start with less (--dtype, --load-4bit)"
        ) from None


@dataclass(frozen=True)
class Reply:
    """The answer of one turn and the trace of its prompt."""

    text: str
    trace: Any


class Talk:
    """Turns of a conversation, whatever the model: what a turn does with them, and that failed ones leave no trace.

    Attributes:
        model: what a method's `attach` takes.
        tokenizer: for what is streamed.
        roles: how the user and the model are called.
    """

    model: Any
    tokenizer: Any
    generation: GenerationOptions
    roles: tuple[str, str]

    def prompt(self) -> str:
        """The conversation so far, as the model gets it."""
        raise NotImplementedError

    def ask(self, text: str, run: Any, streamer: Any = None) -> Reply:
        """Adds a question and its answer to the conversation.

        A turn that fails, is interrupted or has an empty answer leaves the conversation as it was.

        Args:
            text: the question.
            run: what the pruning method's `attach` returned for this model.
            streamer: gets the tokens of the answer as they come.

        Raises:
            UserError: misplaced image placeholders, text that is not valid Unicode, or the conversation no longer fits
                the model or the memory.
        """
        require_unicode(text, "the question")
        turns = self._turns()
        before = len(turns)
        answer = ""
        try:
            self._begin(text)
            with _memory_in_words():
                reply = self._generate(run, streamer)
            answer = reply.text
        finally:
            if answer:
                self._settle(answer)
            else:
                del turns[before:]
        return reply

    def _turns(self) -> list[Any]:
        """The turns so far."""
        raise NotImplementedError

    def _begin(self, text: str) -> None:
        """Adds a question to the turns."""
        raise NotImplementedError

    def _settle(self, answer: str) -> None:
        """Adds the answer to it."""
        raise NotImplementedError

    def _generate(self, run: Any, streamer: Any) -> Reply:
        raise NotImplementedError


def check_length(tokens: int, limit: float) -> None:
    """Raises `UserError` if a conversation of so many tokens leaves the model no room for an answer."""
    if tokens >= limit:
        raise UserError(
            f"the conversation has {tokens} tokens or more, and this model takes {limit} with the answer: "
            "ask something shorter, show fewer images or start again"
        )


@dataclass
class Chat(Talk):
    """A conversation with a loaded LLaVA about `images` (RGB, shown with the first question).

    Attributes:
        conversation: the turns so far.
    """

    tokenizer: Any
    model: Any
    image_processor: Any
    images: Sequence[Image.Image]
    conv_mode: str
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def __post_init__(self) -> None:
        self.conversation: Conversation = conv_templates[self.conv_mode].copy()
        config = self.model.config
        # Not the loader's context_len: that is LLaVA's nominal 2048 also where one image of LLaVA-1.6 has 2880 tokens.
        cut = getattr(config, "tokenizer_model_max_length", None)
        self._limit = min(cut or math.inf, config.text_config.max_position_embeddings)
        # How many tokens more than ids a prompt has, known after the first turn: the image's.
        self._image_tokens = 0
        self._pixels = None
        if self.images:
            with _memory_in_words():
                pixels = process_images(self.images, self.image_processor, self.model.config)
                self._pixels = [image.to(self.model.device, self.model.dtype) for image in pixels]
        if self.generation.samples:
            torch.manual_seed(self.generation.seed)

    @property
    def stop(self) -> str | None:
        """What ends a turn in templates that do not end it with the end-of-sequence token."""
        styles = (SeparatorStyle.SINGLE, SeparatorStyle.MPT)
        return self.conversation.sep if self.conversation.sep_style in styles else None

    @property
    def roles(self) -> tuple[str, str]:  # type: ignore[override]
        user, assistant = self.conversation.roles[:2]
        return user, assistant

    def prompt(self) -> str:
        return self.conversation.get_prompt()

    def _turns(self) -> list[Any]:
        turns: Any = self.conversation.messages  # a list in a copy of a template
        return turns

    def _begin(self, text: str) -> None:
        first = len(self._turns()) == self.conversation.offset
        start_end = getattr(self.model.config, "mm_use_im_start_end", False)
        message = with_image_tokens(text, len(self.images) if first else 0, start_end)
        self.conversation.append_message(self.conversation.roles[0], message)
        self.conversation.append_message(self.conversation.roles[1], None)

    def _settle(self, answer: str) -> None:
        # A placeholder that the model itself wrote is the place of no image.
        self._turns()[-1][1] = answer.replace(DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER)

    def _generate(self, run: Any, streamer: Any) -> Reply:
        ids: Any = tokenizer_image_token(self.prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        check_length(len(ids) + self._image_tokens, self._limit)
        options = dict(self.generation.generate_kwargs)
        if self.stop is not None:
            options["stopping_criteria"] = [KeywordsStoppingCriteria([self.stop], self.tokenizer, ids[None])]
        run.traces.clear()
        with torch.inference_mode():
            output = self.model.generate(
                ids[None].to(self.model.device),
                images=self._pixels,
                image_sizes=[image.size for image in self.images] or None,
                streamer=streamer,
                **options,
            )
        trace = run.traces[-1]
        tokens = trace.text_tokens + trace.visual_tokens
        # Of a first prompt that is too long the model has cut the end, the question, and answered what was left.
        check_length(tokens, self._limit)
        self._image_tokens = tokens - len(ids)
        text = self.tokenizer.batch_decode(output, skip_special_tokens=True)[0]
        if self.stop is not None:
            text = text.split(self.stop)[0]
        return Reply(text.strip(), trace)
