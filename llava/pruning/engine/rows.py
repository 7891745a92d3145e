"""How many rows and tokens a batch has: the layout of one prompt for many rows, real tokens of a left-padded row."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.engine.layout import VisualLayout


def repeated(layout: VisualLayout, batch: int) -> tuple[VisualLayout, int]:
    """The layout of a batch in which every row stands so many times in a row (beams)."""
    if batch % layout.batch_size:
        raise ValueError(
            f"the visual layout has {layout.batch_size} rows but the batch has {batch}; call set_visual for each batch"
        )
    repeats = batch // layout.batch_size
    return layout.expand(repeats) if repeats > 1 else layout, repeats


def row_lengths(attention_mask: Tensor | None, batch: int, width: int) -> tuple[int, ...]:
    """Real tokens per row of a left-padded batch.

    Raises:
        ValueError: the mask is not a left-padding mask.
    """
    if attention_mask is None:
        return (width,) * batch
    real = attention_mask.bool()
    # One transfer for both questions: how long the rows are, and whether a hole follows a real token.
    lengths, holes = torch.stack((real.sum(1), (real[:, :-1] & ~real[:, 1:]).sum(1))).tolist()
    if any(holes) or min(lengths) == 0:
        raise ValueError("attention_mask must mark left padding only: zeros, then ones up to the end of each row")
    return tuple(lengths)


def check_lengths(lengths: tuple[int, ...], attention_mask: Tensor | None) -> None:
    """Compare the layout's lengths with a mask that can be read for nothing (the host would wait for a device)."""
    if attention_mask is None or attention_mask.device.type != "cpu":
        return
    masked = row_lengths(attention_mask, *attention_mask.shape)
    if masked != tuple(lengths):
        raise ValueError(f"attention_mask has rows of {list(masked)} tokens, the visual layout of {list(lengths)}")
