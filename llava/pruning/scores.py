"""Rows of attention maps, computed from queries and keys.

A pruning score needs a handful of rows (the text tokens, the last token, the CLS token), never the whole map. So the
layer itself stays on its fused kernel and the rows are computed here. Everything is computed in float32.

Shapes: B batch, H query heads, G key/value heads (H is a multiple of G), T rows, N keys, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.selection import counts_to_mask, last_places, on_device

_ONE_PIECE = 2**21
_PIECES = 8
"""Larger score matrices get their softmax in so many pieces, so that they do not exist twice at any time."""


def attention_rows(query_BHTD: Tensor, key_BGND: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention probabilities of selected query rows over all keys.

    Args:
        query_BHTD: queries of the wanted rows, after rotary embedding, ``[B, H, T, D]``.
        key_BGND: keys of the same layer, after rotary embedding, ``[B, G, N, D]``; H must be a multiple of G.
        scaling: factor on the dot products, usually ``D ** -0.5``.
        mask: broadcastable to ``[B, 1, T, M]`` for the last ``M <= N`` keys, as in torch's
            ``scaled_dot_product_attention``: bool, False where a row must not look (causality, padding), or float32,
            added to the logits. Keys before them may always be looked at.

    Returns:
        float32 probabilities ``[B, H, T, N]``; each row sums to 1 over the allowed keys.
    """
    batch, heads, rows, width = query_BHTD.shape
    groups, keys = key_BGND.shape[1], key_BGND.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key heads")
    # Widened before the product, as the fused kernels accumulate: bfloat16 logits would be off by several percent.
    # The queries of a key head are stacked along the row axis: grouped-query attention without copying the keys.
    stacked = query_BHTD.float().reshape(batch * groups, heads // groups * rows, width)
    keys_BDN = key_BGND.float().flatten(0, 1).transpose(1, 2)
    # With beta=0 the first argument is not read; scaling inside the product saves a pass over the queries.
    logits = torch.baddbmm(stacked.new_empty(()), stacked, keys_BDN, beta=0, alpha=scaling)
    logits = logits.view(batch, heads, rows, keys)
    if mask is not None:
        masked = logits[..., keys - mask.shape[-1] :]
        if mask.dtype == torch.bool:
            masked.masked_fill_(~mask, torch.finfo(torch.float32).min)
        else:
            masked += mask
    if logits.numel() <= _ONE_PIECE:
        return torch.softmax(logits, dim=-1)
    for part in logits.view(batch * heads, rows, keys).chunk(_PIECES):
        part.copy_(torch.softmax(part, dim=-1))
    return logits


def attended(attention_BHTN: Tensor, value_BGND: Tensor) -> Tensor:
    """What the rows of :func:`attention_rows` attend to: ``[B, T, H, D]``, in the type of the values."""
    batch, heads, rows, keys = attention_BHTN.shape
    groups, width = value_BGND.shape[1], value_BGND.shape[3]
    stacked = attention_BHTN.view(batch * groups, heads // groups * rows, keys)
    output = torch.bmm(stacked, value_BGND.float().flatten(0, 1)).view(batch, heads, rows, width)
    return output.transpose(1, 2).to(value_BGND.dtype)


def causal_bias(rows: int, device: torch.device) -> Tensor:
    """Float mask ``[T, T]`` for :func:`attention_rows`: each of the last T tokens sees itself and those before it."""
    return torch.full((rows, rows), torch.finfo(torch.float32).min, device=device).triu_(1)


def received_attention(attention_BHTV: Tensor, rows: Tensor | None = None) -> Tensor:
    """Attention that each key receives, ``[B, V]``: mean over heads, then over the query rows.

    Args:
        attention_BHTV: probabilities ``[B, H, T, V]``, zero in padded rows.
        rows: real query rows per batch row, ``[B]``, where rows are padded; default T.
    """
    if rows is None:
        return attention_BHTV.mean((1, 2))
    return attention_BHTV.sum((1, 2)) / (attention_BHTV.shape[1] * rows[:, None])


def reliable_attention(attention_NTT: Tensor, threshold: float) -> Tensor:
    """Attention that each token receives of reliable ones, ``[N, T]``, see
    :class:`~llava.pruning.vision.ReliableAttention`.

    Args:
        attention_NTT: probabilities, mean over heads, rows over columns; 0 where a row must not look (other pictures).
        threshold: multiple of the mean.
    """
    sees = (attention_NTT > 0).float()
    received = attention_NTT.sum(1) / sees.sum(1).clamp_min(1)
    # The mean over the tokens that see each other: a picture's own.
    mean = (sees @ received[:, :, None])[:, :, 0] / sees.sum(2).clamp_min(1)
    reliable = (received > threshold * mean).float()[:, :, None]
    count = (sees * reliable).sum(1)
    chosen = (attention_NTT * reliable).sum(1) / count.clamp_min(1)
    return torch.where(count > 0, chosen, received)


def rotate_rows(query_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Apply the half-split rotary embedding of Llama to query rows ``[B, H, T, D]`` with tables ``[B or 1, T, D]``."""
    cos, sin = cos_BTD.unsqueeze(1), sin_BTD.unsqueeze(1)
    first, second = query_BHTD.chunk(2, dim=-1)
    return query_BHTD * cos + torch.cat((-second, first), dim=-1) * sin


def text_raters(hidden_BVC: Tensor, counts: tuple[int, ...], text_BTC: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Bool ``[B, T]``: text tokens with an above-average mean over visual tokens of softmax over text of ``H_v H_t^T``.

    Visual tokens are padded at the end, text at the front.
    """
    device = hidden_BVC.device
    valid_BT = last_places(rows, text_BTC.shape[1], device)
    valid_BV = counts_to_mask(counts, hidden_BVC.shape[1], device)
    logits = hidden_BVC.float() @ text_BTC.float().transpose(1, 2)
    shares = torch.softmax(logits.masked_fill(~valid_BT[:, None, :], -torch.inf), dim=2)
    received = (shares * valid_BV[:, :, None]).sum(1)
    # Comparing sums with mean of sums: the number of visual tokens cancels.
    average = received.sum(1, keepdim=True) / on_device(rows, device)[:, None]
    raters = (received > average) & valid_BT
    return torch.where(raters.any(1, keepdim=True), raters, valid_BT)
