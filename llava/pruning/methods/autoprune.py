"""AutoPrune, "Each Complexity Deserves a Pruning Policy" (NeurIPS 2025, arXiv 2509.23931).

After layer 0 a coarse cut keeps ``2.5 * target_tokens`` visual tokens by CLS attention plus text attention. The mutual
information of the text-to-visual attention in layer 1 sets the slope of a logistic retention curve, which is scaled to
the budget; after every further layer the least attended tokens go, and the better part of them is recycled: clustered
and appended as a few merged tokens. No training.

Budget: ``target_tokens`` is the nominal mean, the tokens *leaving* the layers (layer 0 charged with what it leaves).
The processed mean is about ``target_tokens + (N - tokens leaving the last layer) / layers``, always larger. With
``budget="processed"`` the same curve is scaled for the processed mean; as layer 0 then takes ``N / layers`` of it, the
coarse cut is computed from what is left, ``coarse_factor * (target_tokens - N / layers)``.

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
from llava.pruning.recycling import keep_and_recycle
from llava.pruning.retention import (
    coarse_token_count,
    dynamic_slope,
    layer_shares,
    prune_step,
    tokens_to_keep,
)
from llava.pruning.selection import descending_order, on_device, top_k

_PUBLISHED_DEPTH = 32


@dataclass(frozen=True, kw_only=True)
class AutoPrune(PruningMethod):
    """Complexity-adaptive pruning along a logistic retention curve.

    Attributes:
        target_tokens: nominal mean of visual tokens per layer.
        x0: inflection of the curve in layers, absolute: the same for 32 and 40 layers (published).
        x0_relative: read ``x0`` on a scale of 32 layers, so that the curve bends at the same share of any depth.
        k0: slope of the curve at zero mutual information.
        gamma: how much a bit of mutual information flattens the curve.
        amplitude: height of the unscaled curve.
        coarse_factor: multiple of the target that survives layer 0.
        text_weight: weight of the text term in the score of layer 0.
        recycle_fraction: share of the dropped tokens that is merged; 0 switches recycling off.
        eps: constant of the mutual information.
        mi_layer: layer whose mutual information sets the slope; the curve starts after it.
        slope: this slope for every sample; mutual information is then not looked at.
        coarse_cut: whether layer 0 cuts at all; without it the curve starts from all tokens.
        cls_weight: weight of the CLS term in the score of layer 0; 0 needs no CLS attention.
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
    x0_relative: bool = False
    mi_layer: int = 1
    slope: float | None = None
    coarse_cut: bool = True
    cls_weight: float = 1.0

    name: ClassVar[str] = "autoprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_tokens is None:
            raise OptionError("autoprune needs target_tokens")
        self.require("coarse_factor", self.coarse_factor >= 1, "must be at least 1")
        for option in ("amplitude", "eps"):
            self.require(option, getattr(self, option) > 0, "must be above 0")
        self.require("recycle_fraction", 0 <= self.recycle_fraction <= 1, "must lie in 0..1")
        self.require("mi_layer", self.mi_layer >= 0, "must be at least 0")
        self.require("slope", self.slope is None or self.slope >= 0, "must be at least 0")
        if self.coarse_cut and self.text_weight == 0 and self.cls_weight == 0:
            raise OptionError(
                "text_weight and cls_weight are both 0: the cut after layer 0 needs one (or coarse_cut=false)"
            )

    @property
    def needs_cls(self) -> bool:
        return self.coarse_cut and self.cls_weight != 0

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        self.require("mi_layer", self.mi_layer < max(num_layers, 2), f"must be below the decoder's {num_layers} layers")
        start = max(self.mi_layer, 1)
        first = Rows.TEXT if self.mi_layer == 0 or (self.coarse_cut and self.text_weight) else Rows.NONE
        return {0: first, **{layer: Rows.TEXT for layer in range(start, num_layers)}}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if view.layer == 0:
            memory.report = {"mutual_information": None, "slope": None, "merge_flops": [0] * len(view.counts)}
            memory.entering = view.counts
            memory.information, memory.text_rows = {}, view.query_rows
        if view.layer in (0, self.mi_layer) and self.slope is None and view.attention_BHTV is not None:
            memory.information[view.layer] = self._information(view)
        selection = None
        if view.layer == 0:
            memory.coarse = tuple(self._coarse(count, view.num_layers) for count in view.counts)
            selection = self._coarse_cut(view, memory) if self.coarse_cut else None
        if view.layer == self.mi_layer:
            self._plan(view, memory)
        return self._follow_curve(view, memory) if view.layer >= max(self.mi_layer, 1) else selection

    def _coarse(self, count: int, num_layers: int) -> int:
        if not self.coarse_cut:
            return count
        target = self.target_tokens
        if self.budget == "processed":
            target = max(target - count / num_layers, 1)
        return coarse_token_count(count, target, self.coarse_factor)

    def _information(self, view: LayerView) -> Tensor:
        """Mutual information per sample, summed (not averaged) over the heads (published)."""
        rows = on_device(view.query_rows, view.device)[:, None]
        return mutual_information(view.attention_BHTV, self.eps, rows).sum(1)

    def _coarse_cut(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        scores = torch.zeros((), device=view.device)
        if self.text_weight:
            # Published: only here the information is divided by the number of text tokens. It may be negative.
            total = memory.information[0] if self.slope is None else self._information(view)
            information = total / on_device(view.query_rows, view.device)
            scores = self.text_weight * information[:, None] * view.relevance_BV
        if self.needs_cls:
            cls = view.cls_attention_BV
            scores = scores + (cls if self.cls_weight == 1 else self.cls_weight * cls)
        return Selection(top_k(scores, view.counts, memory.coarse), memory.coarse)

    def _plan(self, view: LayerView, memory: SimpleNamespace) -> None:
        """Lay out the rest of the decoder: the one place where the host waits for the device."""
        slopes = [self.slope] * len(view.counts)
        if self.slope is None:
            names = {f"layer{layer}": values for layer, values in memory.information.items()}
            if 0 in memory.information:
                names["layer0"] = memory.information[0] / on_device(memory.text_rows, view.device)
            measured = torch.stack((*names.values(), memory.information[self.mi_layer])).tolist()
            slopes = [dynamic_slope(information, self.k0, self.gamma) for information in measured[-1]]
            memory.report["mutual_information"] = [
                dict(zip(names, values, strict=True)) for values in zip(*measured[:-1], strict=True)
            ]
        memory.report["slope"] = slopes
        x0 = self.x0 * view.num_layers / _PUBLISHED_DEPTH if self.x0_relative else self.x0
        memory.shares = [
            layer_shares(
                view.num_layers,
                slope,
                coarse,
                self.target_tokens,
                x0,
                self.amplitude,
                self.recycle_fraction,
                first=max(self.mi_layer, 1),
                entering=entering if self.budget == "processed" else None,
            )
            for slope, coarse, entering in zip(slopes, memory.coarse, memory.entering, strict=True)
        ]

    def _follow_curve(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        steps = [
            # Published: the base of the count stays the token count after layer 0, whatever was merged since.
            prune_step(count, tokens_to_keep(coarse, shares[view.layer]), self.recycle_fraction)
            for count, coarse, shares in zip(view.counts, memory.coarse, memory.shares, strict=True)
        ]
        if tuple(step.keep for step in steps) == view.counts:
            return None
        selection, flops = keep_and_recycle(view, descending_order(view.relevance_BV, view.counts), steps)
        memory.report["merge_flops"] = [a + b for a, b in zip(memory.report["merge_flops"], flops, strict=True)]
        return selection
