"""Made-up results in the tools' own form: what the report does with them is known beforehand. No figure is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.environment import FIXED_ALLOCATOR
from benchmarks.saved import ordered, result_path, result_text

SHAPE = {"geometry": "cpu-1024x24", "dtype": "float32", "attention": "sdpa"}
GPU = {"device": "cuda", "hardware": "NVIDIA H200", "cuda": "13.0", "threads": 16, "cores": 16}


def environment(allocator: str = "fixed", **changes: Any) -> dict[str, Any]:
    """As `benchmarks.environment.environment` tells it."""
    told = {
        "hardware": "Some CPU", "device": "cpu", "cores": 2, "threads": 1, "load_average": 1.0, "system": "Linux 6",
        "python": "3.11.7", "torch": "2.13.0+cpu", "cuda": None, "transformers": "5.23.0", "llava": "0.1.0",
        "allocator": allocator, "variables": FIXED_ALLOCATOR if allocator == "fixed" else {},
    }  # fmt: skip
    return {**told, **changes}


def save(folder: Path, tool: str, label: str, rows: list[dict], allocator: str = "fixed", **changes: Any) -> Path:
    """Writes a result as `--save` does."""
    env = environment(allocator, **changes)
    path = result_path(tool, label, env, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result_text(tool, label, ordered(rows, ()), env))
    return path


def prefill_row(method: str, budget: int | None, visual: int = 576, batch: int = 1, **changes: Any) -> dict[str, Any]:
    """A row of `benchmarks.prefill`; time follows FLOPs at 1.02 times the floor unless `changes` says otherwise."""
    share = 1.0 if budget is None else 1.2 * budget / visual
    ms = 8.0 * batch * visual * share
    row = {
        "method": method, "budget": budget, "batch": batch, "visual": visual, "nominal": budget or visual,
        "processed": share * visual, "slope": None, "flops": int(1e9 * visual * share), "flops_of_dense": share,
        "kv_mib": visual * share / 5, "ms": ms, "p10": 0.99 * ms, "p90": 1.02 * ms, "rounds": 9, "of_dense": share,
        "of_peak": 0.9, "peak_mib": visual * share / 3,
    }  # fmt: skip
    if budget is not None:
        floor = ms / 1.02
        row |= {"floor_ms": floor, "floor_of_dense": share / 1.02, "over_floor": 1.02, "selection_ms": ms - floor}
        row |= {"choice_ms": 0.7 * (ms - floor)}
    return {**row, **SHAPE, **changes}


def save_prefill(folder: Path, rows: list[dict], visual: int = 576, **changes: Any) -> Path:
    """A prefill result with dense in front of the rows."""
    shape = {name: rows[0][name] for name in SHAPE}
    batches = sorted({row["batch"] for row in rows})
    dense = [prefill_row("dense", None, visual, batch, **shape) for batch in batches]
    label = f"{', '.join(shape.values())}, {visual} visual tokens"
    return save(folder, "prefill", label, dense + rows, **changes)


def decode_rows(ratio: float = 0.9, budgets: tuple[int, ...] = (192, 64), batches=(1, 8), **changes) -> list[dict]:
    """Rows of `benchmarks.decode`."""
    rows = []
    for batch in batches:
        for method, budget in (("dense", None), *(("autoprune", budget) for budget in budgets)):
            of_dense = 1.0 if budget is None else ratio
            ms = 20.0 * (1 + batch / 8) * of_dense
            row = {"method": method, "budget": budget, "batch": batch, "visual": 576, "nominal": 64, "processed": 80,
                   "slope": None, "ms": ms, "p10": 0.97 * ms, "p90": 1.05 * ms, "rounds": 9, "new_tokens": 16,
                   "of_dense": of_dense, "kv_mib": 30.0 * batch, "kv_of_dense": 0.3}  # fmt: skip
            rows.append({**row, **SHAPE, **changes})
    return rows


def memory_rows(own: float = 280.0, published: float | None = 1300.0, scores: float = 20.0) -> list[dict]:
    """Rows of `benchmarks.memory` at 2880 visual tokens."""
    rows = [{"method": "dense", "budget": None, "batch": 1, "visual": 2880, "mib": 900.0, "rounds": 5}]
    for budget in (640, 320, 160):
        named = {"autoprune": own} | ({"autoprune published": published} if published is not None else {})
        for method, mib in named.items():
            rows.append({"method": method, "budget": budget, "batch": 1, "visual": 2880, "processed": 1.2 * budget,
                         "mib": mib, "p10": mib - 5, "p90": mib + 5, "rounds": 5, "floor_mib": 250.0,
                         "of_floor": mib / 250.0})  # fmt: skip
    rows.append({"method": "scores of a layer", "batch": 1, "visual": 2880, "mib": scores})
    rows.append({"method": "a full attention map", "batch": 1, "visual": 2880, "mib": 1000.0})
    return [{**row, **SHAPE} for row in rows]


def scaling_rows(methods: tuple[str, ...] = ("autoprune",)) -> list[dict]:
    """Rows of `benchmarks.scaling`: dense with the square of the tokens, the others in proportion to them."""
    rows = []
    for visual in (144, 576, 1152, 2304, 2880, 5760):
        quadratic = {"ms": visual**2 / 100, "peak_mib": visual**1.5 / 30}
        rows.append(prefill_row("dense", None, visual) | quadratic)
        for number, name in enumerate(methods):
            linear = {"ms": 3.0 * visual * (1 + number), "peak_mib": 0.25 * visual}
            rows.append(prefill_row(name, visual // 9, visual) | linear)
    return rows


def first_token_rows(batches: tuple[int, ...] = (1, 4)) -> list[dict]:
    """Rows of `benchmarks.first_token`: transformers' dense, ours with nothing attached, pruned."""
    rows = []
    for batch in batches:
        for method, budget, model, prefill in (
            ("dense", None, "transformers", 50.0), ("dense", None, "llava", 50.0), ("autoprune", 64, "llava", 20.0),
        ):  # fmt: skip
            parts = {"vision": 12.0, "projector": 1.5, "prefill": prefill, "selection": 1.8 if budget else 0.0,
                     "head": 2.0, "other": 1.0}  # fmt: skip
            ms = batch * sum(parts.values())
            rows.append({"method": method, "budget": budget, "model": model, "batch": batch, "visual": 576,
                         "processed": float(budget or 576), "ms": ms, "p10": ms - 1, "p90": ms + 1, "rounds": 9,
                         "of_dense": ms / batch / 66.5, **{part: batch * value for part, value in parts.items()},
                         "vision_percent": 1200 * batch / ms, "tower_layers": 23, "extra_rows": 1 if budget else 0,
                         **SHAPE})  # fmt: skip
    return rows


def end_to_end_rows() -> list[dict]:
    """Rows of `benchmarks.end_to_end` on two benchmarks."""
    rows = []
    for benchmark, factor in (("TextVQA", 1.0), ("POPE", 3.0)):
        for method, budget, prefill in (("dense", None, 50.0), ("autoprune", 64, 20.0), ("fastv", 64, 24.0)):
            parts = {"image": 6.0, "tokenize": 0.3, "vision": 20.0, "projector": 1.0, "encode": 0.5,
                     "prefill": prefill, "selection": 4.0 if budget else 0.0, "decode": 30.0, "detokenize": 0.2,
                     "other": 2.0}  # fmt: skip
            parts = {name: factor * value for name, value in parts.items()}
            rows.append({"benchmark": benchmark, "method": method, "budget": budget, "questions": 40,
                         "ms": sum(parts.values()), **parts, "tokens_processed": float(budget or 576)})  # fmt: skip
            rows[-1]["of_dense"] = rows[-1]["ms"] / (110 * factor)
    return rows
