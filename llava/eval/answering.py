"""Answering a list of questions from the command line's flags: checks, resume, progress, traces, summary.

Shared by the `model_vqa*` tools; a tool says which questions there are and, where its prompts differ, gives
its own `Answerer`. Knows no question-file format.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.eval.answers import AnswerFile
from llava.eval.arguments import GenerationOptions, check_budget, merge_type_from_args, method_from_args
from llava.eval.interrupts import Interrupts
from llava.eval.jsonio import require_folder
from llava.eval.questions import Question
from llava.eval.run_metadata import RunMetadata, describe_run, read_metadata
from llava.utils import UserError

SKIPPED_STATUS = 3
METADATA_INTERVAL = 30.0  # seconds between updates of the metadata while a run lasts


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """What happens around the answering itself."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the answers that the answers file already has; --no-resume starts over",
    )
    group.add_argument(
        "--overwrite", dest="resume", action="store_false", help="start over, whatever the answers file holds"
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
    if (merge_type := merge_type_from_args(args)) is not None:
        kwargs["mm_patch_merge_type"] = merge_type
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
        "flops": trace.flops(),
        "dense_flops": trace.dense_flops(),
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

    from llava.eval.runner import Answerer, check_conv_mode
    from llava.mm_utils import get_model_name_from_path

    check_conv_mode(args.conv_mode)
    options = {name: value for name, value in asdict(method).items() if value is not None}
    options |= {"conv_mode": args.conv_mode, **asdict(generation), **(metadata or {})}
    options = {"method": args.method, **options}
    if getattr(args, "mm_patch_merge_type", None) is not None:
        options["mm_patch_merge_type"] = args.mm_patch_merge_type
    model_id = get_model_name_from_path(args.model_path)
    evaluation = Evaluation(args, questions, model_id, options)
    with Interrupts() as interrupts:
        try:
            if evaluation.pending:
                tokenizer, model, image_processor, _ = load_model(args)
                check_budget(method, max_visual_tokens(model))
                answerer = (answerer_class or Answerer)(
                    tokenizer, model, image_processor, image_folder, args.conv_mode, generation
                )
                evaluation.run(answerer, method, interrupts)
        except BaseException as error:
            # What went wrong first is what the user must hear of; a full disk would fail here a second time.
            with contextlib.suppress(UserError):
                evaluation.close()
            if isinstance(error, KeyboardInterrupt):
                evaluation.explain_interruption(error)
            raise
        evaluation.close()
    return evaluation.summarize()


class Evaluation:
    """One run over a list of questions: its files, counts and times. Use: construct (checks), `run`, `close`,
    `summarize`.

    Attributes:
        pending: the questions without an answer.
    """

    def __init__(
        self, args: argparse.Namespace, questions: Sequence[Question], model_id: str, options: Mapping[str, Any]
    ) -> None:
        from llava.eval.runner import Statistics

        self.args, self.questions = args, questions
        self.statistics = Statistics()
        self.skipped = 0
        self.seconds = 0.0
        self._began: float | None = None
        self._saved = 0.0
        self.answers = AnswerFile(args.answers_file, model_id, options, args.resume)
        try:
            earlier = read_metadata(args.answers_file) if self.answers.has_answers else None
            self.metadata = RunMetadata(args.answers_file, describe_run(args, model_id, options, len(questions)))
            self.metadata.continue_from(earlier)
            self.pending = self.answers.pending(questions)
            self.traces = TraceFile(args.trace_file, args.resume)
        except BaseException:
            self.answers.close()
            raise
        self._needs_metadata = bool(self.pending) or earlier is None
        self.done = len(questions) - len(self.pending)
        if self.done:
            print(f"{self.done} of {len(questions)} questions are already answered", file=sys.stderr)

    def counts(self) -> dict[str, int]:
        """Questions in all, answered (earlier ones included), skipped in this run, and failed."""
        answered = self.done + self.statistics.samples
        return {
            "total": len(self.questions),
            "answered": answered - self.answers.failed,
            "skipped": self.skipped,
            "failed": self.answers.failed,
        }

    def run(self, answerer: Any, method: Any, interrupts: Interrupts) -> None:
        """Answers what is pending."""
        from llava.eval.runner import answer_questions

        model = answerer.model
        self.metadata.set_model(describe_device(model.device), str(model.dtype).removeprefix("torch."))
        self.answers.open()
        self.traces.start()
        self._began = time.perf_counter()
        self.save_metadata()
        with (
            tqdm(total=len(self.pending), unit="q", desc=self.args.method, mininterval=1.0) as bar,
            method.attach(model) as run,
        ):

            def skip(question: Question, reason: str) -> None:
                bar.write(f"skipped {question.source}: {reason}", file=sys.stderr)
                self.skipped += 1
                bar.update()

            on_skip = None if self.args.strict else skip
            for answer in answer_questions(answerer, self.pending, run, self.args.batch_size, on_skip):
                with interrupts.held():
                    self.traces.append(answer)
                    self.answers.append(answer.question, answer.text, token_summary(answer.trace))
                    self.statistics.add(answer)
                bar.set_postfix(tokens=f"{self.statistics.means()['nominal']:.1f}", refresh=False)
                bar.update()
                if time.perf_counter() - self._saved > METADATA_INTERVAL:
                    self.save_metadata()

    def save_metadata(self, finished: bool = False) -> None:
        """Writes what is known by now."""
        self._saved = time.perf_counter()
        if self._began is not None:
            self.seconds = self._saved - self._began
        self.metadata.save(
            self.counts(),
            self.answers.totals,
            self.seconds,
            self.statistics.samples,
            self.statistics.prefill_seconds,
            finished,
        )

    def close(self) -> None:
        """Puts the lines in order, writes the metadata and lets other processes at the files."""
        counts = self.counts()
        attempted = counts["total"] == sum(counts[kind] for kind in ("answered", "skipped", "failed"))
        started = self._began is not None or not self.pending
        try:
            if started and self._needs_metadata:
                if not self.answers.has_answers and self._began is None:
                    self.answers.open()  # no question at all: an empty file says that this part is done
                self.save_metadata(finished=attempted)
        finally:
            # The lock goes last: who waits for it finds everything written.
            self.traces.close()
            self.answers.close(self.questions if started else ())

    def explain_interruption(self, error: KeyboardInterrupt) -> None:
        """Says on stderr what is kept."""
        kept = self.done + self.statistics.samples
        print(
            f"{error or 'interrupted'}: {kept} of {len(self.questions)} answers are in {self.answers.path}; "
            "run the same command again to continue",
            file=sys.stderr,
        )

    def summarize(self) -> int:
        """Prints the summary; returns the exit status."""
        print_summary(self.statistics, len(self.pending), self.skipped, self.seconds, self.args.batch_size)
        return SKIPPED_STATUS if self.skipped else 0


def describe_device(device: Any) -> str:
    """The name of the GPU, or the kind of device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
