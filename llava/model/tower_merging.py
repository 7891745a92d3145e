"""Merging tokens inside the layers of a CLIP vision tower.

Splits an encoder layer into its attention and its MLP, asks the pruning method in between, and keeps the books: how
many patches a token stands for, and whose place it has. Which tokens merge is the method's business.

Shapes: N crops, T tokens of the tower (CLS first), C tower width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from llava.pruning.engine.protocol import Method
from llava.pruning.vision import TowerView, merge_tokens, take
from llava.utils import UserError


class TowerMerger:
    """State of one pass of crops with the same budget.

    Attributes:
        place_NT: for every token the patch whose place it has, 0 for CLS, patches from 1.
        sizes_NT: patches (or CLS) that it stands for.
    """

    def __init__(self, method: Method, target: int, timer: Callable[[], AbstractContextManager] = nullcontext) -> None:
        self.method, self.target, self.timer = method, target, timer
        self.place_NT: Tensor | None = None
        self.sizes_NT: Tensor | None = None

    def run(self, layer: nn.Module, index: int, layers: int, hidden_NTC: Tensor) -> Tensor:
        """One encoder layer with a merge between attention and MLP.

        Args:
            layer: CLIP's encoder layer.
            index: its number; `layers` of them run in all.
            hidden_NTC: what enters it.

        Raises:
            UserError: the tower's attention kernel takes no additive mask.
        """
        if "flash" in (layer.self_attn.config._attn_implementation or ""):
            raise UserError(
                f"--method {self.method.name}: tokens merged inside the vision tower need attention with a mask; "
                "load with attn_implementation sdpa or eager, or merge behind the tower (inside=false)"
            )
        if self.sizes_NT is None:
            self.sizes_NT = hidden_NTC.new_ones(hidden_NTC.shape[:2], dtype=torch.float32)
            self.place_NT = torch.arange(hidden_NTC.shape[1], device=hidden_NTC.device).expand(len(hidden_NTC), -1)
        keys: list[Tensor] = []
        hook = layer.self_attn.k_proj.register_forward_hook(lambda _, __, output: keys.append(output))
        # A token that stands for several patches gets the attention of all of them.
        bias = self.sizes_NT.log().to(hidden_NTC.dtype)[:, None, None, :] if index else None
        try:
            attended, _ = layer.self_attn(layer.layer_norm1(hidden_NTC), attention_mask=bias)
        finally:
            hook.remove()
        hidden_NTC = hidden_NTC + attended
        with self.timer():
            mean_keys = keys[0].unflatten(-1, (-1, layer.self_attn.head_dim)).float().mean(2)
            merge = self.method.merge(TowerView(index, layers, mean_keys, self.sizes_NT, self.target))
            while merge is not None:
                mean_keys = merge_tokens(mean_keys, self.sizes_NT, merge)[0]
                hidden_NTC, self.sizes_NT = merge_tokens(hidden_NTC, self.sizes_NT, merge)
                self.place_NT = self.place_NT.gather(1, merge.leader_NK)
                # What one merge per layer cannot reach is left to the last layer.
                merge = (
                    self.method.merge(TowerView(index, layers, mean_keys, self.sizes_NT, self.target))
                    if index == layers - 1
                    else None
                )
        return hidden_NTC + layer.mlp(layer.layer_norm2(hidden_NTC))

    def in_raster(self, features_NKC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features in the order of their places, with origin (-1: merged) and place, patches counted from 0.

        The features may lack the CLS token, which is then left out here too; with it, patches count from 1.
        """
        without_cls = self.place_NT.shape[1] - features_NKC.shape[1]
        place, sizes = self.place_NT[:, without_cls:], self.sizes_NT[:, without_cls:]
        order = place.argsort(dim=1)
        place, sizes = place.gather(1, order) - without_cls, sizes.gather(1, order)
        return take(features_NKC, order), place.masked_fill(sizes > 1, -1), place
