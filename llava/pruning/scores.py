"""Rows of attention maps, computed from queries and keys.

A pruning score needs a handful of rows (the text tokens, the last token, the CLS token), never the whole map. So the
layer itself stays on its fused kernel and the rows are computed here. Everything is computed in float32.

Shapes: B batch, H query heads, G key/value heads (H is a multiple of G), T rows, N keys, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(query_BHTD: Tensor, key_BGND: Tensor, scaling: float, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention probabilities of selected query rows over all keys.

    Args:
        query_BHTD: queries of the wanted rows, after rotary embedding, ``[B, H, T, D]``.
        key_BGND: keys of the same layer, after rotary embedding, ``[B, G, N, D]``; H must be a multiple of G.
        scaling: factor on the dot products, usually ``D ** -0.5``.
        allowed: bool, broadcastable to ``[B, 1, T, M]`` for the last ``M <= N`` keys; False where a row must not look
            (causality, padding). Keys before them may always be looked at.

    Returns:
        float32 probabilities ``[B, H, T, N]``; each row sums to 1 over the allowed keys.
    """
    batch, heads, rows, width = query_BHTD.shape
    groups, keys = key_BGND.shape[1], key_BGND.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key heads")
    # The queries of a key head are stacked along the row axis: grouped-query attention without copying the keys.
    stacked = query_BHTD.reshape(batch, groups, heads // groups * rows, width)
    # Widened before the product, as the fused kernels accumulate: bfloat16 logits would be off by several percent.
    logits = (stacked.float() * scaling @ key_BGND.float().transpose(-1, -2)).view(batch, heads, rows, keys)
    if allowed is not None:
        logits[..., keys - allowed.shape[-1] :].masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return torch.softmax(logits, dim=-1)


def received_attention(attention_BHTV: Tensor, rows: Tensor | None = None) -> Tensor:
    """Attention that each key receives, ``[B, V]``: mean over heads, then over the query rows.

    Args:
        attention_BHTV: probabilities ``[B, H, T, V]``, zero in padded rows.
        rows: real query rows per batch row, ``[B]``, where rows are padded; default T.
    """
    received = attention_BHTV.mean(1).sum(1)
    return received / (attention_BHTV.shape[2] if rows is None else rows[:, None])


def rotate_rows(query_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Apply the half-split rotary embedding of Llama to query rows ``[B, H, T, D]`` with tables ``[B or 1, T, D]``."""
    cos, sin = cos_BTD.unsqueeze(1), sin_BTD.unsqueeze(1)
    first, second = query_BHTD.chunk(2, dim=-1)
    return query_BHTD * cos + torch.cat((-second, first), dim=-1) * sin
