"""A budget of a run as one number: tokens, or a share of each prompt's visual tokens."""

from __future__ import annotations

import contextlib
import re

from llava.eval.common.arguments import split_names
from llava.schema import LARGEST
from llava.utils import UserError

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


def budget_name(budget: Budget) -> str:
    """The budget in the name of a run's files: `n_64`, `r_0.11`."""
    return f"r_{budget}" if isinstance(budget, float) else f"n_{budget}"


def named_budget(name: str) -> Budget | None:
    """The inverse of `budget_name`; None for any other name."""
    match = re.fullmatch(r"n_(\d+)|r_(\d+\.\d+)", name)
    return _budget(match[1] or match[2]) if match else None


def budget_text(budget: Budget | None) -> str:
    """For tables: `64`, `0.11 of all`, and a dash where there is none."""
    if budget is None:
        return "–"
    return f"{budget} of all" if isinstance(budget, float) else str(budget)


def falling(budget: Budget) -> tuple[bool, float]:
    """A key to sort by: tokens first, then shares, the largest first."""
    return isinstance(budget, float), -budget
