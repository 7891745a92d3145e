"""Messages of scorers in which a question without an answer counts as wrong.

Knows `Coverage`; nothing of any benchmark's metric.
"""

from __future__ import annotations

import dataclasses
import sys

from llava.eval.scoring import MAX_EXAMPLES, Coverage


def shorten(ids: list[str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(ids[:MAX_EXAMPLES]) + (", ..." if len(ids) > MAX_EXAMPLES else "")


def warn(text: str) -> None:
    """Prints a warning to stderr, where it does not mix with the score lines."""
    print(f"warning: {text}", file=sys.stderr)


def report_missing_as_wrong(coverage: Coverage, what: str) -> None:
    """`Coverage.report` for metrics over all questions; `what` names the questions ("problems", "rows")."""
    if coverage.missing:
        count = f"{len(coverage.missing)} of {coverage.expected} {what}"
        warn(f"{count} have no answer and count as wrong: {shorten(coverage.missing)}")
    dataclasses.replace(coverage, missing=[]).report()
