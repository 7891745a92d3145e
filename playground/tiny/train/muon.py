"""Muon for many small matrices at once: what `torch.optim.Muon` does to each, in one batched product per shape.

A deep and narrow decoder has hundreds of matrices of three shapes; one by one they keep a GPU waiting for launches.
"""

from __future__ import annotations

from collections import defaultdict

import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic iteration that pushes singular values towards one, those of `torch.optim.Muon`."""


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The same singular vectors with singular values near one: [n, rows, cols] in bf16."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class BatchedMuon:
    """Nesterov momentum, orthogonalized, over matrices grouped by shape; `param_groups` holds the learning rate."""

    def __init__(
        self, matrices: list[torch.nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        groups: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            groups[matrix.shape].append(matrix)
        self.groups = list(groups.values())
        self.param_groups = [{"lr": lr, "params": matrices}]
        self.momentum, self.weight_decay = momentum, weight_decay
        self.buffers = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]

    def zero_grad(self) -> None:
        for matrix in self.param_groups[0]["params"]:
            matrix.grad = None

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad for p in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum)).float()
            rows, cols = group[0].shape
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr * max(1.0, rows / cols) ** 0.5)

    def state_dict(self) -> dict:
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict) -> None:
        for own, saved in zip(self.buffers, state["buffers"], strict=True):
            own.copy_(saved)
