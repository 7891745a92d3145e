"""Assisted decoding: a first pass that brings guesses behind the prompt.

transformers gives the prompt and the first guesses of an assistant (or of a look-up in the prompt) to the model in one
pass. Only the prompt may decide what is dropped, so it is prefilled alone, and the guesses go on in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OF_THE_PROMPT = ("deepstack_visual_embeds", "visual_pos_masks")


def prompt_then_guesses(forward: Callable[..., Any], width: int, cache: Any, given: dict[str, Any]) -> Any:
    """Output of a decoder's forward on a prompt of ``width`` tokens and the guesses behind it, as of one pass.

    Args:
        forward: runs the prompt with the empty ``cache``, and new tokens with the filled one.
        given: arguments by name; tensors ``[B, N]``, ``[B, N, C]`` or, of positions, ``[axes, B, N]``.
    """
    prompt, guesses = dict(given), {name: value for name, value in given.items() if name not in _OF_THE_PROMPT}
    for name in ("input_ids", "inputs_embeds", "visual_pos_masks", "attention_mask"):
        value = given.get(name)
        if isinstance(value, Tensor) and value.ndim in (2, 3):
            prompt[name] = value[:, :width]
            if name in ("input_ids", "inputs_embeds"):
                guesses[name] = value[:, width:]
    if isinstance(given.get("position_ids"), Tensor):
        prompt["position_ids"] = given["position_ids"][..., :width]
        guesses["position_ids"] = given["position_ids"][..., width:]
    first = forward(past_key_values=cache, **prompt)
    return _joined(first, forward(past_key_values=cache, **guesses))


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, tuple):
        return (torch.cat((first[0], second[0]), dim=1), *second[1:])
    second["last_hidden_state"] = torch.cat((first["last_hidden_state"], second["last_hidden_state"]), dim=1)
    states = zip(first.get("hidden_states") or (), second.get("hidden_states") or (), strict=True)
    second["hidden_states"] = tuple(torch.cat(pair, dim=1) for pair in states) or None
    return second
