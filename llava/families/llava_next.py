"""LLaVA-NeXT (1.6): a base view and tiles of an image, a newline token behind every row of patches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llava.families.base import Call, Family, Placed, packed, whole, without_cls


class LlavaNext(Family):
    name = "llava_next"
    classes = ("LlavaNextForConditionalGeneration", "LlavaNextModel")
    has_newlines = True

    def place(self, call: Call, runs: Sequence[Tensor]) -> list[Placed]:
        return packed(call, without_cls(call, whole(runs)))
