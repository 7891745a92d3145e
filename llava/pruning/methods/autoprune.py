"""AutoPrune, "Each Complexity Deserves a Pruning Policy" (NeurIPS 2025, arXiv 2509.23931).

After layer 0 a coarse cut keeps ``2.5 * target_tokens`` visual tokens by CLS attention plus text attention. The mutual
information of the text-to-visual attention in layer 1 sets the slope of a logistic retention curve, which is scaled to
the budget; after every further layer the least attended tokens go, and the better part of them is recycled: clustered
and appended as a few merged tokens. No training.

Budget: ``target_tokens`` is the nominal mean, the tokens *leaving* the layers (layer 0 charged with what it leaves).
The processed mean is about ``target_tokens + (N - tokens leaving the last layer) / layers``, always larger.

Behaviors of the published code that affect the result are kept and marked "published" below. Deviations: merging is
deterministic (no random tie-break), mutual information and scores are summed in float32, any batch size works, and with
several images all of them are pruned together, not only the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import LayerView, OptionError, PruningMethod, Rows, Selection
from llava.pruning.information import mutual_information
from llava.pruning.retention import (
    coarse_token_count,
    dynamic_slope,
    fit_to_budget,
    prune_step,
    retention_curve,
    tokens_to_keep,
)
from llava.pruning.selection import (
    counts_to_mask,
    density_peaks,
    descending_order,
    first_in_sequence_order,
    merge_clusters,
    on_device,
    top_k,
)


@dataclass(frozen=True, kw_only=True)
class AutoPrune(PruningMethod):
    """Complexity-adaptive pruning along a logistic retention curve.

    Attributes:
        target_tokens: nominal mean of visual tokens per layer.
        x0: inflection of the curve in layers, absolute: the same for 32 and 40 layers (published).
        k0: slope of the curve at zero mutual information.
        gamma: how much a bit of mutual information flattens the curve.
        amplitude: height of the unscaled curve.
        coarse_factor: multiple of the target that survives layer 0.
        text_weight: weight of the text term in the score of layer 0.
        recycle_fraction: share of the dropped tokens that is merged; 0 switches recycling off.
        eps: constant of the mutual information.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    x0: float = 14.9
    k0: float = 0.4
    gamma: float = 0.2
    amplitude: float = 0.75
    coarse_factor: float = 2.5
    text_weight: float = 0.3
    recycle_fraction: float = 0.3
    eps: float = 1e-6

    name: ClassVar[str] = "autoprune"
    needs_cls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_tokens is None:
            raise OptionError("autoprune needs target_tokens")
        if self.coarse_factor < 1:
            raise OptionError(f"coarse_factor must be at least 1, got {self.coarse_factor}")
        for option in ("amplitude", "eps"):
            if getattr(self, option) <= 0:
                raise OptionError(f"{option} must be above 0, got {getattr(self, option)}")
        if not 0 <= self.recycle_fraction <= 1:
            raise OptionError(f"recycle_fraction must lie in 0..1, got {self.recycle_fraction}")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {layer: Rows.TEXT for layer in range(num_layers)}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if view.layer == 0:
            return self._coarse_cut(view, memory)
        if view.layer == 1:
            self._plan(view, memory)
        return self._follow_curve(view, memory)

    def _information(self, view: LayerView) -> Tensor:
        """Mutual information per sample, summed (not averaged) over the heads (published)."""
        rows = on_device(view.query_rows, view.device)[:, None]
        return mutual_information(view.attention_BHTV, self.eps, rows).sum(1)

    def _coarse_cut(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        # Published: only here the information is divided by the number of text tokens. It may be negative.
        information = self._information(view) / on_device(view.query_rows, view.device)
        scores = self.text_weight * information[:, None] * view.relevance_BV + view.cls_attention_BV
        memory.information = information
        memory.coarse = tuple(
            coarse_token_count(count, self.target_tokens, self.coarse_factor) for count in view.counts
        )
        memory.report = {"mutual_information": None, "slope": None, "merge_flops": [0] * len(view.counts)}
        return Selection(top_k(scores, view.counts, memory.coarse), memory.coarse)

    def _plan(self, view: LayerView, memory: SimpleNamespace) -> None:
        """Measure layer 1 and lay out the rest of the decoder: the one place where the host waits for the device."""
        layer0, layer1 = torch.stack((memory.information, self._information(view))).tolist()
        slopes = [dynamic_slope(information, self.k0, self.gamma) for information in layer1]
        memory.shares = [
            fit_to_budget(
                retention_curve(view.num_layers, slope, self.x0, self.amplitude),
                coarse,
                self.target_tokens,
                self.recycle_fraction,
            )
            for slope, coarse in zip(slopes, memory.coarse, strict=True)
        ]
        memory.report["mutual_information"] = [
            {"layer0": first, "layer1": second} for first, second in zip(layer0, layer1, strict=True)
        ]
        memory.report["slope"] = slopes

    def _follow_curve(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        steps = [
            # Published: the base of the count stays the token count after layer 0, whatever was merged since.
            prune_step(count, tokens_to_keep(coarse, shares[view.layer - 1]), self.recycle_fraction)
            for count, coarse, shares in zip(view.counts, memory.coarse, memory.shares, strict=True)
        ]
        keep = tuple(step.keep for step in steps)
        if keep == view.counts:
            return None
        order = descending_order(view.relevance_BV, view.counts)
        kept = first_in_sequence_order(order, keep)
        recycled = [step.recycled for step in steps]
        if max(recycled) == 0:
            return Selection(kept, keep)

        # The recycled tokens follow the kept ones in the order; they are merged from the layer's output.
        candidates = _behind(order, keep, max(recycled))
        tokens = view.hidden_of(candidates)
        clusters = [step.merged for step in steps]
        peaks = density_peaks(tokens, clusters, recycled)
        merged = merge_clusters(tokens, peaks.assignment_BM, max(clusters), recycled)
        source = candidates.gather(1, peaks.centers_BK)
        if min(clusters) < max(clusters):
            source = source.masked_fill(~counts_to_mask(clusters, max(clusters), view.device), order.shape[1])
        for row, step in enumerate(steps):
            memory.report["merge_flops"][row] += (step.recycled + step.merged) * step.recycled * tokens.shape[2]
        return Selection(kept, keep, merged, tuple(clusters), source)


def _behind(order_BV: Tensor, keep: tuple[int, ...], width: int) -> Tensor:
    """``width`` entries of each order behind the first ``keep[i]``, ``[B, width]``; past the end the last one again."""
    if len(keep) == 1:
        return order_BV[:, keep[0] : keep[0] + width]
    ranks = on_device(keep, order_BV.device)[:, None] + torch.arange(width, device=order_BV.device)
    return order_BV.gather(1, ranks.clamp_max(order_BV.shape[1] - 1))
