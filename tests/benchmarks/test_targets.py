"""Targets against results that are made up: met, missed, not measured, on several machines."""

from __future__ import annotations

import pytest

from benchmarks import targets
from benchmarks.geometry import GEOMETRIES
from benchmarks.saved import read_results
from benchmarks.targets import TARGETS, outcomes, table, verdict
from tests.benchmarks import synthetic
from tests.benchmarks.synthetic import GPU, decode_rows, memory_rows, prefill_row, save, save_prefill

FLOOR, FLOPS, FLOOR_2880, BATCH, DECODE, SCORES, PUBLISHED, PEAK, NEXT, BATCH_8, ONE = TARGETS[:11]
MEMORY, DECODING = "cpu-1024x24, float32, sdpa, 2880 visual tokens", "cpu-1024x24, float32, sdpa, 576 visual tokens"


def of(target, folder):
    """The outcomes of one target."""
    return [outcome for outcome in outcomes(read_results(folder)) if outcome.target is target]


def only(target, folder):
    (outcome,) = of(target, folder)
    return outcome


def pruned(*budgets, visual=576, **changes):
    return [prefill_row("autoprune", budget, visual, **changes) for budget in budgets]


def test_met(tmp_path):
    save_prefill(tmp_path, pruned(192, 128, 64))
    outcome = only(FLOOR, tmp_path)
    assert dict(outcome.figures) == {"192": 1.02, "128": 1.02, "64": 1.02}, "at the limit is met"
    assert (verdict(outcome), outcome.where) == ("met", "Some CPU, 1 thread")


def test_missed_tells_where_and_by_how_much(tmp_path):
    rows = [*pruned(192), *pruned(128, over_floor=1.0203), *pruned(64, over_floor=1.05)]
    save_prefill(tmp_path, rows)
    assert verdict(only(FLOOR, tmp_path)) == "**missed** by 0.0003 (128), 0.030 (64)"


def test_a_budget_that_is_not_there_is_told(tmp_path):
    save_prefill(tmp_path, pruned(192, 64))
    assert verdict(only(FLOOR, tmp_path)) == "met as far as measured; 128 not measured"
    save_prefill(tmp_path, pruned(192, over_floor=1.03))
    assert verdict(only(FLOOR, tmp_path)) == "**missed** by 0.010 (192); 128, 64 not measured"


def test_nothing_measured(tmp_path):
    found = outcomes([])
    assert [outcome.target for outcome in found] == list(TARGETS)
    assert all(verdict(outcome) == "not measured" for outcome in found)
    assert table(found).count("| – | not measured | – |") == len(TARGETS)


def test_what_does_not_count(tmp_path):
    """Other methods, geometries, types, kernels and devices."""
    save_prefill(tmp_path, [prefill_row("fastv", 64), prefill_row("autoprune published", 64)])
    for number, other in enumerate(({"geometry": "tiny"}, {"dtype": "bfloat16"}, {"attention": "eager"})):
        save_prefill(tmp_path, pruned(64, **other), hardware=f"CPU {number}")
    save_prefill(tmp_path, pruned(64), **GPU)
    assert all(outcome.figures == {} for outcome in outcomes(read_results(tmp_path)))


def test_every_hardware_and_number_of_threads_has_a_row(tmp_path):
    save_prefill(tmp_path, pruned(192, 128, 64))
    save_prefill(tmp_path, pruned(192, 128, 64, over_floor=1.04), threads=2)
    save_prefill(tmp_path, pruned(64), hardware="Other CPU")
    found = {outcome.where: bool(outcome.missed) for outcome in of(FLOOR, tmp_path)}
    assert found == {"Other CPU, 1 thread": False, "Some CPU, 1 thread": False, "Some CPU, 2 threads": True}


def test_versions_are_told_apart(tmp_path):
    save_prefill(tmp_path, pruned(64))
    save_prefill(tmp_path, pruned(64), torch="2.12.0")
    assert [outcome.where for outcome in of(FLOOR, tmp_path)] == [
        "Some CPU, 1 thread, torch 2.12.0, transformers 5.23.0",
        "Some CPU, 1 thread, torch 2.13.0+cpu, transformers 5.23.0",
    ]


def test_the_fixed_allocator_counts(tmp_path):
    save_prefill(tmp_path, pruned(64, over_floor=1.5), allocator="default")
    assert only(FLOOR, tmp_path).where == "Some CPU, 1 thread, default allocator"
    save_prefill(tmp_path, pruned(64))
    outcome = only(FLOOR, tmp_path)
    assert (outcome.where, outcome.figures["64"]) == ("Some CPU, 1 thread", 1.02)


def test_more_rounds_count_before_fewer_and_the_worse_of_equals(tmp_path):
    label = DECODING
    save(tmp_path, "prefill", label, pruned(64, over_floor=1.01))
    save(tmp_path, "prefill", f"{label}, again", pruned(64, over_floor=1.03))
    assert only(FLOOR, tmp_path).figures["64"] == 1.03
    save(tmp_path, "prefill", f"{label}, longer", pruned(64, over_floor=1.015, rounds=21))
    assert only(FLOOR, tmp_path).figures["64"] == 1.015


