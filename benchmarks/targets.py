"""The targets of this project for time and memory, and how far the saved results are from them.

A target is data: the tool that measures it, a function from a result to figures, and a limit. No measured figure is
written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.saved import Result, counted, numeric, rows_where
from llava.eval.common.tables import markdown_table

METHOD, GRAPHS = "autoprune", "autoprune graphs"
SMALL, QWEN, LLAVA_15, LLAVA_NEXT = "cpu-1024x24", "cpu-qwen-1024x24", "llava-1.5-7b", "llava-next-7b"
# Peak of the published code's prefill above the loaded model: 2880 visual tokens on `SMALL`, 1 CPU thread.
PUBLISHED_MIB = 1208
ROUNDS = 9
Row = Mapping[str, Any]
Figures = dict[str, float]


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        title: what is measured.
        geometry: what it is measured on: `SMALL` and `QWEN` on a CPU in float32, the others on a GPU in bfloat16.
        limit: for every figure that `read` finds, at most or (`at_least`) at least.
        read: result -> case ("64") -> figure; an empty dict where the result does not say.
        wanted: the cases that have to be there for the target to be met; without them it is met by those that are.
    """

    title: str
    tool: str
    geometry: str
    limit: float
    read: Callable[[Result], Figures]
    unit: str = "×"
    at_least: bool = False
    wanted: tuple[str, ...] = ()

    def applies(self, result: Result) -> bool:
        """Whether a result is of the target's tool, device, geometry and type, with dense on sdpa."""
        of = ("cpu", "float32") if self.geometry in (SMALL, QWEN) else ("cuda", "bfloat16")
        found = [result.same(name) for name in ("geometry", "dtype", "attention")]
        return result.tool == self.tool and [result.env["device"], *found] == [of[0], self.geometry, of[1], "sdpa"]

    def missed_by(self, figure: float) -> float:
        """How far on the wrong side of the limit; 0 on the right one."""
        return max(self.limit - figure if self.at_least else figure - self.limit, 0.0)


@dataclass(frozen=True)
class Outcome:
    """A target on one hardware. where: "" if nothing was measured."""

    target: Target
    where: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 0

    @property
    def missed(self) -> dict[str, float]:
        """Cases on the wrong side of the limit, and by how much."""
        distances = {case: self.target.missed_by(figure) for case, figure in self.figures.items()}
        return {case: distance for case, distance in distances.items() if distance > 0}


# --- what is read from a result -----------------------------------------------------------------------------------


def _own(result: Result, column: str, method: str = METHOD, **wanted: Any) -> list[Row]:
    rows = rows_where(result.rows, method=method, **wanted)
    return [row for row in rows if numeric(row, "budget", "batch", column)]


def _ratio(above: str, below: str, factor: float = 1.0) -> Callable[[Row], float | None]:
    return lambda row: factor * row[above] / row[below] if numeric(row, above, below) and row[below] else None


def _column(name: str) -> Callable[[Row], float | None]:
    return lambda row: row[name] if numeric(row, name) else None


def _speed_up(row: Row) -> float | None:
    return 1 / row["of_dense"] if numeric(row, "of_dense") and row["of_dense"] > 0 else None


def _at(
    title: str,
    geometry: str,
    limit: float,
    budgets: Sequence[int],
    figure: Callable[[Row], float | None],
    *,
    tool: str = "prefill",
    visual: int = 576,
    batch: int = 1,
    method: str = METHOD,
    unit: str = "×",
    others: bool = False,
) -> Target:
    """A target for a figure of the rows of some budgets (and of `others` that are there), at one batch size."""

    def read(result: Result) -> Figures:
        rows = _own(result, "visual", method, visual=visual, batch=batch)
        found = {str(row["budget"]): figure(row) for row in rows if others or row["budget"] in budgets}
        return {case: value for case, value in found.items() if value is not None}

    return Target(title, tool, geometry, limit, read, unit, figure is _speed_up, tuple(map(str, budgets)))


