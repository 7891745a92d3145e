"""The targets of this project for time and memory, and how far the saved results are from them.

A target is data: which tool measures it, a function from a result to figures, and a limit. Knows the columns of the
benchmarks; no measured figure is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.saved import Result, counted, numeric, rows_where

METHOD, GRAPHS = "autoprune", "autoprune graphs"
SMALL, LLAVA_15, LLAVA_NEXT = "cpu-1024x24", "llava-1.5-7b", "llava-next-7b"
# Peak of the published code's prefill above the loaded model: 2880 visual tokens on `SMALL`, 1 CPU thread.
PUBLISHED_MIB = 1208
ROUNDS = 9
Figures = dict[str, float]


@dataclass(frozen=True)
class Target:
    """title: what is measured; limit: for every figure that `read` finds, at most or (`at_least`) at least.

    read: result -> case ("64") -> figure; an empty dict where the result does not say. wanted: the cases that have to
    be there for the target to be met; without them it is met by those that are.
    """

    title: str
    tool: str
    device: str
    geometry: str
    limit: float
    read: Callable[[Result], Figures]
    wanted: tuple[str, ...] = ()
    unit: str = ""
    at_least: bool = False

    def missed_by(self, figure: float) -> float:
        """How far on the wrong side of the limit; 0 on the right one."""
        return max(self.limit - figure if self.at_least else figure - self.limit, 0.0)


@dataclass(frozen=True)
class Outcome:
    """A target on one hardware. where: "" if nothing was measured."""

    target: Target
    where: str = ""
    figures: Mapping[str, float] | None = None
    rounds: int | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Wanted cases without a figure."""
        return tuple(case for case in self.target.wanted if case not in (self.figures or {}))

    @property
    def missed(self) -> dict[str, float]:
        """Cases on the wrong side of the limit, and by how much."""
        distances = {case: self.target.missed_by(figure) for case, figure in (self.figures or {}).items()}
        return {case: distance for case, distance in distances.items() if distance > 0}


# --- what is read from a result -----------------------------------------------------------------------------------


def _own(result: Result, method: str = METHOD, **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows_where(result.rows, method=method, **wanted) if numeric(row, "budget", "batch")]


def _budgets(
    visual: int,
    budgets: Sequence[int] | None,
    figure: Callable[[Mapping[str, Any]], float | None],
    batch: int = 1,
    method: str = METHOD,
) -> Callable[[Result], Figures]:
    """Budget -> a figure of its row, at one batch size."""

    def read(result: Result) -> Figures:
        rows = [
            r for r in _own(result, method, visual=visual, batch=batch) if budgets is None or r["budget"] in budgets
        ]
        found = {str(row["budget"]): figure(row) for row in rows}
        return {case: value for case, value in found.items() if value is not None}

    return read


