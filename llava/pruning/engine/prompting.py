"""From what a decoder was called with to the prompt that is prefilled: facts of its rows, reductions in front of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.prompt import Prompt
from llava.pruning.engine.protocol import Method
from llava.pruning.engine.sequence import Numbering
from llava.pruning.engine.told import Told
from llava.pruning.engine.view import SampleIds
from llava.pruning.reduction import reduce_prompt


def deepstack_features(decoder: nn.Module, kwargs: Mapping[str, Any], given: Tensor) -> Tensor | None:
    """Features that are to be added behind the first layers, ``[B, N, layers * C]`` with zeros elsewhere; None if this
    decoder has none or was given none.
    """
    if not hasattr(decoder, "_deepstack_process"):
        return None
    features, places = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if features is None or places is None:
        return None
    stacked = torch.cat(list(features), dim=-1)
    added = stacked.new_zeros(*given.shape[:2], stacked.shape[-1])
    added[places.to(added.device)] = stacked
    return added


def prompt_of(
    method: Method,
    timer: Callable[[], AbstractContextManager[Any]],
    hidden: Tensor,
    lengths: tuple[int, ...],
    positions: Tensor | None,
    layout: VisualLayout,
    told: Told,
    repeats: int,
    ids: SampleIds,
    added: Tensor | None,
    labeled: bool,
    members: bool = False,
) -> Prompt:
    """What :func:`~llava.pruning.engine.decoder.prefill` takes; a method in front of the decoder has done its work.

    Args:
        method: the attached method; timer: context manager around what only pruning needs.
        hidden: embeddings ``[B, N, C]``, left-padded; lengths, layout: of its rows, repeated for beams as ``told`` is
            not; positions: ``[B, N]`` or ``[B, N, axes]``, None for the usual ones.
        repeats: rows of each sample; ids: of the rows.
        added: as :func:`deepstack_features` gives it.
        labeled: whether the loss needs to know which tokens are left.
        members: whether traces are to say what merged tokens are made of.

    Raises:
        ValueError: the method merges inside the tower and was not attached when the images were encoded.
    """
    facts = {name: [v for v in rows for _ in range(repeats)] for name, rows in told.facts.items()}
    reduced = None if told.reduced is None else [row for row in told.reduced for _ in range(repeats)]
    if method.merges_in_tower and reduced is None:
        raise ValueError(
            f"method '{method.name}' merges inside the vision tower, but the prompt was prepared without it: "
            "encode the images while the method is attached"
        )
    numbering, width, index = None, hidden.shape[1], None
    if labeled:
        index = torch.arange(width, device=hidden.device).expand(len(hidden), -1)
    if method.reduces_vision and reduced is None:
        if positions is not None:
            numbering = Numbering(positions, lengths)
        with timer():
            short = reduce_prompt(method.parts[0], hidden, lengths, layout, facts)
        added = None if added is None else short.mix(added, lengths)
        if index is not None:
            index = short.follow(index, lengths)
            for row, left, spans in zip(index, short.rows, short.layout.spans, strict=True):
                slots = [slot for first, last in spans for slot in range(first, last)]
                row[slots] = row[slots].masked_fill(left.origins.to(row.device) < 0, -1)
        hidden, lengths, layout, reduced = short.hidden_BNC, short.lengths, short.layout, short.rows
    if reduced is not None and method.positions == "original":
        # Positions that the tokens would have without the reduction.
        rows = [row.positions.to(hidden.device) for row in reduced]
        positions = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        if numbering is not None:
            positions = numbering.at(positions)
    elif numbering is not None:
        positions = numbering.first(lengths, hidden.shape[1], hidden.device)
    padded = {
        name: nn.utils.rnn.pad_sequence([vector.to(hidden.device) for vector in rows], batch_first=True)
        for name, rows in facts.items()
    }
    return Prompt(hidden, lengths, positions, layout, padded, ids, reduced, added, index, width, members)
