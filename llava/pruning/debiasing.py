"""Attention debiasing (arXiv 2508.17807), an option of methods that rank visual tokens by attention of the text.

Two corrections of the score of the first cut:

- ``debias_curve``: attention favors what stands close to the question, so the score is multiplied with a weight per
  place of the picture. The authors fit the weights to the mean attention on a data set and ship them as files (one
  global curve for FastV, one per benchmark for PyramidDrop and SparseVLM); how they fit them is not public, so the
  file has to be given.
- ``debias_padding``: patches of which more than this share is padding of the square get the score 0. The published code
  takes 0.5 with FastV and SparseVLM, 0.01 with PyramidDrop.

A curve of as many values as the prompt has visual tokens is used as it is; for other numbers (several images, crops) it
is stretched linearly over the prompt's visual tokens. With FastV the budget falls to the number of patches that are not
padding where it is larger, as published; that number is read from the device, once.

Deviations: SparseVLM's published mask scales the picture of the padding to the grid with a bilinear filter, here it is
the share of each patch as in the other two; tiles of "anyres" pictures count as not padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod, PruningMethod
from llava.pruning.selection import on_device
from llava.pruning.types import OptionError, UnsupportedError
from llava.pruning.vision import TowerValue, VisionFact

_PADDING = "padding"
_OPTIONS = ("debias_curve", "debias_padding")


@dataclass(frozen=True, kw_only=True)
class Debiased(DecoderMethod):
    """A method whose scores can be debiased.

    Attributes:
        debias_curve: file with a weight per place of the picture, ``.npy`` or text with one number per line.
        debias_padding: patches with a larger share of padding than this get the score 0; None: none does.
    """

    debias_curve: str | None = None
    debias_padding: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.debias_padding
        self.require("debias_padding", share is None or 0 <= share < 1, "must lie in 0..1, 1 excluded")
        if self.debias_curve is not None:
            read_curve(self.debias_curve)

    def settings(self) -> dict[str, Any]:
        # Records from before there was a choice stay equal.
        chosen = super().settings()
        return {name: value for name, value in chosen.items() if name not in _OPTIONS or value is not None}

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        return {} if self.debias_padding is None else {_PADDING: VisionFact(TowerValue.PADDING)}

    @property
    def debiases(self) -> bool:
        """Whether anything is corrected."""
        return self.debias_curve is not None or self.debias_padding is not None

    def without_patches(self) -> PruningMethod:
        if self.debias_curve is not None:
            raise UnsupportedError(
                "debias_curve is a weight per place of the picture, and visual tokens of this model have no place"
            )
        return super().without_patches()

    def debiased(self, view: LayerView, scores_BV: Tensor) -> Tensor:
        """The scores of the first cut, corrected as the options say."""
        if self.debias_curve is not None:
            curve = on_device(read_curve(self.debias_curve), view.device)
            scores_BV = scores_BV * weights_at(curve, view.origins_BV, view.prompt_counts)
        if self.debias_padding is not None:
            scores_BV = scores_BV.masked_fill(self._is_padding(view), 0.0)
        return scores_BV

    def without_padding(self, view: LayerView, keep: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens to keep, lowered to those that are not padding; at least one."""
        if self.debias_padding is None:
            return keep
        valid = torch.arange(max(view.counts), device=view.device) < on_device(view.counts, view.device)[:, None]
        real = (valid & ~self._is_padding(view)).sum(1).tolist()
        return tuple(min(kept, max(own, 1)) for kept, own in zip(keep, real, strict=True))

    def _is_padding(self, view: LayerView) -> Tensor:
        assert self.debias_padding is not None
        return view.vision_fact(_PADDING) > self.debias_padding


def weights_at(curve_W: Tensor, origins_BV: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Weights of visual tokens by their place among the ``counts[i]`` of the prompt, ``[B, V]``; 1 for merged tokens.

    Args:
        curve_W: weights from the first to the last place.
        origins_BV: places; -1 for merged tokens.
        counts: visual tokens that each prompt had.
    """
    last = len(curve_W) - 1
    stretch = on_device([last / max(count - 1, 1) for count in counts], curve_W.device)
    place = (origins_BV.clamp_min(0) * stretch[:, None].double()).clamp_max(last)
    low = place.long()
    share = (place - low).to(curve_W)
    weights = curve_W[low] * (1 - share) + curve_W[(low + 1).clamp_max(last)] * share
    return weights.masked_fill(origins_BV < 0, 1.0)


@lru_cache(maxsize=64)
def read_curve(path: str) -> tuple[float, ...]:
    """Weights of a file.

    Raises:
        OptionError: the file cannot be read, or holds something else than numbers that are not negative.
    """
    try:
        if Path(path).suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = np.loadtxt(path, dtype=np.float64, delimiter=None, ndmin=1)
        numbers = np.asarray(values, dtype=np.float64).ravel()
    except (OSError, ValueError, EOFError) as error:
        raise OptionError(f"debias_curve: {path} cannot be read as numbers ({str(error).splitlines()[0]})") from None
    if len(numbers) == 0 or not np.isfinite(numbers).all() or (numbers < 0).any():
        raise OptionError(f"debias_curve: {path} must hold one finite number per place, none of them negative")
    return tuple(numbers.tolist())
