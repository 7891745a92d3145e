"""Where the time of a prefill goes, and how often the device is asked for something: dense, floor and pruned.

    python -m benchmarks.profile --geometry cpu-1024x24 --threads 1 --budgets 64 --save
    python -m benchmarks.profile --geometry llava-1.5-7b --device cuda --budgets 64 --trace prefill.json

Parts: self time, nested parts taken from the outer ones, so that they add up to the pass; on CUDA the device's time,
with `host only` for the time in which the device had nothing to do. Of several rounds the pass of median length is
shown. The profiler itself takes time; `pass`, `without profiler` says how much.

count: in `part` and `pass` the operators that compute, each at least one kernel launch (benchmarks/launches.py); in
`operator` calls, views included; in `count` what the name says. per_boundary: (pruned - floor) / pruning boundaries,
the places where the number of visual tokens changes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiler

from benchmarks.candidates import dense_prefill, floor_prefill, layer_widths, pruned_prefill, traces_of
from benchmarks.flags import Job, decoder_parser
from benchmarks.geometry import RandomPrompt
from benchmarks.launches import LaunchCounter
from benchmarks.parts import Cut, cut
from benchmarks.passes import OTHER, PART, PASS, WAITING, Pass, passes_in
from benchmarks.timing import interleaved_rounds, summary, synchronize
from llava import compat
from llava.eval.common.arguments import check_range
from llava.eval.common.outputs import Text
from llava.pruning.engine.run import PruningRun
from llava.pruning.engine.sequence import Sequences
from llava.pruning.engine.trace import Trace
from llava.pruning.method import PruningMethod
from llava.utils import UserError, cli_main

CHROME_TRACE = Text(
    "a chrome trace", r'\s*\{\s*"(schemaVersion|deviceProperties|traceEvents|displayTimeUnit)"', streams=False
)
ATTENTION, MLP, LAYER = "attention", "mlp", "norms and residuals"
MASKS, SCORES, CHOICE, MOVING = "masks and rotary", "scores", "choice", "moving tokens"
PARTS = (ATTENTION, MLP, LAYER, MASKS, SCORES, CHOICE, MOVING, OTHER)
RUNS = ("dense", "floor", "pruned")
COLUMNS = ("method", "budget", "batch", "what", "name", *(f"{run}_ms" for run in RUNS), "over_floor_ms",
           *(f"{run}_percent" for run in RUNS), *(f"{run}_count" for run in RUNS), "per_boundary")  # fmt: skip


def boundaries(traces: Sequence[Trace]) -> int:
    """How often the number of visual tokens changes, in any row of the batch: before the decoder or after a layer."""
    steps = [
        [(trace.visual_tokens, trace.tokens_in[0]), *zip(trace.tokens_in, trace.tokens_out, strict=True)]
        for trace in traces
    ]
    return sum(any(entering != leaving for entering, leaving in step) for step in zip(*steps, strict=True))


def cuts_of(model: Any, method: PruningMethod | None = None) -> list[Cut]:
    """Where a prefill is cut: in transformers' decoder, and in the engine if a method prunes.

    All are made from outside, so that a prefill without a profiler has none. `record_function` inside the engine would
    take 9.1 µs per call then, 0.5 µs behind the question whether a profiler runs, on the CPU of docs/performance.md; a
    pruned prefill of 32 layers passes 291 cuts, 2.7 or 0.2 ms. And 96 of them are in transformers' layers, where the
    engine has no place for a mark.
    """
    decoder = model.model
    cuts = []
    for layer in decoder.layers:
        # A layer without its attention and MLP is its norms and residual additions.
        for part, module in ((LAYER, layer), (ATTENTION, layer.self_attn), (MLP, layer.mlp)):
            cuts.append(Cut(part, module, "forward"))
    # Rotary tables come from a module, masks from a function that transformers' forward and ours find by its name.
    modules = (sys.modules[type(decoder).__module__], compat)
    cuts += [Cut(MASKS, module, "create_causal_mask") for module in modules]
    cuts.append(Cut(MASKS, decoder.rotary_emb, "forward"))
    if method is not None:
        # The run's timer goes around all that is selection: without the choice and the move in it, attention rows are
        # what remains.
        cuts += [Cut(SCORES, PruningRun, "selection_timer", block=True), Cut(MOVING, Sequences, "apply")]
        cuts += [Cut(CHOICE, part, "select") for part in method.parts]
    return cuts


def profiled(
    runs: Mapping[str, tuple[Callable[[], Any], Sequence[Cut]]], args: argparse.Namespace, device: torch.device
) -> dict[str, Pass]:
    """Run -> its pass of median length; in every round each run takes one pass, in rotating order."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    names, passes = list(runs), {name: [] for name in runs}
    for number in range(args.warmup + args.rounds):
        with torch.inference_mode(), profiler(activities=activities) as session:
            for turn in range(len(names)):
                name = names[(number + turn) % len(names)]
                work, cuts = runs[name]
                with cut(cuts, lambda part: record_function(PART + part)):
                    synchronize(device)
                    with record_function(PASS + name):
                        work()
                        with record_function(PART + WAITING):  # no host time of `other`
                            synchronize(device)
        if number >= args.warmup:
            for name, found in passes_in(session.events()).items():
                passes[name].append(found)
    if args.trace is not None:
        session.export_chrome_trace(args.trace)
    return {name: sorted(found, key=lambda one: one.wall)[len(found) // 2] for name, found in passes.items()}


def counted(work: Callable[[], Any], cuts: Sequence[Cut], device: torch.device) -> LaunchCounter:
    """What one pass asks the device for, by part.

    Raises:
        RuntimeError: a layer, its attention or its MLP was passed by, or another part was never reached: it would be a
            part of 0 ms.
    """
    with torch.inference_mode(), LaunchCounter(device) as counter, cut(cuts, counter.part) as calls:
        work()
    for part, number in Counter(one.part for one in cuts).items():
        expected = number if part in (LAYER, ATTENTION, MLP) else 1
        if calls[part] < expected:
            raise RuntimeError(
                f"the part '{part}' was reached {calls[part]} times in a prefill, at least {expected} were expected: "
                "the work is done in another way than `cuts_of` in benchmarks/profile.py says"
            )
    return counter


def measure(model: Any, method: PruningMethod, prompt: RandomPrompt, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one setting: the whole pass, its parts, what was counted, the operators of the difference."""
    device = prompt.embeds_BNC.device
    traces = traces_of(model, method, prompt)
    steps = boundaries(traces)
    if not steps:
        raise UserError(f"--budgets: {method.name} prunes nothing of {prompt.layout.counts[0]} visual tokens")
    dense = cuts_of(model)
    runs = {
        "dense": (dense_prefill(model, prompt), dense),
        "floor": (floor_prefill(model, layer_widths(traces), prompt), dense),
        "pruned": (pruned_prefill(model, method, prompt), cuts_of(model, method)),
    }
    plain = {name: work for name, (work, _) in runs.items()}
    seconds = interleaved_rounds(plain, args.rounds, device, args.warmup, description="without profiler")
    counters = {name: counted(work, cuts, device) for name, (work, cuts) in runs.items()}
    passes = profiled(runs, args, device)

    rows = _Rows(steps, {name: one.wall for name, one in passes.items()})
    rows.add("pass", "all", rows.walls, {name: counter.launches_of() for name, counter in counters.items()})
    rows.add("pass", "without profiler", {n: 1000 * summary(s)["ms"] for n, s in seconds.items()}, share=False)
    times = {name: one.times(PARTS) for name, one in passes.items()}
    for part in dict.fromkeys([*PARTS, *(part for found in times.values() for part in found)]):
        launches = {name: counter.launches_of(part) for name, counter in counters.items()} if part in PARTS else None
        row = rows.add("part", part, {name: found.get(part, 0.0) for name, found in times.items()}, launches)
        if part in PARTS and any(one.busy for one in passes.values()):
            row |= {f"{name}_host_ms": one.host[part] / 1000 for name, one in passes.items()}

    in_layers = {n: sum(map(counter.launches_of, (ATTENTION, MLP, LAYER))) for n, counter in counters.items()}
    per_layer = {name: count / len(model.model.layers) for name, count in in_layers.items()}
    rows.add("count", "pruning boundaries", counts={"pruned": steps})["per_boundary"] = None
    rows.add("count", "launches per layer", counts=per_layer)["per_boundary"] = None
    rows.add("count", "copies from the host", counts={n: counter.uploads.total() for n, counter in counters.items()})
    rows.add("count", "waits for the device", counts={n: counter.waits.total() for n, counter in counters.items()})
    for kind in dict.fromkeys(kind for one in passes.values() for kind in one.cuda):
        rows.add("count", kind, counts={name: one.cuda[kind] for name, one in passes.items()})

    # Operators with the largest self time in the pruned pass beyond that in the floor.
    floor, pruned = passes["floor"].operators, passes["pruned"].operators
    for name in sorted({*floor, *pruned}, key=lambda name: (floor[name] - pruned[name], name))[: args.top]:
        micros = {run: one.operators[name] for run, one in passes.items()}
        rows.add("operator", name, micros, {run: one.calls[name] for run, one in passes.items()})
    return rows.rows


@dataclass
class _Rows:
    """Rows on their way. steps: pruning boundaries; walls: microseconds of the passes."""

    steps: int
    walls: Mapping[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        what: str,
        name: str,
        micros: Mapping[str, float] | None = None,
        counts: Mapping[str, float] | None = None,
        share: bool = True,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"what": what, "name": name}
        if micros is not None:
            row |= {f"{run}_ms": value / 1000 for run, value in micros.items()}
            row["over_floor_ms"] = row["pruned_ms"] - row["floor_ms"]
            if share:
                row |= {f"{run}_percent": 100 * value / self.walls[run] for run, value in micros.items()}
        if counts is not None:
            row |= {f"{run}_count": value for run, value in counts.items()}
            row["per_boundary"] = (counts["pruned"] - counts.get("floor", 0)) / self.steps
        self.rows.append(row)
        return row


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = decoder_parser("Where the time of a prefill goes, and its launches: dense, floor, pruned.", rounds=3)
    parser.set_defaults(budgets="64")
    parser.add_argument("--top", type=int, default=10, help="operators by self time, pruned minus floor")
    parser.add_argument(
        "--trace", type=CHROME_TRACE, default=None, help="write the last round as a chrome trace into this file"
    )
    args = parser.parse_args(argv)
    check_range("--top", args.top, 0)
    job = Job.of(args)
    if not job.settings:
        raise UserError("--methods: needs a pruning method; dense is always measured")
    if args.trace is not None:
        if len(job.settings) * len(job.sizes) > 1:
            raise UserError("--trace: holds one method, one budget and one batch size")
        if Path(args.trace).is_dir() or not Path(args.trace).absolute().parent.is_dir():
            raise UserError(f"--trace: cannot be written: {args.trace}")
    model = job.decoder()
    rows = [
        {"method": name, "budget": budget, "batch": len(prompt.embeds_BNC), **row}
        for prompt in job.prompts()
        for (name, budget), method in job.settings.items()
        for row in measure(model, method, prompt, args)
    ]
    job.deliver("profile", rows, COLUMNS, args)


if __name__ == "__main__":
    main()
