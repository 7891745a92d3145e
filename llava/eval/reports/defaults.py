"""What the embedded default is: the places and budgets that `demo` and `compare` use where no flag says otherwise."""

from __future__ import annotations

import contextlib
from pathlib import Path

from llava.eval.common.arguments import split_names
from llava.schema import LARGEST
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "playground" / "tiny"
RESULTS = ROOT / "results"
DEFAULT_BUDGETS = (192, 128, 64)
# Answers are a word or a letter; the bound only matters for a model that does not stop.
MAX_NEW_TOKENS = 16


Budget = int | float
"""Tokens, or, as a float, a share of each prompt's visual tokens."""

BUDGETS_HELP = "target tokens, or shares of each prompt's visual tokens written with a point (0.11), by commas"


def parse_budgets(text: str) -> list[Budget]:
    """`192,128,0.11` as numbers."""
    budgets = [_budget(part) for part in split_names(text)]
    if not budgets or None in budgets:
        raise UserError(
            f"--budgets: needs numbers of at least 1 or shares above 0 and at most 1.0, by commas, got {text!r}"
        )
    return [budget for budget in budgets if budget is not None]


def parse_ratios(text: str) -> list[Budget]:
    """The value of `--target-ratio` where it takes several."""
    budgets = [_budget(str(float(part)) if part == "1" else part) for part in split_names(text)]
    if not budgets or not all(isinstance(budget, float) for budget in budgets):
        raise UserError(f"--target-ratio must be above 0 and at most 1, or several such by commas, got {text!r}")
    return [budget for budget in budgets if budget is not None]


def _budget(text: str) -> Budget | None:
    with contextlib.suppress(ValueError):
        return number if 1 <= (number := int(text)) <= LARGEST else None
    with contextlib.suppress(ValueError):
        return share if 0 < (share := float(text)) <= 1 else None
    return None
