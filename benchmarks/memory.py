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

from benchmarks.candidates import dense_prefill, floor_prefill, layer_widths, pruned_prefill, traces_of
from benchmarks.environment import use_fixed_allocator
from benchmarks.geometry import Geometry, RandomPrompt, random_decoder, random_prompt
from benchmarks.output import add_method_arguments, common_parser, deliver
from benchmarks.prefill import MIB, count_row, describe_geometry, job_of
from benchmarks.published import add_published_argument, with_published
from benchmarks.timing import interleaved_rounds
from llava.eval.reports.memory import PeakMemory
from llava.pruning.scores import attention_rows
from llava.utils import UserError, cli_main

COLUMNS = ("method", "budget", "batch", "visual", "processed", "mib", "p10", "p90", "floor_mib", "of_floor", "kv_mib")


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


def measure(model: Any, prompt: RandomPrompt, settings: dict, args: Any) -> list[dict[str, Any]]:
    """Rows for one batch size: dense, then every setting with its floor (one for all that have the same lengths)."""
    device = prompt.embeds_BNC.device
    candidates = {"dense": dense_prefill(model, prompt)}
    traces = {("dense", None): traces_of(model, None, prompt)}
    for key, method in settings.items():
        traces[key] = traces_of(model, method, prompt)
        candidates[str(key)] = pruned_prefill(model, method, prompt)
        widths = layer_widths(traces[key])
        candidates.setdefault(f"floor {widths}", floor_prefill(model, widths, prompt))
    found = interleaved_rounds(candidates, args.rounds, device, args.warmup, peak_bytes, "memory")
    rows = []
    for (name, budget), counted in traces.items():
        key = "dense" if name == "dense" else str((name, budget))
        low, middle, high = np.percentile(found[key], [10, 50, 90]) / MIB
        floor = float(np.median(found[f"floor {layer_widths(counted)}"])) / MIB if name != "dense" else None
        rows.append(
            {
                "method": name,
                "budget": budget,
                **count_row(counted),
                "mib": float(middle),
                "p10": float(low),
                "p90": float(high),
                "rounds": args.rounds,
                "floor_mib": floor,
                "of_floor": float(middle) / floor if floor else None,
            }
        )
    return rows


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = common_parser("Peak memory of the prefill above the loaded model.", rounds=5)
    add_method_arguments(parser)
    add_published_argument(parser)
    args = parser.parse_args(argv)
    if argv is None and args.allocator == "fixed":
        use_fixed_allocator("benchmarks.memory", sys.argv[1:])
    device, dtype, shape, visual, settings, sizes = job_of(args)
    if args.published:
        settings = with_published(settings, sizes)
    model = random_decoder(shape, device, dtype, args.attn_implementation)
    work, full = scoring(shape, visual, device, dtype)
    seconds = interleaved_rounds({"scores": work}, args.rounds, device, args.warmup, peak_bytes, "scores")
    scores = float(np.median(seconds["scores"]))
    rows: list[dict[str, Any]] = []
    for size in sizes:
        rows += measure(model, random_prompt(shape, size, device, dtype, visual), settings, args)
    rows.append({"method": "scores of a layer", "batch": 1, "visual": visual, "mib": scores / MIB})
    rows.append({"method": "a full attention map", "batch": 1, "visual": visual, "mib": full / MIB})
    name = describe_geometry(rows, shape, dtype, args)
    deliver("memory", f"{name} {visual} visual tokens", rows, COLUMNS, args, device)
    print(f"scores of a layer: {100 * scores / full:.2f}% of a full attention map", file=sys.stderr)


if __name__ == "__main__":
    main()
