"""What a run is told about the next prompts: where their visual tokens are, and what is known of each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.pruning.engine.layout import VisualLayout
from llava.pruning.vision import CLS_ATTENTION, ReducedRow


@dataclass(frozen=True)
class Told:
    """What one prefill uses up. facts: by name one tensor ``[N_i, ...]`` per row; the rest as in
    :meth:`PruningRun.set_visual`.
    """

    layout: VisualLayout
    facts: Mapping[str, list[Tensor]]
    reduced: Sequence[ReducedRow] | None
    sample_ids: tuple[int, ...] | None
    width: int | None = None


def told_of(
    method: str,
    layout: VisualLayout,
    cls_attention: Tensor | Sequence[Tensor | None] | None,
    facts: Mapping[str, Sequence[Tensor | None]] | None,
    reduced: Sequence[ReducedRow] | None,
    sample_ids: Sequence[int] | None,
    width: int | None,
    needed: Sequence[str],
) -> Told:
    """The arguments of :meth:`PruningRun.set_visual`, checked against each other and cut down to the facts needed.

    Raises:
        ValueError: a fact is missing, or something has the wrong length.
    """
    if reduced is not None and tuple(len(row.origins) for row in reduced) != layout.counts:
        raise ValueError("the reduced rows and the layout differ in their numbers of visual tokens")
    if sample_ids is not None and len(sample_ids) != layout.batch_size:
        raise ValueError(f"{len(sample_ids)} sample_ids for a layout of {layout.batch_size} rows")
    given: dict[str, Any] = dict(facts or {})
    if cls_attention is not None:
        alone = isinstance(cls_attention, Tensor) and cls_attention.ndim == 1
        given[CLS_ATTENTION] = [cls_attention] if alone else cls_attention
    counts = layout.counts if reduced is None else tuple(row.visual_tokens for row in reduced)
    vectors = {}
    for name in dict.fromkeys(needed):
        if name not in given and any(counts):
            what = name if name == CLS_ATTENTION else f"facts={{'{name}': ...}}"
            raise ValueError(f"method '{method}' needs {what} with set_visual")
        vectors[name] = _filled(given.get(name, [None] * layout.batch_size))
        if name == CLS_ATTENTION:
            vectors[name] = [vector.float() for vector in vectors[name]]
        if tuple(map(len, vectors[name])) != counts:
            raise ValueError(
                f"{name} has {[len(vector) for vector in vectors[name]]} values, the layout has "
                f"{list(counts)} visual tokens"
            )
    return Told(
        layout,
        vectors,
        None if reduced is None else list(reduced),
        None if sample_ids is None else tuple(sample_ids),
        width,
    )


def _filled(rows: Sequence[Tensor | None]) -> list[Tensor]:
    """The rows, with empty ones for prompts without visual tokens."""
    some = [row for row in rows if row is not None]
    like = some[0] if some else torch.zeros(0)
    return [like.new_zeros(0, *like.shape[1:]) if row is None else row.detach() for row in rows]
