"""Pictures of saved results: prefill, scaling, decode, end to end. Small files that say which result they show.

Knows rows; needs matplotlib (`pip install -e '.[plot]'`) only where something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from benchmarks.report_tables import PARTS, mean_rows, method_name, setting_name
from benchmarks.saved import Result, numeric, rows_where
from benchmarks.scaling import exponents
from llava.eval.reports.plots import FAINT, INK, MUTED, pyplot, save

# Okabe and Ito's colours, which stay apart for colour-blind eyes; dense is gray everywhere.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c6d1f", "#4d4d9f")
DENSE = "#8a8a8a"
MARKERS = "os^Dv<>P"
# Parts in the order in which they happen; a part has one colour in all pictures.
_PARTS = {
    "image": COLOURS[0], "tokenize": COLOURS[7], "vision": COLOURS[1], "projector": COLOURS[6], "encode": "#b58b6b",
    "prefill": COLOURS[2], "selection": COLOURS[4], "head": COLOURS[5], "decode": COLOURS[3], "detokenize": "#444444",
    "other": FAINT,
}  # fmt: skip
_PRICES = {"scores, choices": COLOURS[0], "gathering, masks": COLOURS[4], "not split": "#b5b5b5"}
SOURCE = "Source"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Drawing:
    """A picture of a tool's results. has: whether a result has what it shows."""

    has: Callable[[Result], bool]
    draw: Callable[[Any, Result], Any]


# --- prefill --------------------------------------------------------------------------------------------------------


def _pruned(result: Result, *names: str) -> list[Row]:
    return [row for row in result.rows if row.get("method") not in (None, "dense") and numeric(row, *names)]


def _prefill(plot: Any, result: Result) -> Any:
    """Left: time over FLOPs, floors hollow. Right: what selecting adds to the floor."""
    rows = _pruned(result, "of_dense", "flops_of_dense")
    priced = _prices(result)
    height = max(3.4, 0.9 + 0.27 * len(priced))
    figure, axes = plot.subplots(1, 2 if priced else 1, figsize=(9.2 if priced else 5, height), squeeze=False,
                                 layout="constrained")  # fmt: skip
    axis = axes[0][0]
    for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = rows_where(rows, method=name)
        # The ninth method has the first one's colour, but another marker.
        colour, marker = COLOURS[number % 8], MARKERS[(number + number // 8) % 8]
        axis.plot([100 * r["flops_of_dense"] for r in own], [100 * r["of_dense"] for r in own], marker, markersize=5,
                  color=colour, label=method_name(name), linestyle="none")  # fmt: skip
    floors = [row for row in rows if numeric(row, "floor_of_dense")]
    if floors:
        axis.plot([100 * r["flops_of_dense"] for r in floors], [100 * r["floor_of_dense"] for r in floors], "_",
                  markersize=11, markeredgewidth=1.3, color=INK, label="floor")  # fmt: skip
    top = 1.12 * max(100 * max(r["flops_of_dense"], r["of_dense"]) for r in rows)
    axis.plot([0, top], [0, top], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), label="time = FLOPs")
    axis.set_xlim(0, top)
    axis.set_ylim(0, top)
    axis.set_xlabel("processed FLOPs, % of dense", fontsize=9)
    axis.set_ylabel("prefill time, % of dense", fontsize=9)
    axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    _plain(axis, "Time follows FLOPs?")
    if priced:
        _draw_prices(axes[0][1], priced)
    return figure


def _prices(result: Result) -> list[tuple[str, float, float | None]]:
    """(setting, time above the floor, what scores and choices are of it if that is known), in percent of the floor."""
    rows = [row for row in _pruned(result, "floor_ms", "selection_ms") if row["floor_ms"] > 0]
    several = len({row.get("batch") for row in rows}) > 1
    found = []
    for row in rows:
        label = setting_name(row) + (f", batch {row['batch']}" if several else "")
        choice = 100 * row["choice_ms"] / row["floor_ms"] if numeric(row, "choice_ms") else None
        found.append((label, 100 * row["selection_ms"] / row["floor_ms"], choice))
    return found


def _draw_prices(axis: Any, priced: Sequence[tuple[str, float, float | None]]) -> None:
    # A difference of two times can come out below zero; choices are timed in passes of their own, and can exceed it.
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in _PRICES}
    for _, whole, choice in priced:
        end = max(whole, 0.0)
        middle = min(choice or 0.0, end)
        known = choice is not None
        own = ((0.0, middle), (middle, end), (0.0, 0.0)) if known else ((0.0, 0.0), (0.0, 0.0), (0.0, end))
        for name, span in zip(_PRICES, own, strict=True):
            spans[name].append(span)
    for name, colour in _PRICES.items():
        starts, ends = zip(*spans[name], strict=True)
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        if any(sizes):
            axis.barh(range(len(priced)), sizes, left=starts, height=0.62, color=colour, label=name)
    widest = max(0.0, *(whole for _, whole, _ in priced)) or 1.0
    for place, (_, whole, _) in enumerate(priced):
        axis.text(max(whole, 0) + 0.015 * widest, place, f"{whole:.1f}", va="center", fontsize=7.5, color=INK)
    axis.set_yticks(range(len(priced)), [label for label, _, _ in priced])
    # Room below the last bar for the legend.
    axis.set_ylim(len(priced) - 0.4 + max(0.9, 0.16 * len(priced)), -0.6)
    axis.set_xlim(0, 1.14 * widest)
    axis.set_xlabel("time above the floor, % of the floor", fontsize=9)
    if axis.patches:
        axis.legend(fontsize=7.5, frameon=False, loc="lower right", ncols=3, columnspacing=1.0, handlelength=1.0)
    _plain(axis, "Price of selecting")


