"""A candidate: one Triton launch that scores the rows of a layer, selects among its visual tokens and moves what stays.

What AutoPrune does behind a layer of its curve, where no more than one token is merged: attention of the last T tokens
to the visual ones, summed; the best `keep` of them, in their order; the mean of the next `recycle`, behind them. In
torch that is some twenty launches.

Every program scores one head. The one that comes last (a counter says so) adds the heads up, selects, and moves the
tokens, alone; with `move=False` a second launch moves them, with a program for each token.

It runs wherever Triton does; under `TRITON_INTERPRET=1` on a CPU, which is how it is tested. Not part of the engine:
`benchmarks.gpu_check` says whether it pays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that are others at every boundary: compiled once for all of them.
_VARYING = ["rows", "keys", "first", "visual", "keep", "recycle", "width"]
_KEYS = 64
"""Keys that a program looks at at once."""


@triton.jit(do_not_specialize=_VARYING)
def _score_and_select(
    query, key, hidden, partial, relevance, ids, moved, counter,
    query_b, query_h, query_t, key_b, key_g, key_n, hidden_b, hidden_n, moved_b, moved_n,
    scaling, rows, keys, first, visual, keep, recycle, width, shared,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, VISUAL: tl.constexpr, CHANNELS: tl.constexpr,
    MOVE: tl.constexpr,
):  # fmt: skip
    head, heads, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    lines, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    q = tl.load(
        query + row * query_b + head * query_h + lines[:, None] * query_t + columns[None, :],
        mask=lines[:, None] < rows, other=0.0,
    )  # fmt: skip
    base = key + row * key_b + (head // shared) * key_g
    # 1. The largest logit of each row and the sum that its softmax divides by.
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, keys, KEYS):
        places = start + tl.arange(0, KEYS)
        k = tl.load(base + places[None, :] * key_n + columns[:, None], mask=places[None, :] < keys, other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scaling
        # Each row sees itself and what lies before it.
        logits = tl.where(places[None, :] <= (keys - rows + lines)[:, None], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        largest = higher
    # 2. What each visual token receives from all rows of this head.
    for start in range(0, visual, KEYS):
        places = start + tl.arange(0, KEYS)
        inside = places < visual
        k = tl.load(base + (first + places)[None, :] * key_n + columns[:, None], mask=inside[None, :], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scaling
        shares = tl.exp(logits - largest[:, None]) / total[:, None]
        received = tl.sum(tl.where(lines[:, None] < rows, shares, 0.0), 0)
        tl.store(partial + (row * heads + head) * VISUAL + places, received, mask=inside)
    # 3. The program that comes last does the rest; the others have written by then.
    tl.debug_barrier()
    if tl.atomic_add(counter + row, 1) == heads - 1:
        tl.store(counter + row, 0)
        tokens = tl.arange(0, VISUAL)
        scores = tl.zeros((VISUAL,), tl.float32)
        for other in range(0, heads):
            scores += tl.load(
                partial + (row * heads + other) * VISUAL + tokens, mask=tokens < visual, other=0.0, cache_modifier=".cg"
            )
        scores = scores / (heads * rows)
        tl.store(relevance + row * VISUAL + tokens, scores, mask=tokens < visual)
        tl.debug_barrier()
        # 4. The place of each token in the order: how many are better, of equals the first.
        place = tl.zeros((VISUAL,), tl.int32)
        for start in range(0, visual, KEYS):
            others = start + tl.arange(0, KEYS)
            theirs = tl.load(relevance + row * VISUAL + others, mask=others < visual, other=float("-inf"))
            better = theirs[None, :] > scores[:, None]
            earlier = (theirs[None, :] == scores[:, None]) & (others[None, :] < tokens[:, None])
            place += tl.sum((better | earlier).to(tl.int32), 1)
        real = tokens < visual
        kept = real & (place < keep)
        slot = tl.cumsum(kept.to(tl.int32), 0) - 1
        # The kept ones in the order of the sequence, behind them the recycled ones in the order of their scores.
        tl.store(ids + row * VISUAL + slot, tokens, mask=kept)
        tl.store(ids + row * VISUAL + place, tokens, mask=real & (place >= keep) & (place < keep + recycle))
        if MOVE:
            tl.debug_barrier()
            for slot_out in range(0, width):
                _move_one(
                    hidden, ids, moved, row, slot_out, hidden_b, hidden_n, moved_b, moved_n, first, visual, keep,
                    recycle, VISUAL, CHANNELS,
                )  # fmt: skip


@triton.jit
def _move_one(
    hidden, ids, moved, row, slot, hidden_b, hidden_n, moved_b, moved_n, first, visual, keep, recycle,
    VISUAL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Fill one place of the shorter sequence: from the text, a kept token, or the mean of the recycled ones."""
    channels = tl.arange(0, CHANNELS)
    within = channels < moved_n
    merged = tl.where(recycle > 0, 1, 0)
    target = moved + row * moved_b + slot * moved_n + channels
    if (slot == first + keep) & (recycle > 0):
        total = tl.zeros((CHANNELS,), tl.float32)
        for number in range(0, recycle):
            source = first + tl.load(ids + row * VISUAL + keep + number).to(tl.int32)
            found = tl.load(hidden + row * hidden_b + source * hidden_n + channels, mask=within, other=0.0)
            total += found.to(tl.float32)
        tl.store(target, (total / (recycle + 1e-6)).to(moved.dtype.element_ty), mask=within)
    else:
        if slot < first:
            source = slot
        elif slot < first + keep:
            source = first + tl.load(ids + row * VISUAL + slot - first).to(tl.int32)
        else:
            source = slot + visual - keep - merged
        tl.store(
            target, tl.load(hidden + row * hidden_b + source * hidden_n + channels, mask=within, other=0.0), mask=within
        )