def _column(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda row: row[name] if numeric(row, name) else None


def _time_over_flops(row: Mapping[str, Any]) -> float | None:
    return row["of_dense"] / row["flops_of_dense"] if numeric(row, "of_dense", "flops_of_dense") else None


def _selection_percent(row: Mapping[str, Any]) -> float | None:
    return 100 * row["selection_ms"] / row["ms"] if numeric(row, "selection_ms", "ms") else None


def _speed_up(row: Mapping[str, Any]) -> float | None:
    return 1 / row["of_dense"] if numeric(row, "of_dense") and row["of_dense"] > 0 else None


def _batch_8_per_sample(result: Result) -> Figures:
    """Budget -> time per sample at batch 8 over batch 1, of one run."""
    alone = {(r["visual"], r["budget"]): r["ms"] for r in _own(result, batch=1) if numeric(r, "ms", "visual")}
    eight = {(r["visual"], r["budget"]): r["ms"] / 8 for r in _own(result, batch=8) if numeric(r, "ms", "visual")}
    both = sorted(alone.keys() & eight.keys(), reverse=True)
    return {f"{budget} of {visual}": eight[visual, budget] / alone[visual, budget] for visual, budget in both}


def _scores_of_a_full_map(result: Result) -> Figures:
    by_name = {row["method"]: row["mib"] for row in rows_where(result.rows, visual=2880) if numeric(row, "mib")}
    scores, full = by_name.get("scores of a layer"), by_name.get("a full attention map")
    return {"": 100 * scores / full} if scores is not None and full else {}


def _peak_over_published(result: Result) -> Figures:
    published = {
        (row["budget"], row["batch"]): row["mib"]
        for row in rows_where(result.rows, visual=2880, method=f"{METHOD} published", batch=1)
        if numeric(row, "mib", "budget") and row["mib"] > 0
    }
    own = {(row["budget"], row["batch"]): row["mib"] for row in _own(result, visual=2880) if numeric(row, "mib")}
    return {str(key[0]): own[key] / published[key] for key in own if key in published}


def _decode(result: Result) -> Figures:
    rows = [row for row in _own(result) if numeric(row, "of_dense")]
    return {f"{row['budget']}, batch {row['batch']}": row["of_dense"] for row in rows}


_576, _2880 = (192, 128, 64), (640, 320, 160)
_CASES_576, _CASES_2880 = tuple(map(str, _576)), tuple(map(str, _2880))
TARGETS = (
    Target("Prefill over its floor, 576 visual tokens", "prefill", "cpu", SMALL, 1.02,
           _budgets(576, _576, _column("over_floor")), _CASES_576, "×"),
    Target("Prefill time (of dense) over FLOPs (of dense), 576 visual tokens", "prefill", "cpu", SMALL, 1.05,
           _budgets(576, _576, _time_over_flops), _CASES_576, "×"),
    Target("Prefill over its floor, 2880 visual tokens", "prefill", "cpu", SMALL, 1.03,
           _budgets(2880, _2880, _column("over_floor")), _CASES_2880, "×"),
    Target("Prefill time per sample, batch 8 over batch 1", "prefill", "cpu", SMALL, 1.0, _batch_8_per_sample,
           unit="×"),
    Target("Decode time per token over dense", "decode", "cpu", SMALL, 1.0, _decode, unit="×"),
    Target("Memory of a layer's scores, of a full attention map, 2880 visual tokens", "memory", "cpu", SMALL, 3.0,
           _scores_of_a_full_map, unit="%"),
    Target("Peak memory of the prefill over that of the published way, 2880 visual tokens", "memory", "cpu",
           SMALL, 0.25, _peak_over_published, unit="×"),
    Target(f"Peak memory of the prefill, 2880 visual tokens: a quarter of the published code's {PUBLISHED_MIB:,} MiB",
           "memory", "cpu", SMALL, PUBLISHED_MIB / 4, _budgets(2880, _2880, _column("mib")), _CASES_2880, " MiB"),
    Target("Prefill, NeXT, 2880 visual tokens: times faster than dense", "prefill", "cuda", LLAVA_NEXT, 6.0,
           _budgets(2880, (160,), _speed_up), ("160",), "×", at_least=True),
    Target("Prefill, 1.5, batch 8: times faster than dense", "prefill", "cuda", LLAVA_15, 2.5,
           _budgets(576, (64,), _speed_up, batch=8), ("64",), "×", at_least=True),
    Target("Prefill, 1.5, batch 1: times faster than dense (never slower)", "prefill", "cuda", LLAVA_15, 1.0,
           _budgets(576, None, _speed_up), ("64",), "×", at_least=True),
    Target("Prefill, NeXT, 2880 visual tokens, CUDA graphs: times faster than dense", "prefill", "cuda", LLAVA_NEXT,
           6.0, _budgets(2880, (160,), _speed_up, method=GRAPHS), ("160",), "×", at_least=True),
    Target("Prefill, 1.5, batch 8, CUDA graphs: times faster than dense", "prefill", "cuda", LLAVA_15, 2.5,
           _budgets(576, (64,), _speed_up, batch=8, method=GRAPHS), ("64",), "×", at_least=True),
    Target("Prefill, 1.5, batch 1, CUDA graphs: times faster than dense (never slower)", "prefill", "cuda", LLAVA_15,
           1.0, _budgets(576, None, _speed_up, method=GRAPHS), ("64",), "×", at_least=True),
    Target("Selection, 1.5, batch 8, CUDA graphs: share of the pruned prefill", "prefill", "cuda", LLAVA_15, 5.0,
           _budgets(576, (64,), _selection_percent, batch=8, method=GRAPHS), ("64",), "%"),
    Target("Decode time per token over dense, 1.5", "decode", "cuda", LLAVA_15, 1.0, _decode, unit="×"),
    Target("Decode time per token over dense, NeXT", "decode", "cuda", LLAVA_NEXT, 1.0, _decode, unit="×"),
)  # fmt: skip
_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


# --- comparison ---------------------------------------------------------------------------------------------------


def applies(target: Target, result: Result) -> bool:
    """Whether a result is of the target's tool, device, geometry and type, with dense on sdpa."""
    return (
        (result.tool, result.env.get("device")) == (target.tool, target.device)
        and result.same("geometry") == target.geometry
        and result.same("dtype") == _DTYPES[target.device]
        and result.same("attention") == "sdpa"
    )


def outcomes(results: Iterable[Result], targets: Sequence[Target] = TARGETS) -> list[Outcome]:
    """Every target on every hardware that has figures of it; one without `where` for a target without any.

    Figures with the fixed allocator come before those with the default one. Where several results have the same case,
    the one with more rounds counts, and of equal ones the worse.
    """
    results = list(results)
    found = []
    for target in targets:
        by_setup: dict[str, list[tuple[Result, Figures]]] = {}
        for result in results:
            figures = target.read(result) if applies(target, result) else {}
            if figures:
                by_setup.setdefault(_versioned(result, results), []).append((result, figures))
        found += [_outcome(target, where, by_setup[where]) for where in sorted(by_setup)] or [Outcome(target)]
    return found


def _outcome(target: Target, where: str, measured: list[tuple[Result, Figures]]) -> Outcome:
    fixed = [pair for pair in measured if pair[0].fixed]
    if target.device == "cpu" and not fixed:
        where += ", default allocator"
    best: dict[str, tuple[int, float, float]] = {}
    for result, figures in fixed or measured:
        rounds = min((row["rounds"] for row in result.rows if numeric(row, "rounds")), default=0)
        for case, figure in figures.items():
            rank = (rounds, -figure if target.at_least else figure, figure)
            best[case] = max(best.get(case, rank), rank)
    ordered = [case for case in target.wanted if case in best] + [case for case in best if case not in target.wanted]
    rounds = min(best[case][0] for case in ordered)
    return Outcome(target, where, {case: best[case][2] for case in ordered}, rounds or None)


def _versioned(result: Result, results: Sequence[Result]) -> str:
    """The setup, with the versions where several were measured on it."""

    several = {other.versions for other in results if _setup(other) == _setup(result)}
    return f"{_setup(result)}, {result.versions}" if len(several) > 1 else _setup(result)


def _setup(result: Result) -> str:
    """Hardware for people; the threads are told where they do the work."""
    hardware = str(result.env["hardware"])
    return f"{hardware}, {counted(result.env['threads'], 'thread')}" if result.on_cpu else hardware


# --- the table ----------------------------------------------------------------------------------------------------


def table(found: Sequence[Outcome]) -> str:
    """Markdown: target, limit, figures, verdict, hardware."""
    lines = ["| target | limit | measured | verdict | on |", "|---|---:|---|---|---|"]
    for outcome in found:
        target = outcome.target
        limit = f"{'≥' if target.at_least else '≤'} {target.limit:g}{target.unit}"
        where = outcome.where
        # Scores and peaks of memory hardly move from round to round; times do.
        if outcome.rounds is not None and outcome.rounds < ROUNDS and target.tool != "memory":
            where += f", only {outcome.rounds} rounds"
        lines.append(f"| {target.title} | {limit} | {_measured(outcome)} | {verdict(outcome)} | {where or '–'} |")
    return "\n".join(lines)


def _measured(outcome: Outcome) -> str:
    if not outcome.figures:
        return "–"
    target = outcome.target
    digits = 0 if target.unit == " MiB" else 2 if target.at_least or target.unit == "%" else 3
    told = [f"{case}: {v:.{digits}f}" if case else f"{v:.{digits}f}" for case, v in outcome.figures.items()]
    if len(told) <= 4:
        return "; ".join(told)
    rising = sorted(outcome.figures.items(), key=lambda item: item[1], reverse=target.at_least)
    (best, low), (worst, high) = rising[0], rising[-1]
    return f"{len(told)} cases, best {low:.{digits}f} ({best}), worst {high:.{digits}f} ({worst})"


def verdict(outcome: Outcome) -> str:
    """`met`, `missed by ...`, `not measured`, and what is missing."""
    if not outcome.figures:
        return "not measured"
    unmeasured = f"{', '.join(outcome.missing)} not measured" if outcome.missing else ""
    if not outcome.missed:
        return f"met as far as measured; {unmeasured}" if unmeasured else "met"
    unit = outcome.target.unit.strip()
    unit = f" {unit}" if unit == "MiB" else unit.replace("×", "")
    by = ", ".join(f"{_short(v)}{unit}{f' ({case})' if case else ''}" for case, v in outcome.missed.items())
    return f"**missed** by {by}" + (f"; {unmeasured}" if unmeasured else "")


def _short(distance: float) -> str:
    """Two significant digits at least, no exponent."""
    if distance >= 10:
        return f"{distance:.0f}"
    decimals = 3
    while decimals < 8 and round(distance, decimals) == 0:
        decimals += 1
    return f"{distance:.{decimals}f}"
