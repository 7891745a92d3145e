"""LLaVA's projectors of other depths than the two layers of LLaVA 1.5.

The two-layer one is transformers' `LlavaMultiModalProjector`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

DEFAULT_PROJECTOR = "mlp2x_gelu"
_MLP = re.compile(r"^mlp(\d{1,3})x_gelu$", re.ASCII)


def projector_depth(kind: str) -> int | None:
    """Linear layers of a projector type: `identity` 0, `linear` 1, `mlp2x_gelu` 2, `mlpNx_gelu` N; None if unknown.

    N is below 1000: a config.json asks for layers before anybody knows whether there are weights for them.
    """
    if kind in ("identity", "linear"):
        return ("identity", "linear").index(kind)
    found = _MLP.match(kind)
    return int(found.group(1)) if found and int(found.group(1)) > 0 else None


class Projector(nn.Module):
    """Linear layers with GELU between them, named `linear_1`, `linear_2`, ... as in transformers' projector.

    Args:
        vision_width: width of the tower's features.
        text_width: width of the decoder.
        depth: number of linear layers; with 0 features pass through unchanged, so both widths must agree.
    """

    def __init__(self, vision_width: int, text_width: int, depth: int):
        super().__init__()
        if depth == 0 and vision_width != text_width:
            raise ValueError(
                f"projector 'identity' needs a tower as wide as the decoder, not {vision_width} and {text_width}"
            )
        self.depth = depth
        for i in range(1, depth + 1):
            self.add_module(f"linear_{i}", nn.Linear(vision_width if i == 1 else text_width, text_width))

    def forward(self, image_features: Tensor) -> Tensor:
        hidden = image_features
        for i in range(1, self.depth + 1):
            if i > 1:
                hidden = nn.functional.gelu(hidden)
            hidden = self.get_submodule(f"linear_{i}")(hidden)
        return hidden


def projector_dtype(projector: nn.Module, default: torch.dtype) -> torch.dtype:
    """What the projector computes in: its biases' type, since quantized weights are stored as integers."""
    first = getattr(projector, "linear_1", None)
    if first is None:
        return default
    return first.weight.dtype if first.bias is None else first.bias.dtype
