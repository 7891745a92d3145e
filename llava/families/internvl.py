"""InternVL: InternViT with CLS; a pixel shuffle makes one visual token of 2 x 2 patches; tiles follow one another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llava.families.base import Call, Family, Placed, pooled, whole, without_cls


class InternVL(Family):
    name = "internvl"
    classes = ("InternVLForConditionalGeneration", "InternVLModel")

    def place(self, call: Call, runs: Sequence[Tensor]) -> list[Placed]:
        factor = round(1 / call.model.config.downsample_ratio)
        return [Placed(tile) for tile in pooled(without_cls(call, whole(runs)), factor)]
