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

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from llava.pruning.engine.notices import say
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod, PruningMethod
from llava.pruning.methods.autoprune.curve import (
    CURVES,
    coarse_token_count,
    dynamic_slope,
    planned_counts,
)
from llava.pruning.methods.autoprune.information import mutual_information
from llava.pruning.recycling import keep_and_recycle, prune_step
from llava.pruning.types import OptionError, Rows, Selection


@dataclass(frozen=True, kw_only=True)
class AutoPrune(DecoderMethod):
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
        slope_step: round the slope of every sample to multiples of this, so that there are few schedules; 0: as it is.
        coarse_cut: whether layer 0 cuts at all; without it the curve starts from all tokens.
        curve: name of the curve whose shares are scaled to the budget, see :data:`~.curve.CURVES`; None: the published
            ``logistic``.
        cls_weight: weight of the CLS term in the score of layer 0; 0 needs no CLS attention.
        noise_seed: draw the noise of the published clustering with this seed (the published code has none); None: no
            noise, and two clusters grow around one pair of tokens, see docs/reproducing.md.
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
    slope_step: float = 0.0
    coarse_cut: bool = True
    cls_weight: float = 1.0
    curve: str | None = None
    noise_seed: int | None = None

    name: ClassVar[str] = "autoprune"
    shares_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("coarse_factor", self.coarse_factor >= 1, "must be at least 1")
        for option in ("amplitude", "eps"):
            self.require(option, getattr(self, option) > 0, "must be above 0")
        self.require("recycle_fraction", 0 <= self.recycle_fraction <= 1, "must lie in 0..1")
        self.require("curve", self.curve is None or self.curve in CURVES, f"must be one of {', '.join(sorted(CURVES))}")
        self.require("mi_layer", self.mi_layer >= 0, "must be at least 0")
        self.require("slope_step", self.slope_step >= 0, "must be at least 0")
        self.require("slope", self.slope is None or self.slope >= 0, "must be at least 0")
        if self.coarse_cut and self.text_weight == 0 and self.cls_weight == 0:
            raise OptionError(
                "text_weight and cls_weight are both 0: the cut after layer 0 needs one (or coarse_cut=false)"
            )

    @property
    def needs_cls(self) -> bool:  # type: ignore[override]
        return self.coarse_cut and self.cls_weight != 0

    def without_patches(self) -> PruningMethod:
        """Without the CLS term of the cut behind layer 0; a notice says so."""
        if not self.needs_cls or not self.text_weight:
            return super().without_patches()
        say(
            self.name,
            "cls_weight=0, because the image adapter of this model mixes the patches that CLS attention is about",
        )
        return replace(self, cls_weight=0.0).without_patches()

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return self.noise_seed is None  # drawn by the number of the sample

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        if self.noise_seed is None:
            del values["noise_seed"]
        if self.curve is None:
            del values["curve"]  # records from before there was a choice stay equal
        if not self.slope_step:
            del values["slope_step"]
        return values

    @property
    def _first(self) -> int:
        """The first layer that the curve decides on."""
        return max(self.mi_layer, 1)

    def _measures(self, layer: int) -> bool:
        """Whether the mutual information of a layer is needed: for the text term of the cut, or for the slope."""
        cuts = layer == 0 and self.coarse_cut and self.text_weight != 0
        return cuts or (layer == self.mi_layer and self.slope is None)

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        self.require("mi_layer", self.mi_layer < max(num_layers, 2), f"must be below the decoder's {num_layers} layers")
        curve = dict.fromkeys(range(self._first, num_layers), Rows.TEXT)
        return {0: Rows.TEXT if self._measures(0) else Rows.NONE, **curve}

    def observe(self, view: LayerView, memory: SimpleNamespace) -> None:
        if view.layer == 0:
            memory.report = {"mutual_information": None, "slope": None}
            memory.information, memory.entering = {}, view.counts
            memory.coarse = self._coarse(view)
        if self._measures(view.layer):
            # Summed, not averaged, over the heads (published).
            rows = view.query_rows_B
            rows = rows if isinstance(rows, int) else rows[:, None]
            memory.information[view.layer] = mutual_information(view.attention_BHTV, self.eps, rows).sum(1)

    def decide(self, view: LayerView, memory: SimpleNamespace) -> Hashable:
        if view.layer != self.mi_layer:
            return None
        memory.keep = self._plan(view, memory)
        return tuple(memory.keep)

    def decision_layer(self, num_layers: int) -> int | None:
        return self.mi_layer if self.slope is None else None

    def passes(self, layer: int, counts: tuple[int, ...], memory: SimpleNamespace) -> bool:
        if layer <= self.mi_layer or layer < self._first:
            return False
        return all(keep[layer] >= count for keep, count in zip(memory.keep, counts, strict=True))

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        if view.layer >= self._first:
            return self._follow_curve(view, memory)
        return self._cut(view, memory) if self.coarse_cut else None

    def _coarse(self, view: LayerView) -> tuple[int, ...]:
        """Per sample the visual tokens after layer 0."""
        if not self.coarse_cut:
            return view.counts
        charged = view.num_layers if self.budget == "processed" else None
        rows = zip(view.counts, self.targets(view), strict=True)
        return tuple(coarse_token_count(count, target, self.coarse_factor, charged) for count, target in rows)

    def _cut(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        scores = torch.zeros((), device=view.device)
        if self.text_weight:
            # Published: only here the information is divided by the number of text tokens. It may be negative.
            information = memory.information[0] / view.query_rows_B
            scores = self.text_weight * information[:, None] * view.relevance_BV
        if self.needs_cls:
            scores = scores + self.cls_weight * view.cls_attention_BV
        return view.best(scores, memory.coarse)

    def _plan(self, view: LayerView, memory: SimpleNamespace) -> list[tuple[int, ...]]:
        """Per sample the tokens to keep after each layer."""
        slopes = [self.slope] * len(view.counts) if self.slope is not None else self._slopes(view, memory)
        memory.report["slope"] = slopes
        entering = memory.entering if self.budget == "processed" else [None] * len(slopes)
        curve = self.x0, self.amplitude, self.x0_relative, self.curve or "logistic"
        return [
            planned_counts(view.num_layers, slope, *curve, coarse, target, self.recycle_fraction, self._first, tokens)
            for slope, coarse, target, tokens in zip(slopes, memory.coarse, self.targets(view), entering, strict=True)
        ]

    def _slopes(self, view: LayerView, memory: SimpleNamespace) -> list[float]:
        """Slope per sample, from the mutual information: the one place where the host waits for the device."""
        layers = list(memory.information)
        measured = torch.stack([bits.to(view.device) for bits in memory.information.values()]).tolist()
        memory.report["mutual_information"] = [
            {f"layer{layer}": bits if layer else bits / rows for layer, bits in zip(layers, sample, strict=True)}
            for sample, rows in zip(zip(*measured, strict=True), view.query_rows, strict=True)
        ]
        slopes = [dynamic_slope(bits, self.k0, self.gamma) for bits in measured[layers.index(self.mi_layer)]]
        return [round(slope / self.slope_step) * self.slope_step for slope in slopes] if self.slope_step else slopes

    def _follow_curve(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        steps = [
            prune_step(count, keep[view.layer], self.recycle_fraction)
            for count, keep in zip(view.counts, memory.keep, strict=True)
        ]
        if tuple(step.keep for step in steps) == view.counts:
            return None
        return keep_and_recycle(view, view.relevance_BV, steps, memory, self.noise_seed)
