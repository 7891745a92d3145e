"""FasterVLM, "[CLS] Attention is All You Need for Training-Free Visual Token Pruning" (arXiv 2412.01818 v1).

Before the decoder, keep the visual tokens with the highest CLS attention of the vision tower's selected layer (mean
over heads), in raster order. Positions are contiguous.

Budget: ``target_tokens`` tokens enter the decoder and stay, so nominal and processed mean are both the target. The
published code keeps so many of *each* crop (LLaVA-1.6): here the crops and images of a sample share the budget in
proportion to their patches, and the tokens of a crop compete with each other. ``across_crops`` lets all tokens of a
sample compete, although CLS attention is a distribution within one crop.

Deviations: patches that are padding have no CLS attention (they are masked), which the published code does not do; with
unpadding, newlines stay beside the budget, while the published code removes unpadding and newlines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.budget import crop_quotas
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.selection import descending_order, on_device
from llava.pruning.types import BEFORE_DECODER, Rows, Selection
from llava.pruning.views import first_of_groups


@dataclass(frozen=True, kw_only=True)
class FasterVLM(DecoderMethod):
    """Keep the ``target_tokens`` visual tokens with the highest CLS attention.

    Attributes:
        across_crops: the tokens of all crops and images of a sample compete, instead of those of each among themselves.
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    across_crops: bool = False

    name: ClassVar[str] = "fastervlm"
    shares_views: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    needs_cls: ClassVar[bool] = True

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection:
        return self.choose(view, tuple(map(min, self.targets(view), view.counts)))

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        scores = view.cls_attention_BV
        if not self.across_crops:
            scores = first_of_each_crop(view, scores, keep)
        return view.best(scores, keep)


def first_of_each_crop(view: LayerView, scores_BV: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Scores with which the best of each crop, as many as its share of ``keep``, come in front of all others.

    Crops that have fewer tokens left than their share leave the rest of it to the best of the others.
    """
    labels, quotas = [], []
    for images, wanted in zip(view.images, keep, strict=True):
        # Crops in the order of their first token, numbered through all images of the row.
        names = [(number, crop) for number, image in enumerate(images) for crop in image]
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        labels.append([places[name] for name in names])
        quotas.append(crop_quotas([names.count(name) for name in places], wanted))
    most = max(map(len, quotas))
    if most <= 1 or max(keep) == 0:
        return scores_BV
    device, width = scores_BV.device, max(map(len, labels))
    # One group more than any row has: it takes the padding and merged tokens, and has no share.
    labels_BN = on_device([row + [most] * (width + 1 - len(row)) for row in labels], device)
    quotas_BG = on_device([row + [0] * (most + 1 - len(row)) for row in quotas], device)
    origins_BV = view.origins_BV.clamp_max(width)
    group_BV = labels_BN.gather(1, torch.where(origins_BV < 0, width, origins_BV))
    order_BV = descending_order(scores_BV, view.counts)
    return first_of_groups(order_BV, group_BV, quotas_BG)
