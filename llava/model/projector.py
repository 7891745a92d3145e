"""LLaVA's projectors of other depths than the two layers of LLaVA 1.5, and what may stand behind one.

The two-layer one is transformers' `LlavaMultiModalProjector`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

DEFAULT_PROJECTOR = "mlp2x_gelu"
_ADAPTER = re.compile(r"^model\.image_adapter\.linear_(\d{1,3})\.weight$")
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


class TokenAdapter(nn.Module):
    """Linear layers with GELU between them *along the tokens* of a picture, as in Senna: each token that leaves it is a
    mixture of all patches, and has no place in the picture.

    Args:
        widths: tokens in front of the first layer and behind every layer, Senna's 576, 128, 128, 128.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths = tuple(widths)
        for i, pair in enumerate(zip(self.widths, self.widths[1:], strict=False), start=1):
            self.add_module(f"linear_{i}", nn.Linear(*pair))

    @property
    def tokens(self) -> int:
        """Tokens of a picture behind it."""
        return self.widths[-1]

    def forward(self, features_NPC: Tensor) -> Tensor:
        hidden_NCP = features_NPC.transpose(1, 2)
        for i in range(1, len(self.widths)):
            if i > 1:
                hidden_NCP = nn.functional.gelu(hidden_NCP)
            hidden_NCP = self.get_submodule(f"linear_{i}")(hidden_NCP)
        return hidden_NCP.transpose(1, 2)


class Adapted:
    """A projector with an adapter behind it, used like a projector."""

    def __init__(self, projector: nn.Module, adapter: TokenAdapter):
        self.projector, self.adapter = projector, adapter
        self.linear_1 = getattr(projector, "linear_1", None)

    def __call__(self, features_NPC: Tensor) -> Tensor:
        projected: Tensor = self.adapter(self.projector(features_NPC))
        return projected


def adapter_widths(tensors: Mapping[str, Tensor]) -> list[int] | None:
    """Widths of the `TokenAdapter` whose weights are among the tensors (translated names); None if there are none.

    Raises:
        ValueError: layers are missing, or do not follow one another.
    """
    found = {int(match[1]): tensors[name] for name in tensors if (match := _ADAPTER.match(name))}
    if not found:
        return None
    layers = [found.get(i) for i in range(1, max(found) + 1)]
    if any(layer is None or layer.ndim != 2 for layer in layers):
        raise ValueError(f"layers {', '.join(map(str, sorted(found)))} alone")
    shapes = [tuple(layer.shape) for layer in layers if layer is not None]
    if any(before[0] != after[1] for before, after in zip(shapes, shapes[1:], strict=False)):
        raise ValueError(f"layers of {', '.join(map(str, shapes))}, which do not follow one another")
    return [shapes[0][1], *(shape[0] for shape in shapes)]


def projector_dtype(projector: nn.Module | Adapted, default: torch.dtype) -> torch.dtype:
    """What the projector computes in: its biases' type, since quantized weights are stored as integers."""
    first = getattr(projector, "linear_1", None)
    if first is None:
        return default
    return first.weight.dtype if first.bias is None else first.bias.dtype