def test_few_rounds_are_told_for_times(tmp_path):
    save_prefill(tmp_path, pruned(192, 128, 64, rounds=3))
    save(tmp_path, "memory", MEMORY, memory_rows())
    text = table(outcomes(read_results(tmp_path)))
    assert "Some CPU, 1 thread, only 3 rounds |" in text and "only 5 rounds" not in text


def test_time_over_flops(tmp_path):
    save_prefill(tmp_path, [*pruned(192, of_dense=0.42), *pruned(64, of_dense=0.15)])
    outcome = only(FLOPS, tmp_path)
    # Processed FLOPs are 1.2 times the budget's share of the visual tokens.
    expected = {"192": 0.42 / (1.2 * 192 / 576), "64": 0.15 / (1.2 * 64 / 576)}
    assert dict(outcome.figures) == pytest.approx(expected, rel=1e-5)
    assert list(outcome.missed) == ["64"]


def test_many_visual_tokens(tmp_path):
    save_prefill(tmp_path, pruned(640, 320, 160, visual=2880, over_floor=1.03), 2880)
    assert verdict(only(FLOOR_2880, tmp_path)) == "met" and only(FLOOR, tmp_path).figures == {}


def test_batch_8_per_sample_compares_within_a_run(tmp_path):
    rows = [*pruned(64, ms=100.0), *pruned(64, batch=8, ms=840.0), *pruned(192, ms=300.0)]
    save_prefill(tmp_path, rows)
    outcome = only(BATCH, tmp_path)
    assert dict(outcome.figures) == {"64 of 576": 1.05} and verdict(outcome) == "**missed** by 0.050 (64 of 576)"


def test_decode_at_every_batch_size(tmp_path):
    rows = decode_rows(budgets=(64,), batches=(1, 4, 8))
    rows[3]["of_dense"] = 1.1
    save(tmp_path, "decode", DECODING, rows)
    outcome = only(DECODE, tmp_path)
    assert list(outcome.figures) == ["64, batch 1", "64, batch 4", "64, batch 8"]
    assert verdict(outcome) == "**missed** by 0.100 (64, batch 4)"


def test_memory(tmp_path):
    save(tmp_path, "memory", MEMORY, memory_rows(own=290.0, published=1000.0, scores=31.0))
    assert dict(only(SCORES, tmp_path).figures) == {"": 3.1}
    assert verdict(only(SCORES, tmp_path)) == "**missed** by 0.100%"
    assert dict(only(PUBLISHED, tmp_path).figures) == {"640": 0.29, "320": 0.29, "160": 0.29}
    assert verdict(only(PUBLISHED, tmp_path)).startswith("**missed** by 0.040 (640)")
    assert verdict(only(PEAK, tmp_path)) == "met" and PEAK.limit == 302
    save(tmp_path, "memory", MEMORY, memory_rows(own=330.0, published=None))
    assert only(PUBLISHED, tmp_path).figures == {}
    assert verdict(only(PEAK, tmp_path)) == "**missed** by 28 MiB (640), 28 MiB (320), 28 MiB (160)"


def test_gpu(tmp_path):
    following = {"geometry": "llava-next-7b", "dtype": "bfloat16"}
    save_prefill(tmp_path, pruned(160, visual=2880, of_dense=0.2, **following), 2880, **GPU)
    (outcome,) = of(NEXT, tmp_path)
    assert dict(outcome.figures) == {"160": 5.0} and outcome.where == "NVIDIA H200"
    assert verdict(outcome) == "**missed** by 1.000 (160)"
    shape = {"geometry": "llava-1.5-7b", "dtype": "bfloat16"}
    rows = [*pruned(192, of_dense=1.25, **shape), *pruned(64, of_dense=0.5, **shape)]
    rows += pruned(64, batch=8, of_dense=0.25, **shape)
    save_prefill(tmp_path, rows, **GPU)
    assert dict(only(BATCH_8, tmp_path).figures) == {"64": 4.0} and verdict(only(BATCH_8, tmp_path)) == "met"
    assert verdict(only(ONE, tmp_path)) == "**missed** by 0.200 (192)"


def test_columns_that_were_not_measured_are_no_figures(tmp_path):
    bare = [{k: v for k, v in row.items() if k not in ("over_floor", "of_dense")} for row in pruned(64)]
    save_prefill(tmp_path, bare)
    assert only(FLOOR, tmp_path).figures == {} and only(FLOPS, tmp_path).figures == {}


def test_the_definitions_fit_together():
    assert len({target.title for target in TARGETS}) == len(TARGETS)
    assert {target.geometry for target in TARGETS} <= set(GEOMETRIES)
    assert targets.SMALL == synthetic.SHAPE["geometry"]


def test_figures_are_found_in_named_files(tmp_path):
    """Rows that were measured in several runs count together, whatever the files are called."""
    label = DECODING
    for name, budgets in (("", (64,)), (", run 2", (128,)), (", peers", (192,))):
        save(tmp_path, "prefill", label + name, [prefill_row("dense", None), *pruned(*budgets)])
    outcome = only(FLOOR, tmp_path)
    assert list(outcome.figures) == ["192", "128", "64"] and verdict(outcome) == "met"
