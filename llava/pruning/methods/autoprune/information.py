"""Mutual information between text and visual tokens, the quantity AutoPrune adapts to (paper section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def mutual_information(attention: Tensor, eps: float = 1e-6, text_rows: Tensor | int | None = None) -> Tensor:
    """Mutual information of text-to-visual attention, in bits, one number per leading index (per head).

    ``MI = sum_xy p(x,y) log2 max(p(x,y) / (p(x) p(y) + eps), eps)`` with ``p(x) = 1/T``, ``p(x,y) = attention / T``.
    Two properties of the published code are kept because the defaults of ``k0`` and ``gamma`` were chosen with them:
    the rows are not renormalized over the visual columns, so ``p`` sums to the attention mass that goes to the image;
    and ``eps`` stands beside ``p(x) p(y)``, which at real sizes is of its order, so the result is biased down and is
    slightly negative for flat attention.

    Args:
        attention: ``[..., T, V]`` probabilities of T text rows over V visual columns. Half precision is widened to
            float32. Padding rows and columns must be zero; they then contribute nothing.
        eps: absolute constant of the formula.
        text_rows: number of real text rows where ``attention`` is padded, broadcastable to ``[...]``; default T.

    Returns:
        ``[...]`` bits, float32 (float64 for float64 input).

    Raises:
        ValueError: no text row or no visual column.
    """
    if attention.ndim < 2 or attention.shape[-1] == 0 or attention.shape[-2] == 0:
        raise ValueError(f"attention must be [..., T, V] with T, V >= 1, got {tuple(attention.shape)}")
    if attention.dtype != torch.float64:
        attention = attention.float()
    if text_rows is None:
        text_rows = attention.shape[-2]
    if isinstance(text_rows, Tensor):  # a number is not made one: that would have the host wait for the device
        text_rows = text_rows.to(attention.dtype)[..., None, None]
    # With p(x) = 1/T taken out of all terms, p(x,y) is never formed: one pass over the largest tensor less.
    p_y = attention.sum(-2, keepdim=True) / text_rows
    ratio = (attention / (p_y + eps * text_rows)).clamp_min_(eps)
    total = ratio.log2_().mul_(attention).sum((-2, -1), keepdim=True)
    return (total / text_rows)[..., 0, 0]
