"""What a vision tower says about its tokens: attention and keys of the layers that a method asks for.

Taken from the queries and keys that the attention modules attend with; the tower computes what it always does.

Shapes: N crops, H heads, T tokens, D head width, F values per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.compat import TowerWatch
from llava.pruning.scores import attention_rows, reliable_attention
from llava.pruning.vision import ReliableAttention, TowerValue

Value = TowerValue | ReliableAttention
Place = tuple[int, Value]
"""A layer and what is wanted of it."""

_BLOCK = 64


class TowerFacts(TowerWatch):
    """Context that collects values of some layers; one run of the tower inside."""

    def __init__(self, attentions: Sequence[nn.Module], places: set[Place]) -> None:
        self._layer = {module: index for index, module in enumerate(attentions)}
        self._wanted = {index: [value for layer, value in places if layer == index] for index, _ in places}
        super().__init__([attentions[index] for index in self._wanted], self._see)
        self._found: dict[Place, list[Tensor]] = {}

    def runs(self, place: Place) -> list[Tensor]:
        """The values ``[N, T, F]`` of every call of the layer, in order."""
        return self._found[place]

    def _see(self, module: Any, query_NHTD: Tensor, key_NHTD: Tensor, mask: Any) -> None:
        layer = self._layer[module]
        scaling = module.scaling if hasattr(module, "scaling") else module.scale
        for value in self._wanted[layer]:
            found = layer_value(value, query_NHTD, key_NHTD, float(scaling), mask)
            self._found.setdefault((layer, value), []).append(found)


def layer_value(value: Value, query_NHTD: Tensor, key_NHTD: Tensor, scaling: float, mask: Any) -> Tensor:
    """One value of every token, float32 ``[N, T, F]``; see :class:`~llava.pruning.vision.TowerValue`."""
    if value is TowerValue.KEYS:
        return key_NHTD.float().mean(1)
    if value is TowerValue.WIDE_KEYS:
        return key_NHTD.float().transpose(1, 2).flatten(2)
    if value is TowerValue.WIDE_CLS_ATTENTION:
        query, key = (states.transpose(1, 2).flatten(2)[:, None] for states in (query_NHTD[:, :, :1], key_NHTD))
        return attention_rows(query, key, key.shape[-1] ** -0.5)[:, 0, 0, :, None]
    if not isinstance(mask, Tensor):
        mask = None
    last = 1 if value is TowerValue.CLS_ATTENTION else query_NHTD.shape[2]
    total: Tensor | float = 0.0
    parts = []
    # In blocks of rows: the full map of all heads never exists.
    for start in range(0, last, _BLOCK):
        rows = slice(start, min(start + _BLOCK, last))
        own = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
        attention = attention_rows(query_NHTD[:, :, rows], key_NHTD, scaling, own).mean(1)
        total = total + attention.sum(1)
        parts += [attention] * isinstance(value, ReliableAttention)
    if isinstance(value, ReliableAttention):
        return reliable_attention(torch.cat(parts, dim=1), value.threshold)[:, :, None]
    assert isinstance(total, Tensor)
    return (total / last)[:, :, None]


def split_values(values_VF: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Values side by side, by name; one that is a single number loses its last dimension."""
    parts = torch.split(values_VF, list(widths.values()), dim=1)
    return {name: part[:, 0] if part.shape[1] == 1 else part for name, part in zip(widths, parts, strict=True)}


def side_by_side(facts: TowerFacts, places: Iterable[Place]) -> list[Tensor]:
    """All values of a run next to one another, ``[N, T, F]`` per call."""
    columns = [facts.runs(place) for place in places]
    return [torch.cat(call, dim=2) for call in zip(*columns, strict=True)]
