"""Answering a list of questions from the command line's flags: checks, resume, progress, traces, summary.

Shared by the `model_vqa*` tools; a tool says which questions there are and, where its prompts differ, gives
its own `Answerer`. Knows no question-file format.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.eval.answers import AnswerFile
from llava.eval.arguments import GenerationOptions, check_budget, method_from_args
from llava.eval.jsonio import require_folder
from llava.eval.questions import Question
from llava.utils import UserError

SKIPPED_STATUS = 3


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """What happens around the answering itself."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the answers that the answers file already has; --no-resume starts over",
    )
    group.add_argument("--strict", action="store_true", help="stop at the first sample that cannot be read")
    group.add_argument("--trace-file", default=None, help="one JSON line per sample: tokens per layer, MI, slope")


def load_model(args: argparse.Namespace) -> tuple[Any, Any, Any, int]:
    """LLaVA's 4-tuple for the model flags."""
    import torch
    from transformers.utils import logging as transformers_logging

    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    if args.device is not None:
        try:
            torch.device(args.device)
        except RuntimeError:
            raise UserError(f"--device: {args.device!r} is not a device") from None
    kwargs: dict[str, Any] = {}
    if args.dtype != "auto":
        kwargs["torch_dtype"] = getattr(torch, args.dtype)
    if args.attn_implementation is not None:
        kwargs["attn_implementation"] = args.attn_implementation
    name = get_model_name_from_path(args.model_path)
    if not sys.stderr.isatty():
        # A log file needs no bar per weight; on a terminal it shows that a large checkpoint is being read.
        transformers_logging.disable_progress_bar()
    return load_pretrained_model(args.model_path, args.model_base, name, device=args.device, **kwargs)


class TraceFile:
    """One JSON line per sample; does nothing without a path. Constructing proves that the file can be written."""

    def __init__(self, path: str | None, resume: bool) -> None:
        self._stream = None
        self._resume = resume
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            except OSError as error:
                raise UserError(f"cannot write trace file {path}: {error.strerror or error}") from None

    def start(self) -> None:
        """Empties the file unless the run is resumed; only now, when everything that can be wrong is checked."""
        if self._stream is not None and not self._resume:
            self._stream.truncate(0)

    def append(self, answer: Any) -> None:
        if self._stream is None:
            return
        record = {
            "question_id": answer.question.id,
            "prompt": answer.question.text,
            **answer.trace.to_dict(),
            "prefill_seconds": answer.prefill_seconds,
            "seconds": answer.seconds,
        }
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def token_summary(trace: Any) -> dict[str, Any]:
    """What an answer's metadata says about the tokens of its sample."""
    return {
        "visual": trace.visual_tokens,
        "nominal": round(trace.mean_tokens("nominal"), 3),
        "processed": round(trace.mean_tokens("processed"), 3),
    }


def run_questions(
    args: argparse.Namespace,
    questions: Sequence[Question],
    answerer_class: Callable[..., Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Answers `questions` as the shared flags say, into `args.answers_file`; returns the exit status.

    answerer_class: takes what `Answerer` takes; for tools whose prompts or images differ. metadata: a tool's
    own options; like the shared ones they are written to every answer, and a resumed run must have the same.
    """
    # Everything that can be wrong with the input is found before the model is loaded.
    method = method_from_args(args)
    generation = GenerationOptions.from_args(args)
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    image_folder = Path(args.image_folder or ".")
    if any(question.image is not None for question in questions):
        require_folder(image_folder, "image folder")

    from llava.eval.runner import Answerer, Statistics, answer_questions, check_conv_mode
    from llava.mm_utils import get_model_name_from_path

    check_conv_mode(args.conv_mode)
    options = {name: value for name, value in asdict(method).items() if value is not None}
    options |= {"conv_mode": args.conv_mode, **asdict(generation), **(metadata or {})}
    model_id = get_model_name_from_path(args.model_path)
    answers = AnswerFile(args.answers_file, model_id, {"method": args.method, **options}, args.resume)
    pending = answers.pending(questions)
    done = len(questions) - len(pending)
    if done:
        print(f"{done} of {len(questions)} questions are already answered", file=sys.stderr)
    traces = TraceFile(args.trace_file, args.resume)

    statistics = Statistics()
    skipped: list[Question] = []
    started = time.perf_counter()
    if pending:
        tokenizer, model, image_processor, _ = load_model(args)
        check_budget(method, max_visual_tokens(model))
        answerer = (answerer_class or Answerer)(
            tokenizer, model, image_processor, image_folder, args.conv_mode, generation
        )
        started = time.perf_counter()
        with (
            tqdm(total=len(pending), unit="q", desc=args.method, mininterval=1.0) as bar,
            method.attach(model) as run,
        ):

            def skip(question: Question, reason: str) -> None:
                bar.write(f"skipped {question.source}: {reason}", file=sys.stderr)
                skipped.append(question)
                bar.update()

            answers.open()
            traces.start()
            try:
                on_skip = None if args.strict else skip
                for answer in answer_questions(answerer, pending, run, args.batch_size, on_skip):
                    answers.append(answer.question, answer.text, token_summary(answer.trace))
                    traces.append(answer)
                    statistics.add(answer)
                    bar.set_postfix(tokens=f"{statistics.means()['nominal']:.1f}", refresh=False)
                    bar.update()
            finally:
                answers.close(questions)
                traces.close()
    print_summary(statistics, len(pending), len(skipped), time.perf_counter() - started, args.batch_size)
    return SKIPPED_STATUS if skipped else 0


def max_visual_tokens(model: Any) -> int:
    """The most visual tokens one image can have in this model: its patches, times the views if tiled."""
    patches = model.get_vision_tower().num_patches
    config = model.config
    if getattr(config, "image_aspect_ratio", None) != "anyres":
        return patches
    from llava.mm_utils import parse_grid_pinpoints

    side = model.get_vision_tower().config.image_size
    grids = parse_grid_pinpoints(config.image_grid_pinpoints)
    return patches * (1 + max((w // side) * (h // side) for w, h in grids))


def print_summary(statistics: Any, total: int, skipped: int, seconds: float, batch_size: int) -> None:
    """Counts, time and tokens, on stderr."""
    lines = [
        f"answered {statistics.samples} of {total} questions in {seconds:.1f} s"
        f" ({statistics.samples / max(seconds, 1e-9):.2f} questions/s, batch size {batch_size})"
    ]
    if statistics.samples:
        means = statistics.means()
        lines.append(f"prefill: {means['prefill_ms']:.1f} ms per sample (decoder, with selection)")
        if statistics.with_image:
            lines.append(
                f"visual tokens per layer: nominal {means['nominal']:.1f}, processed {means['processed']:.1f}"
                f" of {means['visual']:.0f}; decoder prefill FLOPs {100 * means['flops_ratio']:.1f}% of dense"
            )
    if skipped:
        lines.append(f"{skipped} samples were skipped, see above; a rerun retries them (exit status {SKIPPED_STATUS})")
    print("\n".join(lines), file=sys.stderr)
