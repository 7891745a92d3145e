"""Other packages called `llava`: LLaVA's own has the same name, and only one of the two can be imported.

Looked for on import, by a few looks at the file system, and more thoroughly by the command `autoprune`
(`autoprune_llava.py`), which also runs where the other one is found first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REMEDY = "keep one of them per environment: pip uninstall llava removes LLaVA's own, pip uninstall autoprune-llava this"


def mixed_in() -> str | None:
    """What to say if LLaVA's own files lie among those of this package; None if they do not."""
    if (HERE / "train" / "train.py").is_file():  # training is not part of this package
        return f"{HERE} has files of LLaVA's own package, which has the same name: {REMEDY}, and install that again"
    return None


def hidden() -> str | None:
    """What to say if another package of this name comes later in the search path; None if there is none."""
    for entry in sys.path:
        other = os.path.join(entry or os.curdir, "llava")
        if not os.path.isfile(os.path.join(other, "__init__.py")) or os.path.isdir(os.path.join(other, "pruning")):
            continue
        if not os.path.samefile(other, HERE):
            return f"the package llava in {other} is hidden by the one in {HERE}: {REMEDY}"
    return None


def warn_of_neighbors() -> None:
    """One line of warning if another package of this name is installed."""
    found = mixed_in() or hidden()
    if found is not None:
        import warnings

        warnings.warn(found, RuntimeWarning, stacklevel=3)