def _batch_8_per_sample(result: Result) -> Figures:
    """Budget -> time per sample at batch 8 over batch 1, of one run."""
    alone, eight = (
        {(r["visual"], r["budget"]): r["ms"] / batch for r in _own(result, "ms", batch=batch) if numeric(r, "visual")}
        for batch in (1, 8)
    )
    both = sorted(alone.keys() & eight.keys(), reverse=True)
    return {f"{budget} of {visual}": eight[visual, budget] / alone[visual, budget] for visual, budget in both}


def _scores_of_a_full_map(result: Result) -> Figures:
    by_name = {row["method"]: row["mib"] for row in rows_where(result.rows, visual=2880) if numeric(row, "mib")}
    scores, full = by_name.get("scores of a layer"), by_name.get("a full attention map")
    return {"": 100 * scores / full} if scores is not None and full else {}


def _peak_over_published(result: Result) -> Figures:
    own, published = (
        {row["budget"]: row["mib"] for row in _own(result, "mib", method, visual=2880, batch=1)}
        for method in (METHOD, f"{METHOD} published")
    )
    return {str(budget): mib / published[budget] for budget, mib in own.items() if published.get(budget)}


def _decode(result: Result) -> Figures:
    return {f"{row['budget']}, batch {row['batch']}": row["of_dense"] for row in _own(result, "of_dense")}


_576, _2880 = (192, 128, 64), (640, 320, 160)
_NEXT, _BATCH_8, _ONE = "Prefill, NeXT, 2880 visual tokens", "Prefill, 1.5, batch 8", "Prefill, 1.5, batch 1"
_FASTER = "times faster than dense"
TARGETS = (
    _at("Prefill over its floor, 576 visual tokens", SMALL, 1.02, _576, _column("over_floor")),
    _at("Prefill time (of dense) over FLOPs (of dense), 576 visual tokens", SMALL, 1.05, _576,
        _ratio("of_dense", "flops_of_dense")),
    _at("Prefill over its floor, 2880 visual tokens", SMALL, 1.03, _2880, _column("over_floor"), visual=2880),
    Target("Prefill time per sample, batch 8 over batch 1", "prefill", SMALL, 1.0, _batch_8_per_sample),
    Target("Decode time per token over dense", "decode", SMALL, 1.0, _decode),
    Target("Memory of a layer's scores, of a full attention map, 2880 visual tokens", "memory", SMALL, 3.0,
           _scores_of_a_full_map, "%"),
    Target("Peak memory of the prefill over that of the published way, 2880 visual tokens", "memory", SMALL, 0.25,
           _peak_over_published),
    _at(f"Peak memory of the prefill, 2880 visual tokens: a quarter of the published code's {PUBLISHED_MIB:,} MiB",
        SMALL, PUBLISHED_MIB / 4, _2880, _column("mib"), tool="memory", visual=2880, unit=" MiB"),
    _at(f"{_NEXT}: {_FASTER}", LLAVA_NEXT, 6.0, (160,), _speed_up, visual=2880),
    _at(f"{_BATCH_8}: {_FASTER}", LLAVA_15, 2.5, (64,), _speed_up, batch=8),
    _at(f"{_ONE}: {_FASTER} (never slower)", LLAVA_15, 1.0, (64,), _speed_up, others=True),
    _at(f"{_NEXT}, CUDA graphs: {_FASTER}", LLAVA_NEXT, 6.0, (160,), _speed_up, visual=2880, method=GRAPHS),
    _at(f"{_BATCH_8}, CUDA graphs: {_FASTER}", LLAVA_15, 2.5, (64,), _speed_up, batch=8, method=GRAPHS),
    _at(f"{_ONE}, CUDA graphs: {_FASTER} (never slower)", LLAVA_15, 1.0, (64,), _speed_up, method=GRAPHS, others=True),
    _at("Selection, 1.5, batch 8, CUDA graphs: share of the pruned prefill", LLAVA_15, 5.0, (64,),
        _ratio("selection_ms", "ms", 100), batch=8, method=GRAPHS, unit="%"),
    Target("Decode time per token over dense, 1.5", "decode", LLAVA_15, 1.0, _decode),
    Target("Decode time per token over dense, NeXT", "decode", LLAVA_NEXT, 1.0, _decode),
    _at("Prefill over its floor, Qwen2.5-VL's decoder (grouped heads, M-RoPE), 1000 visual tokens", QWEN, 1.02,
        (192, 64), _column("over_floor"), visual=1000),
)  # fmt: skip


