"""Choosing and merging tokens: pure tensor functions, deterministic, batched.

Shapes: B batch rows, V visual tokens (padded to the longest row), M tokens to merge, K clusters, C channels.
Rows of different length are padded at the end; counts are host integers, so no function here waits for the device.
Ties always go to the lower index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SHRINK = 1e-6
"""What the published code adds to the number of members of a cluster."""


def on_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Host numbers as a tensor, without making the host wait for the device (a plain copy to CUDA would)."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    if torch.cuda.is_current_stream_capturing():
        # A graph would read this memory again in every replay, long after it has been given back.
        raise RuntimeError("numbers of the host cannot become part of a CUDA graph")
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)


def take(tokens_NPC: Tensor, index_NK: Tensor) -> Tensor:
    """``[N, K, C]`` of ``[N, P, C]``. Whole rows are copied: ``gather``, with an index per number, takes far longer."""
    crops, patches, width = tokens_NPC.shape
    if crops > 1:
        index_NK = index_NK + torch.arange(0, crops * patches, patches, device=index_NK.device)[:, None]
    return tokens_NPC.flatten(0, 1).index_select(0, index_NK.flatten()).view(crops, -1, width)


def counts_to_mask(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Bool ``[B, width]``: True in the first ``counts[i]`` columns of row i."""
    return torch.arange(width, device=device) < on_device(counts, device)[:, None]


