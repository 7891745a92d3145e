"""What layers tell beside attention rows: states around their attention and MLP, seen from outside."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor


class BlockStates(NamedTuple):
    """What went into the attention and the MLP of a layer and what came out, in front of the residual additions.

    All are ``[B, N, C]`` for the tokens of the layer, padded on the left as the sequences are.
    """

    attention_in: Tensor
    attention_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor


class BlockWatch:
    """Context in which layers note these states in their next call. Nothing is kept of layers that are not named."""

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = list(layers)
        self._seen: list[Tensor] = []
        self._undo = ExitStack()

    def __enter__(self) -> BlockWatch:
        for layer in self.layers:
            for block in (layer.self_attn, layer.mlp):
                hook = block.register_forward_hook(self._note, with_kwargs=True)
                self._undo.callback(hook.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def _note(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        self._seen += [given, output[0] if isinstance(output, tuple) else output]

    def take(self) -> BlockStates:
        """States of the layer that has just run."""
        seen, self._seen = self._seen, []
        return BlockStates(*seen)
