"""Idefics3 and SmolVLM: SigLIP without CLS, tiles with text between them, a pixel shuffle behind the tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llava.families.base import Call, Family, Placed, pooled, whole


class Idefics3(Family):
    name = "idefics3"
    classes = ("Idefics3ForConditionalGeneration", "Idefics3Model")
    has_cls = False

    def without_head(self, model: nn.Module) -> Any:
        return model if hasattr(model, "connector") else model.model

    def tower(self, model: Any, modality: str) -> Any:
        return model.vision_model

    def used_layer(self, model: Any, modality: str) -> int:
        return len(self.attentions(model, modality)) - 1

    def place(self, call: Call, runs: Sequence[Tensor]) -> list[Placed]:
        # One entry per tile: every tile is a block of its own in the prompt.
        return [Placed(tile) for tile in pooled(whole(runs), call.model.config.scale_factor)]


class SmolVLM(Idefics3):
    name = "smolvlm"
    classes = ("SmolVLMForConditionalGeneration", "SmolVLMModel")
