"""Video-LLaVA: a CLIP-like tower for images and one for videos; frames keep their CLS token among the visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.families.base import Call, Family, Placed, whole, without_cls


class VideoLlava(Family):
    name = "video_llava"
    classes = ("VideoLlavaForConditionalGeneration", "VideoLlavaModel")
    modalities = ("image", "video")

    def tower(self, model: Any, modality: str) -> Any:
        return model.image_tower if modality == "image" else model.video_tower

    def tokens(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_index, "video": config.video_token_index}

    def place(self, call: Call, runs: Sequence[Tensor]) -> list[Placed]:
        values = whole(runs)
        if call.modality == "image":
            return [Placed(image) for image in without_cls(call, values)]
        frames = call.arguments["pixel_values_videos"].shape[1]
        number = torch.arange(frames, device=values.device).repeat_interleave(values.shape[1])
        return [Placed(video.flatten(0, 1), None, number) for video in torch.split(values, frames)]
