"""Pictures of saved results, one for each question: small files that say which result they show.

matplotlib (`pip install -e '.[plot]'`) is needed only where something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
_PART_NAMES = {"vision": "vision tower", "head": "output head", "other": "the rest"}
SOURCE = "Source"
Row = Mapping[str, Any]


def _labels(axis: Any, title: str, x: str = "", y: str = "", legend: str = "") -> None:
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(fontsize=7.5, frameon=False, loc=legend)


def _colours(methods: Sequence[Any]) -> dict[Any, tuple[str, str]]:
    """Method or setting -> colour and marker; dense is gray, and the ninth has another marker than the first."""
    others = [name for name in dict.fromkeys(methods) if not str(name).startswith("dense")]
    found = {name: (COLOURS[n % 8], MARKERS[(n + n // 8) % 8]) for n, name in enumerate(others)}
    return {name: found.get(name, (DENSE, "s")) for name in dict.fromkeys(methods)}


def _stack(axis: Any, labels: Sequence[str], parts: Mapping[str, tuple[str, Sequence[float]]]) -> list[float]:
    """Horizontal bars of parts (name -> colour and sizes), one behind the other; returns where the bars end."""
    ends = [0.0] * len(labels)
    for name, (colour, sizes) in parts.items():
        if any(sizes):
            axis.barh(range(len(labels)), sizes, left=ends, height=0.64, color=colour, label=name, edgecolor="white",
                      linewidth=0.5)  # fmt: skip
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlim(0, 1.12 * (max(ends) or 1.0))
    axis.invert_yaxis()
    return ends


def _ends(axis: Any, ends: Sequence[float], texts: Sequence[str]) -> None:
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axis.text(end + 0.012 * (max(ends) or 1.0), place, text, va="center", fontsize=7.5, color=INK)


# --- prefill --------------------------------------------------------------------------------------------------------


def _pruned(result: Result, *names: str) -> list[Row]:
    return [row for row in result.rows if row.get("method") not in (None, "dense") and numeric(row, *names)]


def _of_flops(result: Result) -> list[Row]:
    return _pruned(result, "of_dense", "flops_of_dense")


def _prefill(plot: Any, result: Result, rows: Sequence[Row]) -> Any:
    """Left: time over FLOPs, floors hollow. Right: what selecting adds to the floor."""
    priced = [row for row in _pruned(result, "floor_ms", "selection_ms") if row["floor_ms"] > 0]
    height = max(3.4, 0.9 + 0.27 * len(priced))
    figure, axes = plot.subplots(1, 2 if priced else 1, figsize=(9.2 if priced else 5, height), squeeze=False,
                                 layout="constrained")  # fmt: skip
    axis = axes[0][0]
    for name, (colour, marker) in _colours([row["method"] for row in rows]).items():
        own = rows_where(rows, method=name)
        axis.plot([100 * r["flops_of_dense"] for r in own], [100 * r["of_dense"] for r in own], marker, markersize=5,
                  color=colour, label=method_name(name), linestyle="none")  # fmt: skip
    floors = [row for row in rows if numeric(row, "floor_of_dense")]
    if floors:
        axis.plot([100 * r["flops_of_dense"] for r in floors], [100 * r["floor_of_dense"] for r in floors], "_",
                  markersize=11, markeredgewidth=1.3, color=INK, label="floor")  # fmt: skip
    top = 1.12 * max(100 * max(r["flops_of_dense"], r["of_dense"]) for r in rows)
    axis.plot([0, top], [0, top], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), label="time = FLOPs")
    axis.set(xlim=(0, top), ylim=(0, top))
    _labels(axis, "Time follows FLOPs?", "processed FLOPs, % of dense", "prefill time, % of dense", "upper left")
    if priced:
        _prices(axes[0][1], priced)
    return figure


def _prices(axis: Any, rows: Sequence[Row]) -> None:
    """Time above the floor in percent of the floor, and what scores and choices are of it where that is known."""
    several = len({row.get("batch") for row in rows}) > 1
    labels = [setting_name(row) + (f", batch {row['batch']}" if several else "") for row in rows]
    known, rest, unknown, texts = [], [], [], []
    for row in rows:
        # A difference of two times can be below zero; choices are timed in passes of their own, and can exceed it.
        whole, choice = 100 * row["selection_ms"] / row["floor_ms"], row.get("choice_ms")
        end = max(whole, 0.0)
        inside = min(100 * (choice or 0.0) / row["floor_ms"], end)
        known.append(inside)
        rest.append(0.0 if choice is None else end - inside)
        unknown.append(end if choice is None else 0.0)
        texts.append(f"{whole:.1f}")
    parts = {"scores, choices": (COLOURS[0], known), "gathering, masks": (COLOURS[4], rest),
             "not split": ("#b5b5b5", unknown)}  # fmt: skip
    _ends(axis, _stack(axis, labels, parts), texts)
    # Room below the last bar for the legend.
    axis.set_ylim(len(rows) - 0.4 + max(0.9, 0.16 * len(rows)), -0.6)
    _labels(axis, "Price of selecting", "time above the floor, % of the floor")
    if axis.patches:
        axis.legend(fontsize=7.5, frameon=False, loc="lower right", ncols=3, columnspacing=1.0, handlelength=1.0)


# --- scaling --------------------------------------------------------------------------------------------------------

_QUANTITIES = {"ms": ("Time", "prefill time, ms"), "peak_mib": ("Memory", "peak memory, MiB")}


def _of_visual(result: Result) -> list[Row]:
    rows = [row for row in result.rows if row.get("method") is not None and numeric(row, "visual")]
    return (
        rows
        if len({row["visual"] for row in rows}) > 1 and any(numeric(r, q) for r in rows for q in _QUANTITIES)
        else []
    )


def _scaling(plot: Any, result: Result, rows: Sequence[Row]) -> Any:
    """Time and memory over the visual tokens, log-log; the fitted exponents in the legends."""
    quantities = [name for name in _QUANTITIES if any(row.get(name) for row in rows)]
    figure, axes = plot.subplots(1, len(quantities), figsize=(4.6 * len(quantities), 3.6), squeeze=False,
                                 layout="constrained")  # fmt: skip
    ticks = sorted({row["visual"] for row in rows})
    ticks = [tick for tick, after in zip(ticks, [*ticks[1:], None], strict=True) if not after or after > 1.4 * tick]
    for axis, quantity in zip(axes[0], quantities, strict=True):
        powers = exponents(rows, quantity)
        for name, (colour, marker) in _colours([row["method"] for row in rows]).items():
            own = sorted((r["visual"], r[quantity]) for r in rows_where(rows, method=name) if r.get(quantity))
            power = f": N^{powers[name]:.2f}" if name in powers else ""
            axis.plot(*zip(*own, strict=True), color=colour, marker=marker, label=method_name(name) + power,
                      linewidth=1.4, markersize=4)  # fmt: skip
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(color=FAINT, linewidth=0.6)
        title, label = _QUANTITIES[quantity]
        _labels(axis, title, "visual tokens N", label, "upper left")
    return figure


# --- decode ---------------------------------------------------------------------------------------------------------


def _of_batches(result: Result) -> list[Row]:
    rows = [row for row in result.rows if row.get("method") is not None and numeric(row, "ms", "batch")]
    return rows if len({row["batch"] for row in rows}) > 1 else []


def _decode(plot: Any, result: Result, rows: Sequence[Row]) -> Any:
    """Time per step over the batch size, a bar per setting, p10 to p90 as whiskers."""
    sizes = sorted({row["batch"] for row in rows})
    settings = _colours([setting_name(row) for row in rows])
    figure, axis = plot.subplots(figsize=(max(4.6, 1.8 + 0.42 * len(sizes) * len(settings)), 3.4), layout="constrained")
    width = 0.8 / len(settings)
    for number, (name, (colour, _)) in enumerate(settings.items()):
        own = [row for row in rows if setting_name(row) == name]
        places = [sizes.index(r["batch"]) + (number - (len(settings) - 1) / 2) * width for r in own]
        axis.bar(places, [r["ms"] for r in own], width=0.9 * width, color=colour, label=name)
        if all(numeric(row, "p10", "p90") for row in own):
            spread = [[max(r["ms"] - r["p10"], 0) for r in own], [max(r["p90"] - r["ms"], 0) for r in own]]
            axis.errorbar(places, [r["ms"] for r in own], yerr=spread, fmt="none", ecolor=INK, elinewidth=0.8)
    axis.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    _labels(axis, "Decoding one token per sample", y="time per step, ms")
    return figure


# --- parts: end to end, time to first token -------------------------------------------------------------------------


def _of_parts(result: Result) -> list[Row]:
    """End to end: means over the benchmarks; time to first token: the smallest batch."""
    rows = [r for r in mean_rows(result) or result.rows if numeric(r, "ms") and any(numeric(r, p) for p in PARTS)]
    smallest = min((row["batch"] for row in rows if numeric(row, "batch")), default=None)
    return [row for row in rows if row.get("method") is not None and row.get("batch") == smallest]


def _stacked(plot: Any, result: Result, rows: Sequence[Row]) -> Any:
    """A bar per setting, its parts stacked; those that are small everywhere are put together."""
    large = [p for p in _PARTS if p != "other" and any((row.get(p) or 0) >= 0.015 * row["ms"] for row in rows)]
    groups = {part: [part] for part in large} | {"other": [part for part in _PARTS if part not in large]}
    # Medians of parts need not add up to the median of the whole: what is left over can be below zero.
    parts = {
        _PART_NAMES.get(name, name): (_PARTS[name], [max(sum(row.get(p) or 0 for p in group), 0) for row in rows])
        for name, group in groups.items()
    }
    figure, axis = plot.subplots(figsize=(8.2, 1.5 + 0.36 * len(rows)), layout="constrained")
    ends = _stack(axis, [setting_name(row) for row in rows], parts)
    _ends(axis, ends, [f"{end:.0f}" if end >= 100 else f"{end:.1f}" for end in ends])
    told = {"end_to_end": "time per question, ms", "first_token": "time to first token, sum of the parts, ms"}
    batch = f", batch {rows[0]['batch']}" if numeric(rows[0], "batch") else ""
    mean = ", mean over the benchmarks" if mean_rows(result) else batch
    _labels(axis, f"Where the time goes{mean}", told[result.tool])
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return figure


# --- all of them ----------------------------------------------------------------------------------------------------

DRAWINGS: dict[str, tuple[Callable[[Result], list[Row]], Callable[[Any, Result, Sequence[Row]], Any]]] = {
    "prefill": (_of_flops, _prefill),
    "scaling": (_of_visual, _scaling),
    "decode": (_of_batches, _decode),
    "end_to_end": (_of_parts, _stacked),
    "first_token": (_of_parts, _stacked),
}
"""Tool -> the rows that a picture shows (without any there is none), and what draws them."""


def picture_name(result: Result) -> str | None:
    """The file that `draw` writes; None if there is nothing to draw, and with a CPU's default allocator."""
    has = (result.fixed or not result.on_cpu) and result.tool in DRAWINGS and DRAWINGS[result.tool][0](result)
    return f"{result.stem}.png" if has else None


def draw(result: Result, folder: Path) -> Path:
    """Draws a result for which `picture_name` has a name."""
    path, plot = folder / f"{result.stem}.png", pyplot()
    rows_of, drawing = DRAWINGS[result.tool]
    save(plot, drawing(plot, result, rows_of(result)), path)
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