@triton.jit(do_not_specialize=["first", "visual", "keep", "recycle"])
def _move(
    hidden, ids, moved, hidden_b, hidden_n, moved_b, moved_n, first, visual, keep, recycle,
    VISUAL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    _move_one(
        hidden, ids, moved, tl.program_id(1), tl.program_id(0), hidden_b, hidden_n, moved_b, moved_n, first, visual,
        keep, recycle, VISUAL, CHANNELS,
    )  # fmt: skip


def score_select_move(
    query_BHTD: Tensor,
    key_BGND: Tensor,
    scaling: float,
    hidden_BNC: Tensor,
    first: int,
    visual: int,
    keep: int,
    recycle: int,
    *,
    move: bool = True,
) -> tuple[Tensor, Tensor]:
    """Drop visual tokens of a batch whose rows are alike and not padded.

    Args:
        query_BHTD: queries of the last T tokens, after rotary embedding; D a power of 2, at least 16.
        key_BGND: keys of all tokens, H a multiple of G.
        scaling: factor on the dot products.
        hidden_BNC: what the layer put out, contiguous.
        first: place of the first visual token.
        visual: visual tokens, side by side, all in front of the last T tokens.
        keep: how many of them stay.
        recycle: how many of the others are averaged into one token; 0 for none.
        move: whether the same launch moves the tokens.

    Returns:
        The shorter sequence ``[B, N - visual + keep + (recycle > 0), C]``, and indices of visual tokens ``[B, keep +
        recycle]``: the kept ones rising, then the recycled ones, best first.
    """
    batch, heads, rows, width = query_BHTD.shape
    keys, channels = key_BGND.shape[2], hidden_BNC.shape[2]
    device = hidden_BNC.device
    padded = max(triton.next_power_of_2(visual), _KEYS)
    partial = torch.empty(batch, heads, padded, dtype=torch.float32, device=device)
    relevance = torch.empty(batch, padded, dtype=torch.float32, device=device)
    ids = torch.empty(batch, padded, dtype=torch.int64, device=device)
    counter = torch.zeros(batch, dtype=torch.int32, device=device)
    length = keys - visual + keep + (recycle > 0)
    moved = torch.empty(batch, length, channels, dtype=hidden_BNC.dtype, device=device)
    moving = (hidden_BNC.stride(0), hidden_BNC.stride(1), moved.stride(0), moved.stride(1))
    _score_and_select[heads, batch](
        query_BHTD, key_BGND, hidden_BNC, partial, relevance, ids, moved, counter,
        query_BHTD.stride(0), query_BHTD.stride(1), query_BHTD.stride(2),
        key_BGND.stride(0), key_BGND.stride(1), key_BGND.stride(2), *moving,
        scaling, rows, keys, first, visual, keep, recycle, length, heads // key_BGND.shape[1],
        WIDTH=width, ROWS=max(triton.next_power_of_2(rows), 16), KEYS=_KEYS, VISUAL=padded,
        CHANNELS=triton.next_power_of_2(channels), MOVE=move,
    )  # fmt: skip
    if not move:
        _move[length, batch](
            hidden_BNC, ids, moved, *moving, first, visual, keep, recycle,
            VISUAL=padded, CHANNELS=triton.next_power_of_2(channels),
        )  # fmt: skip
    return moved, ids[:, : keep + recycle]
