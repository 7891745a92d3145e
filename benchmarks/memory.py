"""Peak memory of the prefill (dense, pruned, floor) and of the scores alone, against a full attention map.

    python -m benchmarks.memory --geometry cpu-1024x24 --visual-tokens 2880 --budgets 640,320,160 --save

On a CPU these are resident pages above the loaded model, on CUDA the allocator's bytes. Rounds are interleaved; the
dense figure varies from run to run, so compare with the floor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.candidates import (
    MIB,
    count_row,
    dense_prefill,
    floor_prefill,
    layer_widths,
    pruned_prefill,
    traces_of,
)
from benchmarks.flags import Job, Settings, decoder_parser
from benchmarks.geometry import Geometry, RandomPrompt
from benchmarks.published import add_published_argument, with_published
from benchmarks.timing import interleaved_rounds
from llava.eval.reports.memory import PeakMemory
from llava.pruning.scores import attention_rows
from llava.utils import UserError, cli_main

COLUMNS = ("method", "budget", "batch", "visual", "processed", "mib", "p10", "p90", "flops_of_dense", "floor_mib",
           "of_floor", "kv_mib")  # fmt: skip


def peak_bytes(work: Callable[[], Any], device: torch.device) -> float:
    """Peak above what was in use; `UserError` where the system does not tell."""
    with PeakMemory(device) as peak:
        work()
    if peak.bytes is None:
        raise UserError("this system does not tell the peak memory of a process (needs CUDA, or Linux)")
    return float(peak.bytes)


def scoring(shape: Geometry, visual: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """What a layer's scores need (the text rows against all keys), and the bytes of the full map in float32."""
    tokens = shape.before + visual + shape.after
    width = shape.hidden // shape.heads
    queries = torch.randn(1, shape.heads, shape.after, width, device=device, dtype=dtype)
    keys = torch.randn(1, shape.heads, tokens, width, device=device, dtype=dtype)
    allowed = torch.ones(shape.after, tokens, dtype=torch.bool, device=device).tril(tokens - shape.after)
    return lambda: attention_rows(queries, keys, width**-0.5, allowed), 4 * shape.heads * tokens * tokens


def measure(model: Any, prompt: RandomPrompt, settings: Settings, args: Any) -> list[dict[str, Any]]:
    """Rows for one batch size: dense, then every setting with its floor (one for all that have the same lengths)."""
    dense: Any = ("dense", None)
    work: dict[Any, Callable[[], Any]] = {dense: dense_prefill(model, prompt)}
    traces = {dense: traces_of(model, None, prompt)}
    for key, setting in settings.items():
        traces[key] = traces_of(model, setting, prompt)
        work[key] = pruned_prefill(model, setting, prompt)
        widths = layer_widths(traces[key])
        work.setdefault(widths, floor_prefill(model, widths, prompt))
    found = interleaved_rounds(work, args.rounds, prompt.embeds_BNC.device, args.warmup, peak_bytes, "memory")
    rows = []
    for key, counted in traces.items():
        low, middle, high = (float(bytes_) / MIB for bytes_ in np.percentile(found[key], [10, 50, 90]))
        row = {**dict(zip(("method", "budget"), key, strict=True)), **count_row(counted)}
        row |= {"mib": middle, "p10": low, "p90": high, "rounds": args.rounds}
        if key != dense:
            floor = float(np.median(found[layer_widths(counted)])) / MIB
            row |= {"floor_mib": floor, "of_floor": middle / floor if floor else None}
        rows.append(row)
    return rows


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = decoder_parser("Peak memory of the prefill above the loaded model.", rounds=5)
    add_published_argument(parser)
    args = parser.parse_args(argv)
    job = Job.of(args)
    if args.published:
        job.settings = with_published(job.settings, job.sizes)
    model = job.decoder()
    work, full = scoring(job.shape, job.visual, job.device, job.dtype)
    found = interleaved_rounds({"scores": work}, args.rounds, job.device, args.warmup, peak_bytes, "scores")
    scores = float(np.median(found["scores"]))
    rows = [row for prompt in job.prompts() for row in measure(model, prompt, job.settings, args)]
    for name, bytes_ in (("scores of a layer", scores), ("a full attention map", full)):
        rows.append({"method": name, "batch": 1, "visual": job.visual, "mib": bytes_ / MIB})
    job.deliver("memory", rows, COLUMNS, args)
    print(f"scores of a layer: {100 * scores / full:.2f}% of a full attention map", file=sys.stderr)


if __name__ == "__main__":
    main()
