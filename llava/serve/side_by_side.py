"""One question about one picture, answered dense and pruned, one after the other: the work behind the web demo.

Knows the model, not the page. Nothing is written to disk.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import TextIteratorStreamer

from llava import compat
from llava.eval.answering.adapter import Sample, SampleError
from llava.eval.answering.answerer import decode_image
from llava.eval.answering.chat import Chat, choose_conv_mode
from llava.eval.answering.family import family_folder
from llava.eval.answering.family_chat import FamilyChat
from llava.eval.answering.loading import load_adapter
from llava.eval.answering.rasters import as_json
from llava.eval.common.arguments import GenerationOptions, check_budget, find_method, parse_method_args, with_options
from llava.eval.common.budgets import parse_budgets
from llava.eval.common.questions import Question
from llava.eval.reports.look.traces import Looked, read_line
from llava.mm_utils import get_model_name_from_path
from llava.utils import UserError, describe_error, is_user_error

LONGEST_QUESTION = 4000
_WARMUP = Image.new("RGB", (64, 64), "gray")
_END_SECONDS = 600  # without a new piece of text an answer counts as lost


@dataclass
class Half:
    """One of the two answers, as far as it has come. seconds: to the first piece of text, and in all."""

    method: str
    text: str = ""
    done: bool = False
    first: float | None = None
    seconds: float | None = None
    prefill: float | None = None
    looked: Looked | None = None
    costs: dict[str, float] = field(default_factory=dict)


class _Streamer(TextIteratorStreamer):
    """Knows when the first text came, by the clock of the thread that makes it."""

    first: float | None = None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text and self.first is None:
            self.first = time.perf_counter()
        super().on_finalized_text(text, stream_end)


class SideBySide:
    """A loaded model that answers dense and pruned; one question at a time, whoever asks.

    Args:
        args: the tools' flags for the model and the generation.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.generation = GenerationOptions.from_args(args)
        self.max_image_pixels = args.max_image_pixels
        self.name = get_model_name_from_path(args.model_path)
        own = family_folder(args.model_path) is None
        self.conv_mode = choose_conv_mode(args.conv_mode, self.name) if own else ""
        self.adapter = load_adapter(args, self.conv_mode)
        self._turn = threading.Lock()

    def warm_up(self, method: Any) -> None:
        """First passes pay for what libraries set up; nobody should read their times."""
        for _ in self.answer(_WARMUP, "What is this?", method):
            pass

    @property
    def layers(self) -> int:
        """Of the decoder."""
        decoder: Any = compat.find_decoder(self.adapter.model)
        return len(decoder.layers)

    def method(self, name: str, budget: str, options: str = "") -> Any:
        """The pruning method of the controls. budget: tokens per layer, or a share with a point; options: `k=v,...`.

        Raises:
            UserError: an unknown name, option or value, or a budget of more tokens than a picture has.
        """
        method = method_of(name, budget, options)
        check_budget(method, self.adapter.most_visual_tokens(), flag="budget")
        return method

    def read_picture(self, path: str | Path) -> Image.Image:
        """An uploaded file as RGB; raises `UserError` for what is no picture, or has too many pixels."""
        place = Path(path)
        if not place.is_file():
            raise UserError("the picture is no longer here: upload it again")
        try:
            return decode_image(lambda: place, place.name, self.max_image_pixels)
        except SampleError as error:
            raise UserError(str(error)) from None

    def answer(self, image: Image.Image, question: str, method: Any) -> Iterator[tuple[Half, Half]]:
        """Both answers as they grow: the dense one first, so that neither costs the other time.

        Raises:
            UserError: the question is empty or too long, does not fit the model, or the model found no memory.
        """
        if not question.strip():
            raise UserError("ask something")
        if len(question) > LONGEST_QUESTION:
            raise UserError(f"the question has {len(question)} characters; at most {LONGEST_QUESTION} are taken")
        dense = find_method("dense", "").from_options({})
        halves = Half("dense"), Half(method.name)
        with self._turn:
            for half, own in zip(halves, (dense, method), strict=True):
                for _ in self._half(half, own, image, question):
                    yield halves

    def _half(self, half: Half, method: Any, image: Image.Image, question: str) -> Iterator[None]:
        talk = self._talk(image)
        streamer = self._streamer(talk.tokenizer)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with method.attach(self.adapter.model) as run:
                    run.notes_members = True
                    started = time.perf_counter()
                    reply = talk.ask(question, run, streamer)
                    half.seconds = time.perf_counter() - started
                    if streamer is not None and streamer.first is not None:
                        half.first = streamer.first - started
                    half.prefill = sum(run.prefill_seconds)
                    half.text = reply.text
                    half.looked, half.costs = self._look(reply.trace, image, question, half)
            except BaseException as error:  # noqa: BLE001 - told in the thread that waits
                failure.append(error)
            finally:
                if streamer is not None:
                    streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        pieces: list[str] = []
        try:
            for piece in streamer or ():
                pieces.append(piece)
                half.text = "".join(pieces).strip()
                yield
        finally:
            worker.join()  # who goes away early leaves the model to the next one when it is free again
        if failure:
            error = failure[0]
            if is_user_error(error) or isinstance(error, SampleError):
                raise UserError(describe_error(error)) from None
            raise error
        half.done = True
        yield

    def _look(self, trace: Any, image: Image.Image, question: str, half: Half) -> tuple[Looked, dict[str, float]]:
        line = {"question_id": "demo", "prompt": question, **trace.to_dict(kept=True)}
        rasters = as_json(self._rasters(trace, image, question))
        if rasters is not None:
            line["rasters"] = rasters
        line |= {"prefill_seconds": half.prefill, "seconds": half.seconds}
        costs = {
            "nominal": trace.mean_tokens("nominal"),
            "processed": trace.mean_tokens("processed"),
            "selection_flops": float(trace.selection_flops()),
        }
        return read_line(line, "trace"), costs

    def _rasters(self, trace: Any, image: Image.Image, question: str) -> Any:
        prompt = self.adapter.prompt(question, 1)
        asked = Question(0, "demo", "demo", question, ("picture",))
        ids, pixels = self.adapter.prompt_ids(prompt), (self.adapter.pixels(image),)
        sample = Sample(asked, ids, pixels, (image.size,), prompt)
        if self.adapter.family is None:
            return self.adapter.rasters(sample, trace)
        return self.adapter.rasters(self.adapter.encode([sample], False), 0, trace)

    def _talk(self, image: Image.Image) -> Any:
        if self.adapter.family is not None:
            return FamilyChat(self.adapter, [image], self.generation)
        parts = self.adapter.tokenizer, self.adapter.model, self.adapter.image_processor
        return Chat(*parts, [image], self.conv_mode, self.generation)

    def _streamer(self, tokenizer: Any) -> Any:
        if self.generation.num_beams > 1:
            return None  # beams are only decided at the end
        return _Streamer(tokenizer, skip_prompt=True, timeout=_END_SECONDS, skip_special_tokens=True)


def method_of(name: str, budget: str, options: str = "") -> Any:
    """The method of the controls, whatever the model; see `SideBySide.method`."""
    numbers = parse_budgets(budget.strip() or "?") if name != "dense" and ":" not in name else []
    if len(numbers) > 1:
        raise UserError(f"the budget is one number, got {budget!r}")
    values: dict[str, Any] = parse_method_args(options)
    if numbers:
        values["target_ratio" if isinstance(numbers[0], float) else "target_tokens"] = numbers[0]
    return with_options(find_method(name, "method"), values, f"method {name}")
