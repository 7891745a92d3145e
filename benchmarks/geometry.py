"""Decoders and their vision towers by name, with random weights: time and memory do not depend on what the weights say.

Knows sizes. The schedule of a method that measures its input (AutoPrune) does depend on the weights; random ones give
almost no mutual information, so the steepest of its curves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

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


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder, of its prompt (`before` text tokens, the visual tokens, `after` text tokens) and of the tower
    in front of it.
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

    def config(self, attention: str) -> LlamaConfig:
        """For transformers' Llama."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=16384,
            pad_token_id=0,
            eos_token_id=None,
            attn_implementation=attention,
        )

    def parameters(self) -> int:
        """Weights of the decoder layers."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn)


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("llava-1.5-7b", 4096, 32, 32, 11008, 32064, before=35, visual=576, after=50),
        Geometry("llava-1.5-13b", 5120, 40, 40, 13824, 32064, before=35, visual=576, after=50),
        Geometry("llava-next-7b", 4096, 32, 32, 11008, 32064, before=35, visual=2880, after=50),
        Geometry("cpu-1024x24", 1024, 24, 16, 2752, 2048, before=10, visual=576, after=50),
        Geometry("tiny", 64, 6, 4, 128, 128, 3, 48, 8, Tower(32, 4, 4, 64, image=28, patch=7)),
    )
}


def geometry(name: str) -> Geometry:
    """By name; raises `UserError` that lists the known ones."""
    if name not in GEOMETRIES:
        raise UserError(f"--geometry: unknown {name!r}; known: {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]


def random_decoder(
    shape: Geometry, device: torch.device, dtype: torch.dtype, attention: str, seed: int = 0
) -> LlamaForCausalLM:
    """transformers' Llama of these sizes, with random weights."""
    return random_model(lambda: LlamaForCausalLM(shape.config(attention)), device, dtype, seed)


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
