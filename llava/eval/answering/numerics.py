"""Numbers that are not finite: noticed while answers are generated, and traced to where they come from.

Knows logits and decoder layers; nothing of questions. One reduction per step over the logits, read once per batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llava import compat


class FiniteWatch(LogitsProcessor):
    """Remembers which samples of a batch ever got NaN or infinite logits, and replaces those by zeros.

    Replaced, because sampling from NaN stops a GPU for good. Minus infinity alone is no fault: it is how processors of
    the checkpoint's generation settings forbid tokens.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~torch.isfinite(scores.amax(dim=-1))  # NaN and +inf survive amax, -inf only if there is nothing else
        by_sample = bad.view(self.samples, -1).any(dim=1)  # beams of a sample are neighbors
        self._bad = by_sample if self._bad is None else self._bad | by_sample
        return scores.masked_fill(bad[:, None], 0.0)

    def bad(self) -> list[bool]:
        """Per sample, whether its logits were not finite; waits for the device."""
        return [False] * self.samples if self._bad is None else self._bad.tolist()


def where_not_finite(model: Any, inputs_embeds: Tensor, attention_mask: Tensor | None) -> str | None:
    """Where the first number that is not finite appears in a dense forward of a prompt; None if all are finite."""
    if not torch.isfinite(inputs_embeds).all():
        return "the embeddings of the prompt or the image"
    decoder = compat.find_decoder(model)
    found: list[str] = []

    def check(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not found and not torch.isfinite(hidden).all():
                found.append(f"decoder layer {index}")

        return hook

    hooks = [layer.register_forward_hook(check(index)) for index, layer in enumerate(decoder.layers)]
    # The pruned forward, if one is attached, is what failed: look at the stock one.
    attached = decoder.__dict__.pop("forward", None)
    try:
        with torch.inference_mode():
            decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
    finally:
        if attached is not None:
            decoder.forward = attached
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