# --- comparison ---------------------------------------------------------------------------------------------------


def outcomes(results: Iterable[Result]) -> list[Outcome]:
    """Every target on every hardware that has figures of it; one without `where` for a target without any.

    Figures with the fixed allocator come before those with the default one. Where several results have the same case,
    the one with more rounds counts, and of equal ones the worse.
    """
    results = list(results)
    found = []
    for target in TARGETS:
        by_setup: dict[str, list[tuple[Result, Figures]]] = {}
        for result in results:
            figures = target.read(result) if target.applies(result) else {}
            if figures:
                by_setup.setdefault(_versioned(result, results), []).append((result, figures))
        found += [_outcome(target, where, by_setup[where]) for where in sorted(by_setup)] or [Outcome(target)]
    return found


def _outcome(target: Target, where: str, measured: list[tuple[Result, Figures]]) -> Outcome:
    fixed = [pair for pair in measured if pair[0].fixed]
    if target.geometry in (SMALL, QWEN) and not fixed:
        where += ", default allocator"
    best: dict[str, tuple[int, float, float]] = {}
    for result, figures in fixed or measured:
        rounds = min((row["rounds"] for row in result.rows if numeric(row, "rounds")), default=0)
        for case, figure in figures.items():
            rank = (rounds, -figure if target.at_least else figure, figure)
            best[case] = max(best.get(case, rank), rank)
    ordered = sorted(best, key=lambda case: (*target.wanted, *best).index(case))
    return Outcome(target, where, {case: best[case][2] for case in ordered}, min(rank[0] for rank in best.values()))


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
    rows = []
    for outcome in found:
        target, where = outcome.target, outcome.where or "–"
        limit = f"{'≥' if target.at_least else '≤'} {target.limit:g}{target.unit}"
        # Scores and peaks of memory hardly move from round to round; times do.
        if 0 < outcome.rounds < ROUNDS and target.tool != "memory":
            where += f", only {outcome.rounds} rounds"
        rows.append([target.title, limit, _measured(outcome), verdict(outcome), where])
    return markdown_table(["target", "limit", "measured", "verdict", "on"], rows, labels=5)


def _measured(outcome: Outcome) -> str:
    target = outcome.target
    digits = 0 if target.unit == " MiB" else 2 if target.at_least or target.unit == "%" else 3
    told = [f"{case}: {v:.{digits}f}" if case else f"{v:.{digits}f}" for case, v in outcome.figures.items()]
    return "; ".join(told) or "–"


def verdict(outcome: Outcome) -> str:
    """`met`, `missed by ...`, `not measured`, and what is missing."""
    if not outcome.figures:
        return "not measured"
    missing = ", ".join(case for case in outcome.target.wanted if case not in outcome.figures)
    missing = f"; {missing} not measured" if missing else ""
    if not outcome.missed:
        return f"met as far as measured{missing}" if missing else "met"
    unit = outcome.target.unit.replace("×", "")
    by = ", ".join(f"{_short(v)}{unit}{f' ({case})' if case else ''}" for case, v in outcome.missed.items())
    return f"**missed** by {by}{missing}"


def _short(distance: float) -> str:
    """Two significant digits at least, no exponent."""
    decimals = 0 if distance >= 10 else next((d for d in range(3, 8) if round(distance, d)), 8)
    return f"{distance:.{decimals}f}"
