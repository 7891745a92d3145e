"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, 2 x 2 patches merged, M-RoPE, no CLS token.

Qwen2.5-VL looks at windows in most tower layers, and has its tokens in the order of the windows there. Qwen3-VL adds
features of several tower layers behind the first decoder layers (deepstack), which the engine lets travel with the
survivors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.families.base import Call, Family, Placed


class Qwen2VL(Family):
    name = "qwen2_vl"
    classes = ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
    has_cls = False
    modalities = ("image", "video")

    def tower(self, model: Any, modality: str) -> Any:
        return model.visual

    def attentions(self, model: Any, modality: str) -> list[nn.Module]:
        return [block.attn for block in model.visual.blocks]

    def used_layer(self, model: Any, modality: str) -> int:
        return len(model.visual.blocks) - 1

    def grids(self, call: Call) -> Tensor:
        """Patches along time, height and width, per image or video."""
        grids: Tensor = call.arguments[f"{call.modality}_grid_thw"]
        return grids

    def units(self, call: Call, units_UF: Tensor) -> Tensor:
        """Bring merged tokens from the order of the tower into that of the prompt."""
        return units_UF

    def place(self, call: Call, runs: Sequence[Tensor]) -> list[Placed]:
        merge = call.model.visual.spatial_merge_size**2
        # A call per picture or frame (flash attention: one for all); the patches of a unit stand side by side.
        patches = torch.cat([run.flatten(0, 1) for run in runs])
        units = self.units(call, patches.reshape(-1, merge, patches.shape[1]).mean(1))
        sizes = (self.grids(call).prod(-1) // merge).tolist()
        return [Placed(values) for values in torch.split(units, sizes)]


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"
    classes = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")

    def global_layers(self, model: Any, modality: str) -> list[int]:
        return sorted(model.visual.fullatt_block_indexes)

    def units(self, call: Call, units_UF: Tensor) -> Tensor:
        visual = call.model.visual
        side = visual.window_size // visual.spatial_merge_size // visual.patch_size
        order = window_order(self.grids(call), visual.spatial_merge_size, side).to(units_UF.device)
        return units_UF[order.argsort()]


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"
    classes = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")

    def grids(self, call: Call) -> Tensor:
        # Without the name of the modality where it encodes videos as images.
        name = "video_grid_thw" if call.arguments.get("video_grid_thw") is not None else "image_grid_thw"
        grids: Tensor = call.arguments[name]
        return grids


def window_order(grids: Tensor, merge: int, side: int) -> Tensor:
    """Which merged token of the prompt stands at each place in a tower with windows of ``side`` x ``side`` of them.

    Windows follow one another in raster order, and so do the tokens in each; those at the border are smaller.
    """
    orders, first = [], 0
    for frames, height, width in grids.tolist():
        rows, columns = height // merge, width // merge
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        windows = row // side * -(-columns // side) + column // side
        inside = windows * side**2 + row % side * side + column % side
        order = inside.flatten().argsort()
        orders += [order + first + frame * rows * columns for frame in range(frames)]
        first += frames * rows * columns
    return torch.cat(orders)
