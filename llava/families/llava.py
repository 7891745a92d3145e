"""LLaVA-1.5 in transformers' layout: a CLIP tower with CLS, one crop per image, 1-D positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llava.families.base import Call, Family, Placed, whole, without_cls


class Llava(Family):
    name = "llava"
    classes = ("LlavaForConditionalGeneration", "LlavaModel")

    def place(self, call: Call, runs: Sequence[Tensor]) -> list[Placed]:
        return [Placed(image) for image in without_cls(call, whole(runs))]
