"""Answering a list of questions from the command line's flags.

Shared by the `model_vqa*` tools; a tool says which questions there are and, where its prompts differ, gives
its own `Answerer`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llava.eval.answering.loading import load_adapter
from llava.eval.answering.loop import Interrupts
from llava.eval.answering.parallel import Whole, World, existing_parts
from llava.eval.common.arguments import (
    MAX_IMAGE_PIXELS,
    MAX_WORKERS,
    GenerationOptions,
    check_budget,
    check_range,
    method_from_args,
)
from llava.eval.common.jsonio import iter_jsonl, require_folder
from llava.eval.common.outputs import TRACES
from llava.eval.common.questions import Question, most_images
from llava.utils import UserError, visible

ZERO, KEEP = PADDING_ATTENTION = ("zero", "keep")


def add_padding_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """What becomes of the CLS attention on padding; the published tools differ in it."""
    parser.add_argument_group("images").add_argument(
        "--padding-attention",
        choices=PADDING_ATTENTION,
        default=None,
        help="CLS attention of patches that pad a picture to a square, for methods that use it; zero: they count as "
        "unattended, as in the published model_vqa_loader and model_vqa_mmbench; keep: as the tower gives it, as in "
        f"the published model_vqa and model_vqa_science; default: {default}",
    )


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
    group.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first sample that cannot be read; if a question cannot be asked, before anything is answered",
    )
    group.add_argument(
        "--trace-file", type=TRACES, default=None, help="one JSON line per sample: tokens per layer, MI, slope, times"
    )
    group.add_argument(
        "--trace-kept",
        action="store_true",
        help="traces also hold the surviving tokens of each layer, what is merged of what, and where they are in the "
        "picture; for llava.eval.report",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        default=None,
        help="processes that read images ahead of the model; default: up to 4 for a GPU, 0 for a CPU",
    )
    group.add_argument(
        "--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, help="larger images are skipped, not decoded"
    )
    group.add_argument("--quiet", action="store_true", help="print only what went wrong")


def run_questions(
    args: argparse.Namespace,
    questions: Sequence[Question],
    metadata: Mapping[str, Any] | None = None,
    prompt_text: Callable[[Question], str] | None = None,
    images: Mapping[str, str] | None = None,
    padding_attention: str = ZERO,
) -> int:
    """Answers `questions` as the shared flags say, into `args.answers_file`; returns the exit status.

    metadata: a tool's own options; like the shared ones they are written to every answer, and a resumed run must have
    the same. prompt_text: what the model is asked, where that is not the question's text. images: name -> base64 of an
    image file, where images do not lie in the image folder. padding_attention: what the tool does without the flag.
    """
    # Everything that can be wrong with the input is found before the model is loaded.
    method = method_from_args(args)
    generation = GenerationOptions.from_args(args)
    check_range("--num-workers", args.num_workers, 0, MAX_WORKERS)
    check_range("--max-image-pixels", args.max_image_pixels, 1)
    image_folder = Path(args.image_folder or ".")
    most = most_images(questions)
    if most:
        require_folder(image_folder, "image folder")

    from llava.eval.answering.answerer import Answerer, check_conv_mode, question_problem
    from llava.mm_utils import get_model_name_from_path

    check_conv_mode(args.conv_mode)

    folder = image_folder if images is None else None
    problem = partial(question_problem, prompt_text=prompt_text, conv_mode=args.conv_mode, image_folder=folder)
    if args.strict:
        for question in questions:
            if (reason := problem(question)) is not None:
                raise UserError(f"{question.source}: {reason}")
    options = {name: value for name, value in method.settings().items() if value is not None}
    options |= {"conv_mode": args.conv_mode, **asdict(generation), **(metadata or {})}
    options = {"method": args.method, **options}
    if getattr(args, "mm_patch_merge_type", None) is not None:
        options["mm_patch_merge_type"] = args.mm_patch_merge_type
    padding, recorded = resolve_padding(args, padding_attention)
    if recorded:
        options["padding_attention"] = padding
    model_id = get_model_name_from_path(args.model_path)
    world = World.from_environment()
    whole = Whole(args, questions, model_id, options)
    with Interrupts() as interrupts:
        evaluation = whole.own_share(world, image_folder)
        try:
            evaluation.set_aside(problem)
            if evaluation.pending:
                if args.device is None:
                    args.device = world.device()
                adapter = load_adapter(args, args.conv_mode, masks_padding=padding == ZERO)
                check_budget(method, adapter.most_visual_tokens(), most)
                answerer = Answerer(
                    adapter,
                    image_folder,
                    generation,
                    max_image_pixels=args.max_image_pixels,
                    prompt_text=prompt_text,
                    images=images or {},
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
        return whole.merge_if_last(world, evaluation.summarize())


def resolve_padding(args: argparse.Namespace, default: str) -> tuple[str, bool]:
    """The `--padding-attention` of a run, and whether its answers record it.

    Runs of earlier versions have none and zeroed the attention in every tool: they are continued like that. It is also
    what a tool whose default it is need not record.
    """
    given = getattr(args, "padding_attention", None)
    earlier = _earlier_options(args.answers_file) if args.resume else None
    if earlier is not None and "padding_attention" not in earlier and default != ZERO and given in (None, ZERO):
        if given is None and not args.quiet:
            text = (
                f"{args.answers_file}: these answers were begun with --padding-attention {ZERO}, which this version no "
                "longer has by default: continuing with it"
            )
            print(visible(text), file=sys.stderr)
        return ZERO, False
    padding = given or default
    return padding, KEEP in (padding, default)


def _earlier_options(answers_file: str) -> Mapping[str, Any] | None:
    """The metadata of the first answer that is there; None if there is none. What is broken is told elsewhere."""
    for path in (Path(answers_file), *existing_parts(answers_file)):
        with contextlib.suppress(UserError, OSError):
            for _, record in iter_jsonl(path, "answers file"):
                metadata = record.get("metadata")
                return metadata if isinstance(metadata, dict) else None
    return None
