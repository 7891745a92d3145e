"""What the embedded default is: the places and budgets that `demo` and `compare` use where no flag says otherwise."""

from __future__ import annotations

DEFAULT_BUDGETS = (192, 128, 64)
# Answers are a word or a letter; the bound only matters for a model that does not stop.
MAX_NEW_TOKENS = 16
