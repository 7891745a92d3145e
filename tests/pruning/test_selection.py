"""Top-k and clustering against recorded cases and naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.pruning import coverage, dpc_knn_merge
from llava.pruning.coverage import coverage_order
from llava.pruning.diversity import isolation, max_min_order, most_isolated
from llava.pruning.selection import density_peaks, top_k


def naive_dpc(tokens: torch.Tensor, clusters: int) -> torch.Tensor:
    """Density peaks one number at a time, in float64."""
    rows = tokens.double().tolist()
    count, width = len(rows), len(rows[0])
    distance = [[math.dist(a, b) / math.sqrt(width) for b in rows] for a in rows]
    density = [math.exp(-sum(d * d for d in sorted(line)[:clusters]) / clusters) for line in distance]
    farthest = max(map(max, distance))
    score = []
    for i in range(count):
        parents = [distance[i][j] for j in range(count) if density[j] > density[i]]
        score.append(density[i] * min(parents, default=farthest))
    centers = sorted(range(count), key=lambda i: (-score[i], i))[:clusters]
    members = [[] for _ in centers]
    for i in range(count):
        if i in centers:
            members[centers.index(i)].append(i)
        else:
            nearest = min(range(clusters), key=lambda k: (distance[i][centers[k]], k))
            members[nearest].append(i)
    return torch.tensor(
        [[sum(rows[i][c] for i in group) / (len(group) + 1e-6) for c in range(width)] for group in members]
    )


def test_goldens(golden):
    facts, arrays = golden("pure_functions")
    for name, fact in facts["cluster_and_merge"].items():
        tokens = torch.from_numpy(arrays[f"{name}/x"]).float()
        noise = torch.from_numpy(arrays[f"{name}/noise"])
        clusters = fact["n_clusters"]
        peaks = density_peaks(tokens[None], [clusters], [len(tokens)], noise[None])
        assert peaks.centers_BK[0].tolist() == arrays[f"{name}/centers"].tolist()
        assert peaks.assignment_BM[0].tolist() == arrays[f"{name}/assign"].tolist()
        for ours, recorded in ((peaks.parent_distance_BM, "parent_dist"), (peaks.score_BM, "score")):
            torch.testing.assert_close(ours[0], torch.from_numpy(arrays[f"{name}/{recorded}"]), atol=1e-5, rtol=1e-4)
        merged = dpc_knn_merge(tokens, clusters, noise=noise)
        torch.testing.assert_close(merged, torch.from_numpy(arrays[f"{name}/merged"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (5, 1), (7, 3), (30, 4), (12, 12)])
def test_merge_equals_a_naive_loop(count, clusters):
    tokens = torch.randn(count, 16, generator=torch.Generator().manual_seed(count))
    torch.testing.assert_close(
        dpc_knn_merge(tokens, clusters), naive_dpc(tokens, clusters).float(), atol=1e-5, rtol=1e-5
    )


def test_rows_of_a_batch_are_merged_as_if_alone():
    generator = torch.Generator().manual_seed(3)
    counts, clusters = [31, 12, 1, 0], [4, 2, 1, 0]
    padded = torch.full((4, 31, 8), 1e3)  # garbage in the padding must not matter
    for row, count in enumerate(counts):
        padded[row, :count] = torch.randn(count, 8, generator=generator)
    merged = dpc_knn_merge(padded, clusters, counts=counts)
    for row, (count, wanted) in enumerate(zip(counts, clusters, strict=True)):
        if count:
            torch.testing.assert_close(merged[row, :wanted], dpc_knn_merge(padded[row, :count], wanted))


def test_two_clusters_tie_and_the_lower_rows_win():
    # k = 2 gives both members of the closest pair the same density; the result may not depend on chance.
    tokens = torch.tensor([[0.0], [5.0], [5.1], [20.0]])
    peaks = density_peaks(tokens[None], [2], [4])
    assert peaks.centers_BK[0].tolist() == [1, 2]
    assert torch.equal(dpc_knn_merge(tokens, 2), dpc_knn_merge(tokens, 2))


def test_identical_tokens_keep_their_clusters():
    merged = dpc_knn_merge(torch.ones(6, 4), 3)
    torch.testing.assert_close(merged, torch.ones(3, 4), atol=1e-5, rtol=0)


def test_half_precision_is_merged_in_float32():
    tokens = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged = dpc_knn_merge(tokens, 3)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, dpc_knn_merge(tokens.float(), 3).bfloat16())


@pytest.mark.parametrize("clusters", [0, 4])
def test_impossible_cluster_counts_are_refused(clusters):
    with pytest.raises(ValueError, match="clusters"):
        dpc_knn_merge(torch.zeros(3, 2), clusters)


def test_top_k_breaks_ties_by_index_and_pads():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 9.0, 7.0, 7.0]])
    chosen = top_k(scores, counts=[5, 2], keep=[2, 1])
    assert chosen.tolist() == [[1, 2], [0, 5]]
    assert top_k(scores, counts=[5, 5], keep=[4, 4]).tolist() == [[0, 1, 2, 3], [0, 2, 3, 4]]


def naive_diversity(tokens: torch.Tensor, picks: int) -> list[int]:
    """Farthest-point picking one number at a time."""
    rows = torch.nn.functional.normalize(tokens.double(), dim=1)
    distance = (1 - rows @ rows.T).tolist()
    count = len(distance)
    nearest = [min(distance[i][j] for j in range(count) if j != i) for i in range(count)]
    picked = [max(range(count), key=lambda i: (nearest[i], -i))]
    while len(picked) < picks:
        rest = [i for i in range(count) if i not in picked]
        picked.append(max(rest, key=lambda i: (min(distance[i][j] for j in picked), -i)))
    return picked


@pytest.mark.parametrize("block", [256, 5])
def test_max_min_order_equals_a_naive_loop_in_every_row(monkeypatch, block):
    monkeypatch.setattr("llava.pruning.diversity._BLOCK", block)  # rows of the distance matrix at one time
    generator = torch.Generator().manual_seed(4)
    counts = [23, 9, 14]
    tokens = torch.zeros(3, 23, 8)
    for row, count in enumerate(counts):
        tokens[row, :count] = torch.randn(count, 8, generator=generator)
    order = max_min_order(tokens, counts, 9)
    for row, count in enumerate(counts):
        assert order[row].tolist() == naive_diversity(tokens[row, :count], 9)


def unit(tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(tokens, dim=-1)


@pytest.mark.parametrize("sample", [1, 7, 64, 500])
@pytest.mark.parametrize("seed", range(3))
def test_the_most_isolated_token_is_that_of_all_pairs(seed, sample):
    """Clusters and strangers in rows of different length, of which a part may be chosen."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(30, 16, generator=generator)
    members = centers[torch.randint(30, (4, 300), generator=generator)]
    tokens = unit(
        members + 0.3 * torch.rand(4, 300, 1, generator=generator) * torch.randn(4, 300, 16, generator=generator)
    )
    counts = [300, 299, 2, 1]
    padding = torch.arange(300) >= torch.tensor(counts)[:, None]
    far = isolation(tokens, padding)
    assert most_isolated(tokens, counts, sample).tolist() == far.argmax(1).tolist()
    able = (torch.rand(4, 300, generator=generator) < 0.4) & ~padding
    able[2:, 0] = True
    found = most_isolated(tokens, counts, sample, able)
    assert found.tolist() == far.masked_fill(~able, -torch.inf).argmax(1).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_of_equally_isolated_tokens_the_first_is_chosen(seed):
    """Tokens are axes: those that no other repeats are all equally far, 1, from their neighbors, the others 0."""
    axes = torch.randint(60, (1, 200), generator=torch.Generator().manual_seed(seed))
    axes[0, 150:152] = torch.tensor([60, 61])
    tokens = torch.eye(62)[axes[0]][None]
    alone = [place for place, axis in enumerate(axes[0].tolist()) if (axes == axis).sum() == 1]
    assert most_isolated(tokens, [200], 8).tolist() == [min(alone)]


def test_few_pairs_are_looked_at_where_tokens_resemble_others():
    """A picture of 25 things of 40 tokens each and one of which there is but one: few distances are needed. Where no
    token resembles another, each pair is needed once at most.
    """
    generator = torch.Generator().manual_seed(0)
    things = torch.randn(25, 32, generator=generator).repeat_interleave(40, 0)
    picture = unit(things + 0.05 * torch.randn(1000, 32, generator=generator))
    picture[611] = unit(torch.randn(32, generator=generator))
    strangers = unit(torch.randn(1000, 512, generator=generator))
    for tokens, pairs, best in ((picture, 1000 * 130, 611), (strangers, 1000**2 * 0.65, None)):
        with FlopCounterMode(display=False) as counter:
            found = int(most_isolated(tokens[None], [1000], 64))
        assert found == int(isolation(tokens[None], None).argmax()) and best in (None, found)
        assert counter.get_total_flops() <= 2 * tokens.shape[1] * pairs


# --- greedy coverage: looking again only where a gain may be the largest chooses what looking at all does ---


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
