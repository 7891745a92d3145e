"""Greedy coverage: looking again only where a gain may be the largest chooses what looking at all does."""

from __future__ import annotations

import pytest
import torch

from llava.pruning import coverage
from llava.pruning.coverage import coverage_order


def drawn(seed: int, crops: int, patches: int, things: int, steps: int | None):
    """Likeness, factors, bonuses; on a grid of ``steps`` values there are many equals."""
    generator = torch.Generator().manual_seed(seed)
    parts = (
        torch.rand(crops, patches, things, generator=generator) - 0.3,
        torch.rand(crops, patches, generator=generator),
        torch.rand(crops, patches, generator=generator),
    )
    return parts if steps is None else tuple((part * steps).round() / steps for part in parts)


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_both_ways_choose_the_same(seed, square, steps, monkeypatch):
    patches = 40
    likeness, factor, bonus = drawn(seed, 3, patches, patches if square else 17, steps)
    last = torch.rand(3, patches, generator=torch.Generator().manual_seed(seed)) < 0.3
    for options in (
        {},
        {"factor_NP": factor},
        {"bonus_NP": bonus},
        {"factor_NP": factor, "bonus_NP": bonus, "last_NP": last, "chosen_need_none": square},
    ):
        found = coverage_order(likeness, patches - 1, **options)
        weights = coverage._Weights(*(options.get(name) for name in ("factor_NP", "bonus_NP", "last_NP")))
        expected = coverage._looking_at_all(likeness, patches - 1, weights, options.get("chosen_need_none", False))
        assert found.tolist() == expected.tolist()
        assert all(len(set(order)) == patches - 1 for order in found.tolist())


def test_few_candidates_are_looked_at_again(monkeypatch):
    """A fifth of all candidates of all steps at most, on tokens that have nothing in common."""
    tokens = torch.nn.functional.normalize(torch.randn(1, 400, 24, generator=torch.Generator().manual_seed(0)), dim=2)
    counted = []
    plain = coverage._Weights.gain
    monkeypatch.setattr(
        coverage._Weights,
        "gain",
        lambda self, added, *index: (counted.append(len(added)), plain(self, added, *index))[1],
    )
    coverage_order(tokens @ tokens.transpose(1, 2), 60)
    assert sum(counted) < 400 * 60 / 5


def test_what_is_covered_counts_once():
    """By hand: the second choice is what the first does not cover, not what covers most."""
    likeness = torch.tensor([[[0.75, 0.75, 0.0], [0.75, 0.5, 0.125], [0.0, 0.0, 0.5]]])
    assert coverage_order(likeness, 3).tolist() == [[0, 2, 1]]
    assert coverage_order(likeness, 2, factor_NP=torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [[0, 1]]
    assert coverage_order(likeness, 2, last_NP=torch.tensor([[True, False, False]])).tolist() == [[1, 2]]
