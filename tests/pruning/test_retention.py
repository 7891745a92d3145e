"""The retention schedule against recorded curves and independently simulated vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llava.pruning import retention_schedule
from llava.pruning.methods.autoprune.curve import (
    coarse_token_count,
    dynamic_slope,
    fit_to_budget,
    retention_curve,
    tokens_to_keep,
)
from llava.pruning.recycling import prune_step

# Simulated separately from the rule: L = 32, N = 576, x0 = 14.9.
REFERENCE = {
    (64, 0.1): "160 102 99 97 95 92 90 87 84 82 79 76 73 70 67 63 60 57 54 51 48 45 43 40 37 35 32 30 28 26 24 22",
    (64, 0.2): "160 121 118 117 115 112 109 106 102 98 94 88 83 77 71 65 59 52 46 41 36 31 27 23 20 17 14 12 10 9 8 7",
    (64, 0.4): "160 126 125 125 125 124 123 122 119 117 113 107 100 90 79 67 55 43 33 25 18 13 9 7 5 4 3 3 2 2 2 2",
    (192, 0.2): "480 365 358 353 346 339 331 321 309 297 283 267 250 232 214 195 176 157 139 122 106 91 78 67 57 48 40"
    " 34 28 24 20 17",
}


@pytest.mark.parametrize(("target", "slope"), REFERENCE)
def test_reference_schedules(target, slope):
    expected = [int(count) for count in REFERENCE[target, slope].split()]
    assert retention_schedule(32, 576, target, slope) == expected


def test_goldens(golden):
    facts, arrays = golden("pure_functions")
    starts, count_starts = arrays["curve/offsets"], arrays["curve/count_offsets"]
    shares_flat, counts_flat = arrays["curve/keep_percent_flat"], arrays["curve/counts_flat"]
    for i, fact in enumerate(facts["curves"]):
        curve = retention_curve(fact["n_layers"], fact["dynamic_k"], fact["x0"])
        coarse = coarse_token_count(fact["ori_token_num"], fact["target"])
        assert coarse == fact["k_after_layer0"]
        np.testing.assert_allclose(
            fit_to_budget(curve, coarse, fact["target"]), shares_flat[starts[i] : starts[i + 1]], atol=1e-6
        )
        counts = retention_schedule(
            fact["n_layers"], fact["ori_token_num"], fact["target"], fact["dynamic_k"], fact["x0"]
        )
        assert counts == counts_flat[count_starts[i] : count_starts[i + 1]].tolist()


def test_dynamic_slope_goldens(golden):
    for fact in golden("pure_functions")[0]["calculate_dynamic_k"]:
        assert dynamic_slope(fact["mi"], fact["k0"], fact["gamma"]) == pytest.approx(fact["dynamic_k"], abs=1e-9)


def test_negative_information_steepens_the_curve():
    assert dynamic_slope(-0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("information", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("error")
def test_information_that_is_not_finite_still_gives_a_schedule(information):
    assert dynamic_slope(information) == dynamic_slope(0.0)
    counts = retention_schedule(12, 576, 64, dynamic_slope(information))
    assert counts == retention_schedule(12, 576, 64, 0.4)


@pytest.mark.parametrize("target", [1, 2, 64, 128, 192, 320, 575, 576])
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_budget_is_met_where_the_curve_can(target, slope):
    counts = retention_schedule(32, 576, target, slope)
    assert counts[0] == min(int(2.5 * target), 576)
    assert all(later <= earlier for earlier, later in zip(counts, counts[1:], strict=False))
    if slope > 0 and 4 <= target <= 320:
        assert sum(counts) / 32 == pytest.approx(target, abs=1)
    assert min(counts) >= 1


def test_flat_curve_is_flat_behind_layer_one():
    counts = retention_schedule(32, 576, 64, 0.0)
    assert counts[:3] == [160, 64, 61] and set(counts[2:]) == {61}


def test_one_layer_has_only_the_coarse_cut():
    assert retention_schedule(1, 576, 64, 0.2) == [160]


def test_extreme_slope_overflows_to_nothing_without_warning(recwarn):
    assert retention_schedule(40, 576, 64, 60.0)[-1] >= 1
    assert not recwarn.list


def test_recycling_rule():
    step = prune_step(100, 60)
    assert (step.keep, step.recycled, step.merged, step.total) == (60, 13, 2, 62)
    assert prune_step(10, 9) == prune_step(10, 9, 0.3) and prune_step(10, 9).total == 10
    assert prune_step(10, 12).total == 10 and prune_step(10, 4, 0.0).total == 4


def test_full_share_still_drops_one_token():
    assert tokens_to_keep(160, 1.0) == 159


@pytest.mark.parametrize("bad", [(0, 576, 64), (32, 576, 0), (32, -1, 64)])
def test_impossible_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="at least"):
        retention_schedule(*bad, slope=0.2)