def last_places(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Bool ``[B, width]``: True in the last ``counts[i]`` columns of row i; text is padded at the front."""
    return counts_to_mask(counts, width, device).flip(1)


def descending_order(scores_BV: Tensor, counts: Sequence[int]) -> Tensor:
    """Indices ``[B, V]`` by falling score; ties by rising index; the padding behind ``counts[i]`` comes last."""
    if min(counts) < scores_BV.shape[1]:
        padding = ~counts_to_mask(counts, scores_BV.shape[1], scores_BV.device)
        scores_BV = scores_BV.masked_fill(padding, -torch.inf)
    return scores_BV.sort(dim=1, descending=True, stable=True).indices


def first_in_sequence_order(order_BV: Tensor, keep: Sequence[int], width: int | None = None) -> Tensor:
    """The first ``keep[i]`` entries of each order, sorted by index: ``[B, max(keep)]``.

    Entries behind ``keep[i]`` are padding with the value V, which is no valid index; give it as ``width`` if the
    order is cut short.
    """
    width = order_BV.shape[1] if width is None else width
    chosen = order_BV[:, : max(keep)]
    if min(keep) < chosen.shape[1]:
        chosen = chosen.masked_fill(~counts_to_mask(keep, chosen.shape[1], chosen.device), width)
    return chosen.sort(dim=1).values


def top_k(scores_BV: Tensor, counts: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Indices of the ``keep[i]`` best of the first ``counts[i]`` scores, in sequence order, padded with V."""
    return first_in_sequence_order(descending_order(scores_BV, counts), keep)


class DensityPeaks(NamedTuple):
    """Intermediate results of density-peak clustering; see :func:`density_peaks`."""

    density_BM: Tensor
    parent_distance_BM: Tensor
    score_BM: Tensor
    centers_BK: Tensor
    assignment_BM: Tensor


def density_peaks(
    tokens_BMC: Tensor, clusters: Sequence[int], counts: Sequence[int], noise_BM: Tensor | None = None
) -> DensityPeaks:
    """Density-peak clustering with k nearest neighbors (DPC-kNN), k = number of clusters, the token itself included.

    Density is ``exp(-mean of the k smallest squared distances)``; the distance to the parent is the smallest one to
    a strictly denser token, or the largest distance of the sample where there is none; the centers are the tokens with
    the largest product of both.

    With two clusters the closest pair always ties for the top density. Neither is then denser than the other, so both
    have the largest parent distance and *both become centers*, the lower index (higher relevance) first. The published
    code adds unseeded noise: in float32 it parts the pair, so that one becomes the other's parent and the second center
    is another token; in half precision it is rounded away and the centers are those found here (docs/reproducing.md).

    Args:
        tokens_BMC: ``[B, M, C]``, row i valid up to ``counts[i]``.
        clusters: clusters per row, at least 1 and at most ``counts[i]`` where ``counts[i] > 0``.
        counts: valid tokens per row.
        noise_BM: uniform noise that stands in for the published random tie-break (scaled by 1e-6); default none.

    Returns:
        float32 density, parent distance and score; centers ``[B, K]`` in order of falling score (valid up to
        ``clusters[i]``); cluster number of every token.
    """
    tokens = tokens_BMC.float()
    batch, width, channels = tokens.shape
    device = tokens.device
    distance = _distances(tokens) / channels**0.5

    ragged = min(counts) < width
    if ragged:
        valid = counts_to_mask(counts, width, device)
        distance = distance.masked_fill(~valid[:, None, :], torch.inf)

    most = max(clusters)
    nearest = distance.sort(dim=2).values[:, :, :most].square()
    if min(clusters) < most:
        k = on_device(clusters, device).clamp_min(1)
        inside = torch.arange(most, device=device) < k[:, None, None]
        density = torch.exp(-nearest.masked_fill(~inside, 0).sum(2) / k[:, None])
    else:
        density = torch.exp(-nearest.mean(2))
    if noise_BM is not None:
        density = density + noise_BM.to(density) * 1e-6

    if ragged:
        both = valid[:, :, None] & valid[:, None, :]
        density = density.masked_fill(~valid, -1.0)
        farthest = distance.masked_fill(~both, 0).amax((1, 2))
    else:
        farthest = distance.amax((1, 2))
    denser = density[:, None, :] > density[:, :, None]
    parent = torch.where(denser, distance, farthest[:, None, None]).amin(2)

    score = density * parent
    centers = descending_order(score, counts)[:, :most]
    to_center = take(distance, centers)
    # A center belongs to its own cluster even if it coincides with an earlier one.
    to_center.scatter_(2, centers[:, :, None], -1.0)
    if min(clusters) < most:
        to_center = to_center.masked_fill(~counts_to_mask(clusters, most, device)[:, :, None], torch.inf)
    assignment = to_center.argmin(1)  # of equals the first
    return DensityPeaks(density, parent, score, centers, assignment)


def _distances(tokens_BMC: Tensor) -> Tensor:
    """Euclidean distances ``[B, M, M]``, symmetric, with a zero diagonal.

    As one matrix product, several times faster than ``torch.cdist``'s exact form for a hundred wide tokens. In float32
    that form is inexact near zero and would break the exact ties of close pairs; in float64 it is not.
    """
    if tokens_BMC.device.type == "mps":  # has no float64
        return torch.cdist(tokens_BMC, tokens_BMC, compute_mode="donot_use_mm_for_euclid_dist")
    wide = tokens_BMC.double()
    product = wide @ wide.transpose(1, 2)
    norms = product.diagonal(dim1=1, dim2=2)
    squared = (norms[:, :, None] + norms[:, None, :]).sub_(product, alpha=2)
    return squared.clamp_min_(0).sqrt_().float()


def dpc_knn_merge(
    tokens: Tensor,
    clusters: int | Sequence[int],
    *,
    counts: Sequence[int] | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Merge tokens into cluster means with :func:`density_peaks`; deterministic.

    Two clusters of distinct tokens grow around the two that are closest to each other, which tie for the highest
    density; without ``noise`` nothing parts them.

    Args:
        tokens: ``[M, C]`` or ``[B, M, C]``, most relevant first.
        clusters: number of clusters, one for all rows or one per row.
        counts: valid tokens per row where rows are padded at the end; default M.
        noise: see :func:`density_peaks`, ``[M]`` or ``[B, M]``.

    Returns:
        ``[K, C]`` or ``[B, max(clusters), C]`` in the dtype of ``tokens``, clusters in order of falling center score.
        Each is the sum of its members divided by ``n + 1e-6``, as published.

    Raises:
        ValueError: a cluster count below 1 or above the number of tokens.
    """
    batched = tokens if tokens.ndim == 3 else tokens[None]
    if noise is not None and noise.ndim == 1:
        noise = noise[None]
    counts = [batched.shape[1]] * len(batched) if counts is None else counts
    clusters = [clusters] * len(batched) if isinstance(clusters, int) else clusters
    for wanted, available in zip(clusters, counts, strict=True):
        if not (1 <= wanted <= available or wanted == available == 0):
            raise ValueError(f"cannot merge {available} tokens into {wanted} clusters")
    if max(clusters) == 1:
        merged = merge_all(batched, counts)
    else:
        peaks = density_peaks(batched, clusters, counts, noise)
        merged = merge_clusters(batched, peaks.assignment_BM, max(clusters), counts)
    return merged if tokens.ndim == 3 else merged[0]


def merge_all(tokens_BMC: Tensor, counts: Sequence[int]) -> Tensor:
    """One cluster of all tokens, ``[B, 1, C]``: what :func:`merge_clusters` makes of it, without looking for it.

    Each token is then its own only neighbor, so all densities are 1, all scores are equal, and the first token is the
    center. Fewer than ten recycled tokens become one cluster; at usual budgets that is every layer.
    """
    members = [count + _SHRINK for count in counts]
    divisor: float | Tensor
    if min(counts) == max(counts) == tokens_BMC.shape[1]:
        divisor = members[0]
    else:
        valid = counts_to_mask(counts, tokens_BMC.shape[1], tokens_BMC.device)
        tokens_BMC = tokens_BMC.masked_fill(~valid[:, :, None], 0)
        divisor = on_device(members, tokens_BMC.device)[:, None, None]
    return tokens_BMC.sum(1, keepdim=True, dtype=torch.float32).div_(divisor).to(tokens_BMC.dtype)


def merge_clusters(tokens_BMC: Tensor, assignment_BM: Tensor, clusters: int, counts: Sequence[int]) -> Tensor:
    """Unweighted cluster means ``[B, clusters, C]``, shrunk by `_SHRINK` as in the published code."""
    members = assignment_BM[:, None, :] == torch.arange(clusters, device=tokens_BMC.device)[:, None]
    if min(counts) < tokens_BMC.shape[1]:
        members = members & counts_to_mask(counts, tokens_BMC.shape[1], tokens_BMC.device)[:, None, :]
    weights = members.float()
    weights = weights / (weights.sum(2, keepdim=True) + _SHRINK)
    return (weights @ tokens_BMC.float()).to(tokens_BMC.dtype)
