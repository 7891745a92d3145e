"""Random numbers that depend on a seed, the sample and the layer alone: not on batch size, order or device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.pruning.engine.view import LayerView
from llava.pruning.types import BEFORE_DECODER


def uniform_draws(view: LayerView, seed: int, counts: Sequence[int]) -> Tensor:
    """Numbers in 0..1 for each row, ``[B, max(counts)]``, 0 behind ``counts[i]``; every layer draws anew.

    Raises:
        UnsupportedError: several threads share the run, see :attr:`~llava.pruning.engine.view.LayerView.sample_ids`.
    """
    numbers = torch.zeros(len(counts), max(counts))
    for row, (sample, count) in enumerate(zip(view.sample_ids, counts, strict=True)):
        # A CPU generator per sample: CUDA streams of random numbers differ between devices.
        stage = 7919 * (view.layer - BEFORE_DECODER)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample + stage)
        numbers[row, :count] = torch.rand(count, generator=generator)
    return numbers.to(view.device)
