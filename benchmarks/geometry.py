"""Decoders and their vision towers by name, with random weights: time and memory do not depend on what the weights say.

The schedule of a method that measures its input (AutoPrune) does depend on the weights; random ones give
almost no mutual information, so the steepest of its curves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from llava.pruning import VisualLayout
from llava.utils import UserError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Tower:
    """Sizes of a CLIP vision tower: `image` pixels along each side of a crop, `patch` of a patch."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    image: int
    patch: int

    @property
    def patches(self) -> int:
        """Visual tokens of a crop."""
        return (self.image // self.patch) ** 2


VIT_L_14_336 = Tower(1024, 24, 16, 4096, image=336, patch=14)
SQUARE_896 = Tower(1280, 32, 16, 3420, image=896, patch=28)
"""Of Qwen2.5-VL the sizes alone; a patch stands for the 2 x 2 that become one visual token."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder, of its prompt (`before` text tokens, the visual tokens, `after` text tokens) and of the tower
    in front of it. key_heads: fewer of them with grouped-query attention. axes: positions along several axes, as in
    Qwen2.5-VL's decoder, which is built then.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    before: int
    visual: int
    after: int
    tower: Tower = VIT_L_14_336
    key_heads: int | None = None
    axes: bool = False

    def config(self, attention: str) -> Any:
        """For transformers' Llama, or its decoder of Qwen2.5-VL."""
        kind, own = LlamaConfig, {}
        if self.axes:
            width = self.hidden // self.heads // 2
            sections = [width - 2 * (3 * width // 8), 3 * width // 8, 3 * width // 8]  # as 16, 24, 24 of 64
            kind = Qwen2_5_VLTextConfig
            own = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}
        return kind(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads or self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=16384,
            pad_token_id=0,
            eos_token_id=None,
            attn_implementation=attention,
            **own,
        )

    def parameters(self) -> int:
        """Weights of the decoder layers."""
        keys = self.hidden * (self.key_heads or self.heads) // self.heads
        return self.layers * (2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.ffn)


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("llava-1.5-7b", 4096, 32, 32, 11008, 32064, before=35, visual=576, after=50),
        Geometry("llava-1.5-13b", 5120, 40, 40, 13824, 32064, before=35, visual=576, after=50),
        Geometry("llava-next-7b", 4096, 32, 32, 11008, 32064, before=35, visual=2880, after=50),
        Geometry("cpu-1024x24", 1024, 24, 16, 2752, 2048, before=10, visual=576, after=50),
        # 1,024 visual tokens are a picture of 896 x 896 pixels: 28 x 28 for each.
        Geometry("qwen2.5-vl-3b", 2048, 36, 16, 11008, 151936, 15, 1024, 50, SQUARE_896, key_heads=2, axes=True),
        Geometry("cpu-qwen-1024x24", 1024, 24, 8, 5504, 2048, 15, 1024, 50, SQUARE_896, key_heads=2, axes=True),
        Geometry("tiny", 64, 6, 4, 128, 128, 3, 48, 8, Tower(32, 4, 4, 64, image=28, patch=7)),
    )
}


def geometry(name: str) -> Geometry:
    """By name; raises `UserError` that lists the known ones."""
    if name not in GEOMETRIES:
        raise UserError(f"--geometry: unknown {name!r}; known: {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]


def random_decoder(shape: Geometry, device: torch.device, dtype: torch.dtype, attention: str, seed: int = 0) -> Any:
    """transformers' Llama of these sizes, or its decoder of Qwen2.5-VL without head, with random weights."""
    build = Headless if shape.axes else LlamaForCausalLM
    return random_model(lambda: build(shape.config(attention)), device, dtype, seed)


class Headless(nn.Module):
    """Qwen2.5-VL's decoder where others have it: prefills end in front of the head."""

    def __init__(self, config: Qwen2_5_VLTextConfig) -> None:
        super().__init__()
        self.config, self.model = config, Qwen2_5_VLTextModel(config)

    def get_decoder(self) -> nn.Module:
        return self.model


def random_model(build: Callable[[], Model], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Model:
    """What `build` makes, its random weights made where they stay and in the type they stay in."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = build()
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class RandomPrompt:
    """Embeddings `[B, N, C]`, where the visual tokens are, and CLS attention `[B, V]` (sums to 1)."""

    embeds_BNC: torch.Tensor
    layout: VisualLayout
    cls_BV: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.embeds_BNC.shape[1]


def random_prompt(
    shape: Geometry, batch: int, device: torch.device, dtype: torch.dtype, visual: int | None = None, seed: int = 1
) -> RandomPrompt:
    """`batch` samples of one length; `visual` instead of the geometry's number of visual tokens."""
    visual = shape.visual if visual is None else visual
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, shape.before + visual + shape.after, shape.hidden, generator=generator)
    cls = torch.rand(batch, visual, generator=generator)
    lengths = [embeds.shape[1]] * batch
    return RandomPrompt(
        embeds.to(device, dtype),
        VisualLayout.from_spans([[(shape.before, shape.before + visual)]] * batch, lengths),
        (cls / cls.sum(1, keepdim=True)).to(device),
    )
