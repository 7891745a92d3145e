"""The seam to whoever knows a model's prompts: where the visual tokens of every prompt are, and what its tower says.

The readers are built on the engine, so it imports none of them: it looks their module up by name when a method is
attached, as the registry does with methods.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any, Protocol

from torch import nn

_READERS = "llava.families"


class PromptReader(Protocol):
    """Reads the prompts of one model for a pruning run."""

    @property
    def family(self) -> str: ...
    def check(self, run: Any) -> None:
        """Refuse a method that this model cannot serve; the message names both."""

    def enter(self, run: Any, undo: ExitStack) -> None:
        """Begin to watch the model; what was changed on it is undone with ``undo``."""

    def tell(self, run: Any) -> None:
        """Call ``run.set_visual`` for the prompt that the decoder is about to run; do nothing where none was seen."""


def reader_of(model: nn.Module) -> PromptReader | None:
    """A reader for the model; None if its class is no known family.

    Raises:
        UnsupportedError: a family that is known and cannot be pruned.
    """
    reader: PromptReader | None = importlib.import_module(_READERS).reader_of(model)
    return reader
