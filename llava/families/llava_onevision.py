"""LLaVA-OneVision: SigLIP without CLS; images as in LLaVA-NeXT, scaled down where they are many crops; frames of a
video pooled to a quarter, one newline at the end of a video.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.families.base import Call, Family, Placed, packed, whole, without_cls


class LlavaOnevision(Family):
    name = "llava_onevision"
    classes = ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel")
    has_cls = False
    has_newlines = True
    modalities = ("image", "video")

    def place(self, call: Call, runs: Sequence[Tensor]) -> list[Placed]:
        values = without_cls(call, whole(runs))
        if call.modality == "image":
            return packed(call, values)
        videos, frames = call.arguments["pixel_values_videos"].shape[:2]
        frame_values = call.model.apply_pooling(values)
        per_frame = frame_values.shape[1]
        placed = []
        for video in frame_values.unflatten(0, (videos, frames)):
            flat = torch.nn.functional.pad(video.flatten(0, 1), (0, 0, 0, 1))
            newline = torch.arange(len(flat), device=flat.device) == len(flat) - 1
            number = torch.arange(len(flat), device=flat.device) // per_frame
            placed.append(Placed(flat, newline, number))
        return placed
