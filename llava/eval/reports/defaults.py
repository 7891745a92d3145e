"""What the embedded default is: the places and budgets that `demo` and `compare` use where no flag says otherwise."""

from __future__ import annotations

from pathlib import Path

from llava.eval.common.arguments import split_names
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "playground" / "tiny"
RESULTS = ROOT / "results"
DEFAULT_BUDGETS = (192, 128, 64)
# Answers are a word or a letter; the bound only matters for a model that does not stop.
MAX_NEW_TOKENS = 16


def parse_budgets(text: str) -> list[int]:
    """`192,128,64` as numbers."""
    try:
        budgets = [int(part) for part in split_names(text)]
    except ValueError:
        budgets = []
    if not budgets or min(budgets) < 1:
        raise UserError(f"--budgets: needs numbers of at least 1 separated by commas, got {text!r}")
    return budgets
