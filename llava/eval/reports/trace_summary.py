"""Summary of trace files: tokens, mutual information, slopes and times, one block per file.

The lines are those that `--trace-file` writes. Samples without image count only where times are meant.
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.common.arguments import Parser, check_range
from llava.eval.common.jsonio import iter_jsonl, write_json
from llava.eval.common.outputs import PICTURE, JsonObject
from llava.schema import NUMBER, Fields, ListOf, at_least, between, check, optional
from llava.utils import UserError

_NUMBER, _COUNT = optional(NUMBER), at_least(0, NUMBER)
LINE = Fields(
    {
        "visual_tokens": at_least(0),
        "tokens_out": ListOf(_COUNT),
        "mutual_information?": optional(Fields({"layer0?": _NUMBER, "layer1?": _NUMBER})),
        "flops?": _COUNT,
        "dense_flops?": _COUNT,
        **dict.fromkeys(("mean_nominal?", "mean_processed?", "prefill_seconds?", "decode_seconds?"), _NUMBER),
        "slope?": optional(between(-1e6, 1e6)),
        "kept_per_view?": optional(ListOf(ListOf(_COUNT, least=1), least=1)),
    }
)
MAX_BINS = 1000
PERCENTILES = (5, 25, 50, 75, 95)
BAR_WIDTH = 40
# name -> (unit, how to get it from a line; None where the line has none)
QUANTITIES = {
    "nominal tokens": ("per layer", lambda line: line.get("mean_nominal")),
    "processed tokens": ("per layer", lambda line: line.get("mean_processed")),
    "FLOPs": ("of dense", lambda line: line["flops"] / line["dense_flops"] if line.get("dense_flops") else None),
    "MI layer 0": ("bits", lambda line: (line.get("mutual_information") or {}).get("layer0")),
    "MI layer 1": ("bits", lambda line: (line.get("mutual_information") or {}).get("layer1")),
    "slope": ("per layer", lambda line: line.get("slope")),
}
TIMES = {
    "prefill": ("ms", lambda line: _milliseconds(line.get("prefill_seconds"))),
    "decode": ("ms", lambda line: _milliseconds(line.get("decode_seconds"))),
}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


@dataclass
class Traces:
    """What is kept of one file: a number per line and quantity, and the curve of each line with mutual information.

    Attributes:
        information: bits in layer 1, one per curve.
        curves: tokens leaving each layer relative to those of the prompt, `[layers]` each.
        kept: by number of views the tokens of each that leave the last layer, `[views]` each.
    """

    name: str
    samples: int = 0
    with_image: int = 0
    values: dict[str, array] = field(default_factory=dict)
    information: array = field(default_factory=lambda: array("d"))
    curves: list[np.ndarray] = field(default_factory=list)
    kept: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def add(self, line: dict[str, Any], where: str) -> None:
        """Takes one line; raises `UserError` if its values are of the wrong kind."""
        try:
            self.samples += 1
            chosen = TIMES
            if line["visual_tokens"]:
                self.with_image += 1
                chosen = QUANTITIES | TIMES
            for name, (_, read) in chosen.items():
                value = read(line)
                if value is not None:
                    self.values.setdefault(name, array("d")).append(value)
            if line.get("kept_per_view"):
                left = np.asarray(line["kept_per_view"][-1], dtype=np.float64)
                self.kept.setdefault(len(left), []).append(left)
            information = QUANTITIES["MI layer 1"][1](line)
            if information is not None and line["visual_tokens"]:
                curve = np.asarray(line["tokens_out"], dtype=np.float32) / line["visual_tokens"]
                if curve.ndim != 1 or (self.curves and curve.shape != self.curves[0].shape):
                    raise ValueError("number of layers")
                self.information.append(information)
                self.curves.append(curve)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, ZeroDivisionError) as error:
            raise UserError(f"{where}: not a line of a trace file ({error})") from None

    def quartiles(self) -> list[tuple[float, np.ndarray]]:
        """(mean bits, mean curve) of each quartile of mutual information, lowest first; fewer for under 4 samples."""
        order = np.argsort(np.asarray(self.information), kind="stable")
        groups = [group for group in np.array_split(order, 4) if len(group)]
        return [
            (float(np.mean([self.information[i] for i in group])), np.mean([self.curves[i] for i in group], axis=0))
            for group in groups
        ]

    def summary(self, bins: int) -> dict[str, Any]:
        """Means, percentiles and the histogram of slopes, JSON-able."""
        quantities = {}
        for name, (unit, _) in (QUANTITIES | TIMES).items():
            if name in self.values:
                numbers = np.asarray(self.values[name])
                quantities[name] = {
                    "unit": unit,
                    "mean": float(numbers.mean()),
                    **{f"p{p}": float(np.percentile(numbers, p)) for p in PERCENTILES},
                }
        result = {"samples": self.samples, "with_image": self.with_image, "quantities": quantities}
        if "slope" in self.values:
            slopes = np.asarray(self.values["slope"])
            low, high = slopes.min(), slopes.max()
            if high - low < 1e-9 * max(abs(low), abs(high)):  # numbers have no room for bins between them
                low, high = low - 0.5, high + 0.5
            counts, edges = np.histogram(slopes, bins=bins, range=(low, high))
            result["slope_histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
        if self.kept:
            means = {str(views): np.mean(rows, axis=0) for views, rows in sorted(self.kept.items())}
            result["kept_per_view"] = {views: mean.round(3).tolist() for views, mean in means.items()}
        if self.curves:
            result["quartiles"] = [
                {"mean_bits": bits, "curve": curve.round(6).tolist()} for bits, curve in self.quartiles()
            ]
        return result


def read_traces(argument: str) -> Traces:
    """`NAME=PATH`, or a path whose stem is the name."""
    name, equals, path = argument.partition("=")
    if not equals or not path or Path(argument).is_file():
        name, path = Path(argument).stem, argument
    traces = Traces(name)
    for number, line in iter_jsonl(path, "trace file"):
        where = f"{path}:{number}"
        traces.add(check(line, LINE, f"{where}: not a line of a trace file"), where)
    if not traces.samples:
        raise UserError(f"{path}: holds no trace")
    return traces


def text_report(name: str, summary: dict[str, Any]) -> str:
    """The block of one file."""
    lines = [f"{name}: {summary['samples']} samples, {summary['with_image']} with image"]
    header = "".join(f"{text:>11}" for text in ("mean", *(f"p{p}" for p in PERCENTILES)))
    lines.append(f"  {'':<28}{header}")
    for quantity, numbers in summary["quantities"].items():
        cells = "".join(f"{numbers[key]:>11.4g}" for key in ("mean", *(f"p{p}" for p in PERCENTILES)))
        lines.append(f"  {quantity + ' (' + numbers['unit'] + ')':<28}{cells}")
    for views, means in summary.get("kept_per_view", {}).items():
        listed = ", ".join(f"{mean:.1f}" for mean in means)
        lines.append(f"  left of each of {views} images behind the last layer, mean: {listed}")
    if "slope_histogram" in summary:
        counts, edges = (summary["slope_histogram"][key] for key in ("counts", "edges"))
        lines.append("  slopes")
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            lines.append(f"  {low:>8.4f} .. {high:<8.4f}{count:>7} {'#' * round(BAR_WIDTH * count / max(counts))}")
    return "\n".join(lines)


def plot_quartiles(traces: Sequence[Traces], path: Path) -> bool:
    """Mean retention curve of each quartile of mutual information, one panel per file; False without any curve."""
    from llava.eval.reports.plots import pyplot, save

    shown = [part for part in traces if part.curves]
    if not shown:
        return False
    plot = pyplot()
    figure, axes = plot.subplots(1, len(shown), figsize=(4.5 * len(shown) + 0.5, 3.6), squeeze=False, sharey=True)
    for axis, part in zip(axes[0], shown, strict=True):
        quartiles = part.quartiles()
        for number, (bits, curve) in enumerate(quartiles):
            color = plot.get_cmap("viridis")(number / max(len(quartiles) - 1, 1) * 0.85)
            axis.plot(range(len(curve)), 100 * curve, color=color, label=f"Q{number + 1}: {bits:.2f} bits")
        axis.set_title(part.name)
        axis.set_xlabel("decoder layer")
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("visual tokens leaving the layer, %")
    figure.tight_layout()
    save(plot, figure, path)
    return True


def build_parser() -> Parser:
    """All flags of the tool."""
    parser = Parser(prog="python -m llava.eval.trace_summary", description="Summarize trace files.")
    parser.add_argument("traces", nargs="+", metavar="[NAME=]PATH", help="what --trace-file has written")
    parser.add_argument("--bins", type=int, default=12, help="bins of the histogram of slopes")
    parser.add_argument(
        "--json",
        type=JsonObject("a summary of traces", of=("samples", "quantities")),
        default=None,
        help="also write the summary here",
    )
    parser.add_argument(
        "--plot", type=PICTURE, default=None, help="picture of retention curves by quartile of mutual information"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Prints the summaries, and writes and draws them where the flags say."""
    check_range("--bins", args.bins, 1, MAX_BINS)
    traces = [read_traces(argument) for argument in args.traces]
    if len({part.name for part in traces}) < len(traces):
        raise UserError("two trace files have the same name; give names as NAME=PATH")
    summaries = {part.name: part.summary(args.bins) for part in traces}
    print("\n\n".join(text_report(name, summary) for name, summary in summaries.items()))
    if args.json is not None:
        write_json(args.json, summaries)
    if args.plot is not None:
        written = plot_quartiles(traces, Path(args.plot))
        print(f"\nwrote {args.plot}" if written else "\nno picture: no trace has mutual information")
