"""Time per question on the miniature benchmarks, and where it goes: image, vision tower, projector, prefill, decode.

    python -m benchmarks.end_to_end --methods autoprune,fastv --budgets 64 --limit 40 --save

Everything is measured on one answerer, method after method on each batch in turn. `selection` is what only pruning
needs, in the tower, in front of the decoder or between its layers, and is in none of the other parts; `encode` is
putting the prompt together; `decode` has `generate`'s own work too; `other` is what the parts do not explain. On CUDA
nothing waits between the parts: a part has the device's time, and what the host does meanwhile is in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import add_method_arguments, add_running_arguments, prepare, settings_of
from benchmarks.parts import Clock, Cut, cut, selection
from benchmarks.saved import deliver
from llava import compat
from llava.eval.common.arguments import GenerationOptions, Parser, check_range
from llava.eval.common.jsonio import require_folder
from llava.eval.common.questions import spread
from llava.eval.reports.defaults import MAX_NEW_TOKENS
from llava.eval.tasks.registry import DEMO
from llava.pruning import get_method
from llava.tiny import BENCHMARKS, CHECKPOINT
from llava.utils import cli_main

PARTS = ("image", "tokenize", "vision", "projector", "encode", "prefill", "selection", "decode", "detokenize", "other")
COLUMNS = ("benchmark", "method", "budget", "tokens_processed", "ms", "of_dense", *PARTS, "questions")


def answer_in_parts(answerer: Any, questions: Sequence[Any], method: Any, clock: Clock) -> list[Any]:
    """Answers one batch; the clock tells the parts apart."""
    model = answerer.model
    answerer.forget_images()  # every method decodes its images
    with clock.part("other"), method.attach(model) as run:
        cuts = [
            Cut("image", answerer, "_pixels"),
            Cut("tokenize", answerer, "prompt_ids"),
            Cut("encode", answerer, "encode"),
            Cut("vision", model, "encode_visual_tokens"),
            Cut("projector", model.model.multi_modal_projector, "forward"),
            Cut("decode", model, "generate"),
            Cut(_prefill_or_decode, run.decoder, "forward"),
            Cut("detokenize", answerer.adapter.tokenizer, "batch_decode"),
            selection(run),
        ]
        with cut(cuts, clock.part):
            return answerer.answer([answerer.prepare(question) for question in questions], run)


def _prefill_or_decode(*args: Any, past_key_values: Any = None, **kwargs: Any) -> str:
    return "decode" if compat.cached_length(past_key_values) else "prefill"


def measure(answerer: Any, batches: Sequence[Sequence[Any]], methods: dict, device: torch.device) -> list[dict]:
    """One row per method: milliseconds per question, in all and by part."""
    clocks = {key: Clock(device) for key in methods}
    processed: dict[Any, list[float]] = {key: [] for key in methods}
    for number, batch in enumerate([batches[0], *batches]):
        keys = list(methods)
        for turn in range(len(keys)):
            key = keys[(number + turn) % len(keys)]
            clock = clocks[key] if number else Clock(device)  # the first batch warms up
            answered = answer_in_parts(answerer, batch, methods[key], clock)
            if number:
                processed[key] += [a.trace.mean_tokens("processed") for a in answered if a.trace.visual_tokens]
    count = sum(len(batch) for batch in batches)
    rows = []
    for (name, budget), clock in clocks.items():
        per_question = {part: 1000 * clock.seconds[part] / count for part in PARTS}
        tokens = processed[name, budget]
        row = {"method": name, "budget": budget, "questions": count, "ms": sum(per_question.values()), **per_question}
        row["tokens_processed"] = sum(tokens) / max(len(tokens), 1)
        rows.append(row)
        row["of_dense"] = row["ms"] / rows[0]["ms"]
    return rows


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Time per question on the miniature benchmarks, split into parts.")
    parser.add_argument("--model-path", default=str(CHECKPOINT), help="checkpoint folder")
    parser.add_argument("--data-dir", default=str(BENCHMARKS), help="benchmark data, upstream's layout")
    add_method_arguments(parser, "autoprune")
    parser.add_argument("--limit", type=int, default=40, help="questions per benchmark, spread over it")
    parser.add_argument("--batch-size", type=int, default=1, help="questions per forward pass")
    add_running_arguments(parser)
    args = parser.parse_args(argv)
    check_range("--limit", args.limit, 1)
    check_range("--batch-size", args.batch_size, 1)
    device, dtype = prepare(args)
    data_dir = require_folder(args.data_dir, "data folder")
    methods = {("dense", None): get_method("dense").from_options({}), **settings_of(args)}

    from llava.eval.answering.adapter import LlavaAdapter
    from llava.eval.answering.answerer import Answerer
    from llava.eval.reports.experiment import batches
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path, None, Path(args.model_path).name, device=str(device), torch_dtype=dtype,
        attn_implementation=args.attn_implementation,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for task in DEMO:
            questions = spread(task.ask(data_dir).questions, args.limit)
            answerer = Answerer(
                LlavaAdapter(tokenizer, model, processor), task.images_path(data_dir),
                generation=GenerationOptions(max_new_tokens=MAX_NEW_TOKENS), image_cache=0,
            )  # fmt: skip
            found = measure(answerer, list(batches(questions, args.batch_size)), methods, device)
            rows += [{"benchmark": task.title, **row} for row in found]
    label = f"{Path(args.model_path).name}, batch {args.batch_size}, {str(dtype).removeprefix('torch.')}"
    deliver("end_to_end", label, rows, COLUMNS, args, device)


if __name__ == "__main__":
    main()
