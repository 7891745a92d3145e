"""Time of the decoder's prefill: dense, pruned, and the floor under the pruned one.

    python -m benchmarks.prefill --geometry cpu-1024x24 --methods autoprune,fastv --budgets 192,128,64 --save
    python -m benchmarks.prefill --geometry llava-next-7b --device cuda --budgets 640,320,160 --batch-sizes 1,4,16

dense is transformers' own model. floor: the same layers at the lengths that the pruned run had, without any selection.
over floor: what selecting costs as a whole. choice: the scores and choices of it, by the run's clock. FLOPs count
processed tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.candidates import (
    build_method,
    choice_seconds,
    dense_prefill,
    floor_prefill,
    layer_widths,
    needs_no_tower,
    pruned_prefill,
    replayed,
    traces_of,
)
from benchmarks.environment import use_fixed_allocator
from benchmarks.geometry import Geometry, RandomPrompt, geometry, random_decoder, random_prompt
from benchmarks.output import add_method_arguments, common_parser, deliver, method_names, numbers, prepare
from benchmarks.packed import pack_linears
from benchmarks.published import add_published_argument, with_published
from benchmarks.timing import Summary, interleaved_rounds, median_ratio
from llava.eval.reports.memory import PeakMemory
from llava.pruning.engine.trace import Trace
from llava.utils import UserError, cli_main

COLUMNS = (
    "method", "budget", "batch", "visual", "nominal", "processed", "ms", "p10", "p90", "of_dense", "flops_of_dense",
    "over_floor", "selection_ms", "choice_ms", "of_peak", "peak_mib", "kv_mib",
)  # fmt: skip
# Dense bf16/fp16 matrix peak in FLOP/s by what is in the device's name, from the makers' data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}
MIB = 2**20


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = common_parser("Time of the decoder's prefill: dense, pruned, floor.")
    add_method_arguments(parser)
    add_published_argument(parser)
    parser.add_argument(
        "--linear", choices=("torch", "packed"), default="torch",
        help="packed: oneDNN packs the weights once, not in every call (CPU; in all candidates alike)",
    )  # fmt: skip
    return parser


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a large matrix product reaches: from the data sheet for known GPUs, measured elsewhere."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in _PEAKS.items() if part in name]
        if known:
            return known[0]
    side = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    seconds = interleaved_rounds({"": lambda: matrix @ matrix}, 5, device, description="matrix peak")[""]
    return 2 * side**3 / min(seconds)


def count_row(traces: Sequence[Trace]) -> dict[str, Any]:
    """Tokens, FLOPs and bytes of a batch: what does not depend on the machine."""
    flops, dense = sum(t.flops() for t in traces), sum(t.dense_flops() for t in traces)
    slopes = [t.slope for t in traces if t.slope is not None]
    return {
        "batch": len(traces),
        "visual": traces[0].visual_tokens,
        "nominal": statistics.fmean(t.mean_tokens("nominal") for t in traces),
        "processed": statistics.fmean(t.mean_tokens("processed") for t in traces),
        "slope": statistics.fmean(slopes) if slopes else None,
        "flops": flops,
        "flops_of_dense": flops / dense,
        "selection_flops_of_dense": sum(t.selection_flops() for t in traces) / dense,
        "kv_mib": sum(t.kv_bytes() for t in traces) / MIB,
    }


def time_row(seconds: Sequence[float], dense: Sequence[float], flops: int, peak: float) -> dict[str, Any]:
    """Time columns; of_dense: median over the rounds of the ratio within the round."""
    summary = Summary.of(seconds)
    return {
        "ms": summary.median,
        "p10": summary.p10,
        "p90": summary.p90,
        "rounds": summary.rounds,
        "of_dense": median_ratio(seconds, dense),
        # Multiply-adds are two operations.
        "of_peak": 2 * flops / (summary.median / 1000) / peak,
    }


def measure(
    model: Any,
    prompt: RandomPrompt,
    settings: Mapping[tuple[str, int], Any],
    args: Any,
    peak: float,
    until: float | None = None,
) -> list[dict[str, Any]]:
    """Rows for one batch size: dense, then every setting with its floor (one for all that have the same lengths).

    What replays CUDA graphs has a floor that does so, too, and at batch size 1 dense has a second row of this kind.
    until: see :func:`~benchmarks.timing.interleaved_rounds`.
    """
    device = prompt.embeds_BNC.device
    traces = {key: traces_of(model, method, prompt) for key, method in settings.items()}
    candidates = {"dense": dense_prefill(model, prompt)}
    graphed = {key for key, setting in settings.items() if getattr(setting, "graphs", None)}
    floors = {}
    for key, method in settings.items():
        candidates[f"{key}"] = pruned_prefill(model, method, prompt)
        widths = layer_widths(traces[key])
        floors[key] = f"floor {widths}" + (" graphs" if key in graphed else "")
        if floors[key] not in candidates:
            floor = floor_prefill(model, widths, prompt)
            candidates[floors[key]] = replayed(floor) if key in graphed and device.type == "cuda" else floor
    if graphed and device.type == "cuda" and len(prompt.embeds_BNC) == 1:
        candidates["dense graphs"] = replayed(candidates["dense"])
    label = f"prefill, batch {len(prompt.embeds_BNC)}"
    seconds = interleaved_rounds(candidates, args.rounds, device, args.warmup, description=label, until=until)
    counts = count_row(traces_of(model, None, prompt))
    dense = seconds["dense"]
    rows = [
        {"method": "dense", "budget": None, **counts, **time_row(dense, dense, counts["flops"], peak)}
        | {"peak_mib": peak_mib(candidates["dense"], device)}
    ]
    if "dense graphs" in seconds:
        own = seconds["dense graphs"]
        rows.append({"method": "dense graphs", "budget": None, **counts, **time_row(own, dense, counts["flops"], peak)})
    for (name, budget), method in settings.items():
        own, floor = seconds[f"{(name, budget)}"], seconds[floors[name, budget]]
        choice = choice_seconds(model, method, prompt)
        counts = count_row(traces[name, budget])
        rows.append(
            {
                "method": name,
                "budget": budget,
                **counts,
                **time_row(own, dense, counts["flops"], peak),
                "floor_ms": Summary.of(floor).median,
                "floor_of_dense": median_ratio(floor, dense),
                "over_floor": median_ratio(own, floor),
                "selection_ms": 1000 * statistics.median(a - b for a, b in zip(own, floor, strict=True)),
                "choice_ms": None if choice is None else 1000 * choice,
                "peak_mib": peak_mib(candidates[f"{(name, budget)}"], device),
            }
        )
    return rows


def peak_mib(work: Any, device: torch.device) -> float | None:
    """Peak memory of one pass above what is in use before it."""
    with torch.inference_mode(), PeakMemory(device) as peak:
        work()
    return None if peak.bytes is None else peak.bytes / MIB


def describe_geometry(rows: Sequence[dict], shape: Geometry, dtype: torch.dtype, args: argparse.Namespace) -> str:
    """Adds geometry, type and kernel to the rows; returns them as a label."""
    kind = str(dtype).removeprefix("torch.")
    for row in rows:
        row |= {"geometry": shape.name, "dtype": kind, "attention": args.attn_implementation}
    return f"{shape.name} {kind} {args.attn_implementation}"


class Job(NamedTuple):
    """What the flags ask for: where, what kind of numbers, which decoder, prompt and settings, how many samples."""

    device: torch.device
    dtype: torch.dtype
    shape: Geometry
    visual: int
    settings: dict[tuple[str, int], Any]
    sizes: list[int]


def job_of(args: argparse.Namespace, tower: bool = False) -> Job:
    """The job of the flags of `common_parser` and `add_method_arguments`; sets the threads."""
    device, dtype = prepare(args)
    shape = geometry(args.geometry)
    visual = args.visual_tokens or shape.visual
    settings = settings_of(args, visual, tower)
    return Job(device, dtype, shape, visual, settings, numbers(args.batch_sizes, "--batch-sizes"))


def settings_of(args: argparse.Namespace, visual: int, tower: bool = False) -> dict[tuple[str, int], Any]:
    """(method, budget) -> method, for the flags; without a tower, `UserError` for methods that need one."""
    names = method_names(args.methods)
    budgets = numbers(args.budgets, "--budgets")
    if max(budgets) > visual:
        raise UserError(f"--budgets: {max(budgets)} is more than the {visual} visual tokens")
    methods = {(name, budget): build_method(name, budget) for name in names for budget in budgets}
    return methods if tower else {key: needs_no_tower(method) for key, method in methods.items()}


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if argv is None and args.allocator == "fixed":
        use_fixed_allocator("benchmarks.prefill", sys.argv[1:])
    device, dtype, shape, visual, settings, sizes = job_of(args)
    if args.published:
        settings = with_published(settings, sizes)
    model = random_decoder(shape, device, dtype, args.attn_implementation)
    if args.linear == "packed":
        pack_linears(model, rows=visual)
        shape = replace(shape, name=f"{shape.name}-packed")  # another thing than the stock layers, for the report too
    peak = peak_flops(device, dtype)
    rows = []
    for size in sizes:
        rows += measure(model, random_prompt(shape, size, device, dtype, visual), settings, args, peak)
    name = describe_geometry(rows, shape, dtype, args)
    deliver("prefill", f"{name} {visual} visual tokens", rows, COLUMNS, args, device)


if __name__ == "__main__":
    main()
