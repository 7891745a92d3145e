"""Time of the decoder's prefill: dense, pruned, and the floor under the pruned one.

    python -m benchmarks.prefill --geometry cpu-1024x24 --methods autoprune,fastv --budgets 192,128,64 --save
    python -m benchmarks.prefill --geometry llava-next-7b --device cuda --budgets 640,320,160 --batch-sizes 1,4,16

dense is transformers' own model. floor: the same layers at the lengths that the pruned run had, without any selection.
over floor: what selecting costs as a whole. choice: the scores and choices of it, by the run's clock. FLOPs count
processed tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.candidates import (
    MIB,
    Graphed,
    choice_seconds,
    count_row,
    dense_prefill,
    floor_prefill,
    layer_widths,
    pruned_prefill,
    replayed,
    traces_of,
)
from benchmarks.flags import Job, decoder_parser
from benchmarks.geometry import RandomPrompt
from benchmarks.packed import pack_linears
from benchmarks.published import add_published_argument, with_published
from benchmarks.timing import interleaved_rounds, median_ratio, summary
from llava.eval.reports.memory import PeakMemory
from llava.utils import cli_main

COLUMNS = (
    "method", "budget", "batch", "visual", "nominal", "processed", "ms", "p10", "p90", "of_dense", "flops_of_dense",
    "floor_ms", "over_floor", "selection_ms", "choice_ms", "of_peak", "peak_mib", "kv_mib",
)  # fmt: skip
# Dense bf16/fp16 matrix peak in FLOP/s by what is in the device's name, from the makers' data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


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
    traces = {key: traces_of(model, setting, prompt) for key, setting in settings.items()}
    work: dict[Any, Any] = {"dense": dense_prefill(model, prompt)}
    floors = {}
    for key, setting in settings.items():
        graphed = device.type == "cuda" and isinstance(setting, Graphed)
        work[key] = pruned_prefill(model, setting, prompt)
        floors[key] = layer_widths(traces[key]), graphed
        if floors[key] not in work:
            floor = floor_prefill(model, layer_widths(traces[key]), prompt)
            work[floors[key]] = replayed(floor) if graphed else floor
        if graphed and len(prompt.embeds_BNC) == 1 and "dense graphs" not in work:
            work["dense graphs"] = replayed(work["dense"])
    label = f"prefill, batch {len(prompt.embeds_BNC)}"
    seconds = interleaved_rounds(work, args.rounds, device, args.warmup, description=label, until=until)

    def row(key: Any, name: str, budget: int | None, counts: dict[str, Any]) -> dict[str, Any]:
        times = summary(seconds[key])
        return {
            "method": name,
            "budget": budget,
            **counts,
            **times,
            "of_dense": median_ratio(seconds[key], seconds["dense"]),
            # Multiply-adds are two operations.
            "of_peak": 2 * counts["flops"] / (times["ms"] / 1000) / peak,
        }

    counts = count_row(traces_of(model, None, prompt))
    rows = [row("dense", "dense", None, counts) | {"peak_mib": peak_mib(work["dense"], device)}]
    if "dense graphs" in work:
        rows.append(row("dense graphs", "dense graphs", None, counts))
    for key, setting in settings.items():
        own, floor = seconds[key], seconds[floors[key]]
        choice = choice_seconds(model, setting, prompt)
        rows.append(
            {
                **row(key, *key, count_row(traces[key])),
                "floor_ms": summary(floor)["ms"],
                "floor_of_dense": median_ratio(floor, seconds["dense"]),
                "over_floor": median_ratio(own, floor),
                "selection_ms": 1000 * statistics.median(a - b for a, b in zip(own, floor, strict=True)),
                "choice_ms": None if choice is None else 1000 * choice,
                "peak_mib": peak_mib(work[key], device),
            }
        )
    return rows


def peak_mib(work: Any, device: torch.device) -> float | None:
    """Peak memory of one pass above what is in use before it."""
    with torch.inference_mode(), PeakMemory(device) as peak:
        work()
    return None if peak.bytes is None else peak.bytes / MIB


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = decoder_parser("Time of the decoder's prefill: dense, pruned, floor.")
    add_published_argument(parser)
    parser.add_argument(
        "--linear", choices=("torch", "packed"), default="torch",
        help="packed: oneDNN packs the weights once, not in every call (CPU; in all candidates alike)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    job = Job.of(args)
    if args.published:
        job.settings = with_published(job.settings, job.sizes)
    model = job.decoder()
    if args.linear == "packed":
        pack_linears(model, rows=job.visual)
        # Another thing than the stock layers, for the report too.
        job.shape = replace(job.shape, name=f"{job.shape.name}-packed")
    peak = peak_flops(job.device, job.dtype)
    rows = [row for prompt in job.prompts() for row in measure(model, prompt, job.settings, args, peak)]
    job.deliver("prefill", rows, COLUMNS, args)


if __name__ == "__main__":
    main()
