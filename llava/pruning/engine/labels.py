"""Labels of a pruned prompt: those of the tokens that are left.

Text is never dropped, so no text token loses its label; it is predicted from the token that stands before it now.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label that losses of transformers leave out."""


def labels_left(labels_BN: Tensor, index_BK: Tensor) -> Tensor:
    """Labels ``[B, K]`` of the tokens with these numbers; :data:`IGNORED` for -1, a merged token or padding."""
    index = index_BK.to(labels_BN.device)
    return torch.where(index < 0, IGNORED, labels_BN.gather(1, index.clamp_min(0)))


def follow_labels(
    loss: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], index_BK: Tensor
) -> dict[str, Any]:
    """Keyword arguments of a loss, with labels of the tokens that are left, where its logits are those of a pruned
    prompt.

    Args:
        loss: takes ``logits`` and ``labels``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        index_BK: number of each token that is left, -1 for those that have none.

    Raises:
        ValueError: labels or logits are passed without their names, or are not one per token.
    """
    labels = kwargs.get("labels")
    if labels is None or args[1:]:
        raise ValueError(f"{getattr(loss, '__name__', 'the loss')}{inspect.signature(loss)} is called without labels=")
    logits = kwargs.get("logits", args[0] if args else None)
    if logits is None or logits.shape[:2] != index_BK.shape:
        raise ValueError("labels= need the logits of all tokens of a pruned prompt: leave logits_to_keep out")
    return {**kwargs, "labels": labels_left(labels, index_BK)}
