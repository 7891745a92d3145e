"""Pictures of a comparison: accuracy over processed tokens, and variants beside each other with their intervals.

Drawn from the rows that `compare` writes. Needs matplotlib (`pip install matplotlib`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.reports.comparison_tables import columns
from llava.eval.reports.plots import FAINT, INK, MUTED, pyplot, save

# Colors that stay apart for most color-blind eyes; markers tell apart what lies close, and what has the same color.
_COLORS = (
    "#1f77b4", "#d1495b", "#2a9d8f", "#e9a03b", "#6a4c93", "#8c564b", "#17becf", "#4d4d4d", "#bcbd22", "#e377c2",
    "#3b7a57", "#9467bd", "#ff7f0e", "#7f7f7f",
)  # fmt: skip
_MARKERS = "osD^v<>PX*hp8d"
_LEGEND = 28  # names in a column


def look_of(number: int) -> dict[str, str]:
    """Color and marker of a line, another pair for each of the first 196."""
    turn, place = divmod(number, len(_COLORS))
    return {"color": _COLORS[place], "marker": _MARKERS[(place + turn) % len(_MARKERS)]}


def _figure_of(row: Mapping[str, Any]) -> Mapping[str, float]:
    return row["mean_accuracy"] or row["agreement"]


def _unit(rows: Sequence[Mapping[str, Any]]) -> str:
    graded = rows[0]["mean_accuracy"] is not None
    return "mean accuracy, percent" if graded else "same answer as dense, percent"


def lines_of(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, bool], list[Mapping[str, Any]]]:
    """Variant, and whether its budget is the processed one of two -> its rows by rising processed tokens, without
    dense."""
    lines: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["budget"] is not None:
            lines.setdefault((row["variant"], row.get("counted") == "processed"), []).append(row)
    return {name: sorted(line, key=lambda row: row["tokens_processed"]) for name, line in lines.items()}


def plot_accuracy(result: Mapping[str, Any], path: Path) -> None:
    """One line per method over the tokens its layers really computed on; bars are the intervals."""
    rows = result["rows"]
    plot = pyplot()
    lines = lines_of(rows)
    legends = -(-(len(lines) + 1) // _LEGEND)
    figure, axis = plot.subplots(figsize=(8.0 + 1.5 * legends, 5.2), layout="constrained")
    dense = _figure_of(rows[0])
    axis.axhspan(dense["low"], dense["high"], color=FAINT, alpha=0.6, linewidth=0)
    axis.axhline(dense["value"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="dense")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in lines))}
    for (name, processed), line in lines.items():
        number = numbers[name]
        values = [_figure_of(row) for row in line]
        spread = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
        axis.errorbar(
            [row["tokens_processed"] for row in line],
            [v["value"] for v in values],
            yerr=spread,
            label=f"{name}, processed" if processed else name,
            linestyle="--" if processed else "-",
            **look_of(number),
            markersize=4.5,
            linewidth=2.4 if name == "autoprune" else 1.3,
            elinewidth=0.8,
            capsize=2,
        )
    axis.set_xscale("log")
    ticks = sorted({round(row["tokens_processed"]) for row in rows[1:]})
    axis.set_xticks(_thin(ticks), [str(tick) for tick in _thin(ticks)])
    axis.minorticks_off()
    axis.set_xlabel("visual tokens processed per decoder layer (mean)", fontsize=9)
    axis.set_ylabel(_unit(rows), fontsize=9)
    axis.set_title(f"{result['run']['model']}: accuracy over processed tokens", fontsize=11, loc="left", color=INK)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper", ncols=legends)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save(plot, figure, path)


def _thin(ticks: Sequence[int], ratio: float = 1.18) -> list[int]:
    """Ticks that do not run into each other on a logarithmic axis."""
    chosen: list[int] = []
    for tick in ticks:
        if not chosen or tick >= ratio * chosen[-1]:
            chosen.append(tick)
    return chosen


def plot_variants(result: Mapping[str, Any], path: Path) -> None:
    """Every variant on a line of its own, one panel per budget, the first variant's interval as a band."""
    rows = [row for row in result["rows"] if row["budget"] is not None]
    found = columns(rows, result["run"]["budget"])
    names = list(dict.fromkeys(row["variant"] for row in rows))
    plot = pyplot()
    figure, axes = plot.subplots(
        1, len(found), figsize=(3.2 + 2.6 * len(found), 1.4 + 0.27 * len(names)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, column) in zip(axes[0], found.items(), strict=True):
        by_name = {name: _figure_of(row) for name, row in column.items()}
        reference = by_name.get(names[0])
        if reference:
            axis.axvspan(reference["low"], reference["high"], color=FAINT, alpha=0.6, linewidth=0)
            axis.axvline(reference["value"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for place, name in enumerate(names):
            value = by_name.get(name)
            if value is None:
                continue
            color = INK if place == 0 else _COLORS[0]
            axis.plot([value["low"], value["high"]], [place, place], color=color, linewidth=1.2)
            axis.plot(value["value"], place, "o", color=color, markersize=4)
        axis.set_title(title, fontsize=10, loc="left", color=INK)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.supxlabel(_unit(result["rows"]), fontsize=9)
    save(plot, figure, path)
