"""Merging and dropping tokens inside the layers of a CLIP vision tower.

Splits an encoder layer into its attention and its MLP, asks the pruning method in between, and keeps the books: how
many patches a token stands for, and whose place it has. Which tokens merge or go is the method's business.

Shapes: N crops, T tokens of the tower (CLS first), C tower width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from llava.pruning.engine.protocol import Method
from llava.pruning.selection import take
from llava.pruning.vision import TowerHide, TowerKeep, TowerMerge, TowerView, merge_tokens
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
        self.memory = SimpleNamespace()
        self._weighted = False  # whether the sizes differ

    def run(self, layer: nn.Module, index: int, layers: int, hidden_NTC: Tensor) -> Tensor:
        """One encoder layer with what the method does between attention and MLP.

        Args:
            layer: CLIP's encoder layer.
            index: its number; `layers` of them run in all.
            hidden_NTC: what enters it.

        Raises:
            UserError: the tower's attention kernel takes no additive mask.
        """
        if "flash" in (layer.self_attn.config._attn_implementation or ""):
            behind = ", or merge behind the tower (inside=false)" if hasattr(self.method, "inside") else ""
            raise UserError(
                f"--method {self.method.name}: tokens merged inside the vision tower need attention with a mask; "
                f"load with attn_implementation sdpa or eager{behind}"
            )
        if self.sizes_NT is None:
            self.sizes_NT = hidden_NTC.new_ones(hidden_NTC.shape[:2], dtype=torch.float32)
            self.place_NT = torch.arange(hidden_NTC.shape[1], device=hidden_NTC.device).expand(len(hidden_NTC), -1)
        # A token that stands for several patches gets the attention of all of them, a hidden one none.
        bias = self.sizes_NT.log().to(hidden_NTC.dtype)[:, None, None, :] if self._weighted else None
        attention = layer.self_attn
        said: dict[str, Tensor] = {}
        hooks = [
            getattr(attention, f"{name}_proj").register_forward_hook(
                lambda _, __, output, name=name: said.__setitem__(name, output)
            )
            for name in ("q", "k", "v")
        ]
        try:
            attended, _ = attention(layer.layer_norm1(hidden_NTC), attention_mask=bias)
        finally:
            for hook in hooks:
                hook.remove()
        entering_NTC, hidden_NTC = hidden_NTC, hidden_NTC + attended
        with self.timer():
            query, key, value = (said[name].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in "qkv")
            view = TowerView(
                index,
                layers,
                query,
                key,
                value,
                attention.scale,
                entering_NTC,
                hidden_NTC,
                self.sizes_NT,
                self.target,
                self.memory,
            )
            hidden_NTC = self._changed(view, hidden_NTC)
        return hidden_NTC + layer.mlp(layer.layer_norm2(hidden_NTC))

    def _changed(self, view: TowerView, hidden_NTC: Tensor) -> Tensor:
        """The tokens after what the method says of them."""
        step = self.method.merge(view)
        self._weighted = self._weighted or isinstance(step, TowerMerge | TowerHide)
        if isinstance(step, TowerHide):
            self.sizes_NT = self.sizes_NT.masked_fill(step.hide_NT, 0)
        elif isinstance(step, TowerKeep):
            self.sizes_NT = self.sizes_NT.gather(1, step.keep_NK)
            self.place_NT = self.place_NT.gather(1, step.keep_NK)
            hidden_NTC = take(hidden_NTC, step.keep_NK) if step.hidden_NKC is None else step.hidden_NKC
        while isinstance(step, TowerMerge):
            before_NT = self.sizes_NT
            hidden_NTC, self.sizes_NT = merge_tokens(hidden_NTC, before_NT, step)
            self.place_NT = self.place_NT.gather(1, step.leader_NK)
            # What one merge per layer cannot reach is left to the last layer.
            if view.layer < view.layers - 1:
                break
            keys = merge_tokens(view.keys_NTC, before_NT, step)[0]
            view = replace(view, key_NHTD=keys[:, None], hidden_NTC=hidden_NTC, sizes_NT=self.sizes_NT)
            step = self.method.merge(view)
        return hidden_NTC

    def in_raster(self, features_NKC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features in the order of their places, with origin (-1: merged) and place, patches counted from 0.

        The features may lack the CLS token, which is then left out here too; with it, patches count from 1.
        """
        without_cls = self.place_NT.shape[1] - features_NKC.shape[1]
        place, sizes = self.place_NT[:, without_cls:], self.sizes_NT[:, without_cls:]
        order = place.argsort(dim=1)
        place, sizes = place.gather(1, order) - without_cls, sizes.gather(1, order)
        return take(features_NKC, order), place.masked_fill(sizes > 1, -1), place
