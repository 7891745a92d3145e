"""Mask and rotary tables of the tokens at hand: what a layer needs beside hidden states and cache.

transformers makes them once per forward. Behind every selection the tokens are others, so here they are made again,
or, where nothing but the length changed, cut from the first ones: that is far cheaper than asking transformers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from llava import compat
from llava.pruning.engine.sequence import Sequences
from llava.pruning.scores import causal_bias


@dataclass
class LayerInputs:
    """Mask and tables for one set of tokens.

    Attributes:
        mask: in the form that the layers' attention expects; None where it needs none.
        rotary: cosines and sines ``[B or 1, N, D]``.
    """

    mask: Tensor | None
    rotary: tuple[Tensor, Tensor]

    def prefix(self, width: int) -> LayerInputs:
        """The frame of the first ``width`` tokens, where these take the first positions."""
        cos, sin = self.rotary
        mask = None if self.mask is None else self.mask[:, :, :width, :width]
        return LayerInputs(mask, (cos[:, :width], sin[:, :width]))


class LayerInputsOf:
    """The frames of a prefill, each made when it is first needed."""

    def __init__(self, decoder: compat.Decoder) -> None:
        self.decoder = decoder
        self._static = compat.rotary_is_static(decoder.rotary_emb)
        self._first: LayerInputs | None = None
        self._frame: LayerInputs | None = None
        self._tokens: object = None
        self._device: torch.device | None = None
        self._biases: dict[tuple[int, torch.device], Tensor] = {}

    def forked(self) -> LayerInputsOf:
        """Another one that knows what this one has made so far."""
        later = copy.copy(self)
        later._biases = dict(self._biases)
        return later

    def of(self, sequences: Sequences) -> LayerInputs:
        """The frame of these tokens, where their hidden states are."""
        device = sequences.hidden_BNC.device
        if self._tokens is not sequences.origins or self._device != device:
            if self._device != device:
                self._first = None
            self._tokens, self._device = sequences.origins, device
            self._frame = self._made(sequences)
        assert self._frame is not None
        return self._frame

    def _made(self, sequences: Sequences) -> LayerInputs:
        padding = sequences.padding_mask()
        # Renumbered and unpadded tokens take the first positions, and each sees those before it, however many they are.
        alike = padding is None and sequences.compact and self._static
        if alike and self._first is not None:
            return self._first.prefix(sequences.width)
        mask = compat.causal_mask(self.decoder.config, sequences.hidden_BNC, padding)
        frame = LayerInputs(mask, compat.rotary_tables(self.decoder, sequences.hidden_BNC, sequences.positions_BN))
        if alike and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)):
            self._first = frame
        return frame

    def row_mask(self, sequences: Sequences, rows: int) -> Tensor | None:
        """What the last ``rows`` tokens may look at, for :func:`~llava.pruning.scores.attention_rows`."""
        device, width = sequences.hidden_BNC.device, sequences.width
        padding = sequences.padding_mask()
        if padding is not None:
            causal = torch.ones(rows, width, dtype=torch.bool, device=device).tril(width - rows)
            return causal & padding[:, None, None, :]
        if rows == 1:
            return None
        if (rows, device) not in self._biases:
            self._biases[rows, device] = causal_bias(rows, device)
        return self._biases[rows, device]
