"""Linear layers whose weights oneDNN has packed once, to tell what packing them in every call costs on a CPU.

torch's own linear layer on a CPU brings the weights into the kernel's layout in each call. That takes as long for ten
tokens as for a thousand, so it keeps time above FLOPs where few tokens are left. `torch.compile` packs once when it
freezes a model, with the same two operators; they are torch's own and may change, so only this experiment uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.utils import UserError


class PackedLinear(nn.Module):
    """An inference-only linear layer without gradients; `[..., in]` to `[..., out]`."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, values: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module, rows: int) -> nn.Module:
    """Replaces the linear layers of the decoder layers of `model`; rows: for how many tokens the layout is chosen.

    Raises:
        UserError: not on a CPU, or this torch has no such operators.
    """
    if next(model.parameters()).device.type != "cpu":
        raise UserError("--linear packed: oneDNN packs weights for a CPU; use --device cpu")
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        raise UserError("--linear packed: this torch was built without oneDNN's packed linear layers")
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, rows))
    return model