# --- scaling --------------------------------------------------------------------------------------------------------

_QUANTITIES = (("ms", "prefill time, ms", "Time"), ("peak_mib", "peak memory, MiB", "Memory"))


def _measured(result: Result) -> list[tuple[str, str, str]]:
    return [q for q in _QUANTITIES if any(numeric(row, "visual", q[0]) and row[q[0]] > 0 for row in result.rows)]


def _scaling(plot: Any, result: Result) -> Any:
    """Time and memory over the visual tokens, log-log; the fitted exponents in the legends."""
    quantities = _measured(result)
    figure, axes = plot.subplots(1, len(quantities), figsize=(4.6 * len(quantities), 3.6), squeeze=False,
                                 layout="constrained")  # fmt: skip
    for axis, (quantity, label, name) in zip(axes[0], quantities, strict=True):
        powers = exponents(result.rows, quantity)
        others = 0
        for method in dict.fromkeys(row["method"] for row in result.rows):
            own = [r for r in rows_where(result.rows, method=method) if numeric(r, "visual", quantity) and r[quantity]]
            own.sort(key=lambda row: row["visual"])
            dense = method == "dense"
            colour, marker = (DENSE, "s") if dense else (COLOURS[others % 8], MARKERS[2 * others % 8])
            others += not dense
            power = f": N^{powers[method]:.2f}" if method in powers else ""
            axis.plot([r["visual"] for r in own], [r[quantity] for r in own], color=colour, marker=marker,
                      label=method_name(method) + power, linewidth=1.4, markersize=4)  # fmt: skip
        ticks = sorted({row["visual"] for row in result.rows if numeric(row, "visual")})
        axis.set_xscale("log")
        axis.set_yscale("log")
        shown = [tick for tick, after in zip(ticks, [*ticks[1:], None], strict=True) if not after or after > 1.4 * tick]
        axis.set_xticks(shown, [str(tick) for tick in shown])
        axis.minorticks_off()
        axis.set_xlabel("visual tokens N", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        axis.grid(color=FAINT, linewidth=0.6)
        axis.legend(fontsize=8, frameon=False, loc="upper left")
        _plain(axis, name)
    return figure


# --- decode ---------------------------------------------------------------------------------------------------------


def _decode(plot: Any, result: Result) -> Any:
    """Time per step over the batch size, a bar per setting, p10 to p90 as whiskers."""
    rows = [row for row in result.rows if numeric(row, "ms", "batch")]
    sizes = sorted({row["batch"] for row in rows})
    settings = list(dict.fromkeys(setting_name(row) for row in rows))
    figure, axis = plot.subplots(figsize=(max(4.6, 1.8 + 0.42 * len(sizes) * len(settings)), 3.4), layout="constrained")
    width, others = 0.8 / len(settings), 0
    for number, name in enumerate(settings):
        own = [row for row in rows if setting_name(row) == name]
        dense = own[0]["method"] == "dense"
        places = [sizes.index(r["batch"]) + (number - (len(settings) - 1) / 2) * width for r in own]
        colour = DENSE if dense else COLOURS[others % len(COLOURS)]
        others += not dense
        axis.bar(places, [r["ms"] for r in own], width=0.9 * width, color=colour, label=name)
        if all(numeric(row, "p10", "p90") for row in own):
            spread = [[max(r["ms"] - r["p10"], 0) for r in own], [max(r["p90"] - r["ms"], 0) for r in own]]
            axis.errorbar(places, [r["ms"] for r in own], yerr=spread, fmt="none", ecolor=INK, elinewidth=0.8)
    axis.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    axis.set_ylabel("time per step, ms", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    _plain(axis, "Decoding one token per sample")
    return figure


# --- parts: end to end, time to first token -------------------------------------------------------------------------


def _with_parts(result: Result) -> list[Row]:
    """End to end: means over the benchmarks; time to first token: the smallest batch."""
    rows = [r for r in mean_rows(result) or result.rows if numeric(r, "ms") and any(numeric(r, p) for p in PARTS)]
    batches = [row["batch"] for row in rows if numeric(row, "batch")]
    return [row for row in rows if not batches or row.get("batch") == min(batches)]


def _stacked(plot: Any, result: Result) -> Any:
    """A bar per setting, its parts stacked; those that are small everywhere are put together."""
    rows = _with_parts(result)
    parts = [part for part in _PARTS if any(numeric(row, part) for row in rows)]
    small = {p for p in parts if all((row.get(p) or 0) < 0.015 * row["ms"] for row in rows)} | {"other"}
    figure, axis = plot.subplots(figsize=(8.2, 1.5 + 0.36 * len(rows)), layout="constrained")
    ends = [0.0] * len(rows)
    for part in [*(part for part in parts if part not in small), "other"]:
        within = [part] if part != "other" else sorted(small)
        # Medians of parts need not add up to the median of the whole: what is left over can be below zero.
        sizes = [max(sum(row.get(name) or 0 for name in within), 0) for row in rows]
        label = {"vision": "vision tower", "head": "output head", "other": "the rest"}.get(part, part)
        axis.barh(range(len(rows)), sizes, left=ends, height=0.66, color=_PARTS.get(part, MUTED), label=label,
                  edgecolor="white", linewidth=0.5)  # fmt: skip
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for place, end in enumerate(ends):
        axis.text(end + 0.01 * max(ends), place, f"{end:.0f}" if end >= 100 else f"{end:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [setting_name(row) for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08 * max(ends))
    told = {"end_to_end": "time per question, ms", "first_token": "time to first token, sum of the parts, ms"}
    axis.set_xlabel(told[result.tool], fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    batch = f", batch {rows[0]['batch']}" if numeric(rows[0], "batch") else ""
    _plain(axis, "Where the time goes" + (", mean over the benchmarks" if mean_rows(result) else batch))
    return figure


# --- all of them ----------------------------------------------------------------------------------------------------

DRAWINGS = {
    "prefill": Drawing(lambda r: bool(_pruned(r, "of_dense", "flops_of_dense")), _prefill),
    "scaling": Drawing(
        lambda r: bool(_measured(r)) and len({row.get("visual") for row in r.rows}) > 1 and _named(r), _scaling
    ),
    "decode": Drawing(
        lambda r: len({row["batch"] for row in r.rows if numeric(row, "ms", "batch")}) > 1 and _named(r), _decode
    ),
    "end_to_end": Drawing(lambda r: bool(_with_parts(r)) and _named(r), _stacked),
    "first_token": Drawing(lambda r: bool(_with_parts(r)) and _named(r), _stacked),
}


def _named(result: Result) -> bool:
    return all(row.get("method") is not None for row in result.rows)


def _plain(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def picture_name(result: Result) -> str | None:
    """The file that `draw` writes; None if there is nothing to draw."""
    drawing = DRAWINGS.get(result.tool)
    return f"{result.stem}.png" if drawing is not None and drawing.has(result) else None


def draw(result: Result, folder: Path) -> Path:
    """Draws a result for which `picture_name` has a name."""
    path = folder / f"{result.stem}.png"
    plot = pyplot()
    save(plot, DRAWINGS[result.tool].draw(plot, result), path)
    # Flat colours need no more than a palette. The digest ties the picture to the result without comparing pixels,
    # which differ with the fonts and versions of a machine.
    told = PngImagePlugin.PngInfo()
    told.add_text(SOURCE, result.digest)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(48, dither=Image.Dither.NONE)
    small.save(path, optimize=True, pnginfo=told)
    return path


def drawn_from(path: Path) -> str | None:
    """Digest of the result that a picture was drawn from; None if it does not say or is not there."""
    try:
        with Image.open(path) as image:
            return image.info.get(SOURCE)
    except OSError:
        return None


def leftovers(folder: Path, drawn: Sequence[Result]) -> list[Path]:
    """Pictures named like results' that none of these has (any more)."""
    names = {result.stem for result in drawn}
    return [p for p in sorted(folder.glob("*--*.png")) if p.name.split("--")[0] in DRAWINGS and p.stem not in names]
