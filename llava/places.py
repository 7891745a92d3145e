"""Where things lie that are no code: in a checkout, in its folders; in an installation, where the user works."""

from __future__ import annotations

import os
from pathlib import Path

_ABOVE = Path(__file__).resolve().parents[1]
CHECKOUT: Path | None = _ABOVE if (_ABOVE / "playground" / "tiny" / "build").is_dir() else None
"""Root of the repository; None where the package is installed."""

WORK = CHECKOUT or Path()
"""What results and data sets are relative to: the checkout, or the current folder."""

RESULTS = WORK / "results"
MODELS = WORK / "playground" / "models"
DATA = WORK / "playground" / "data" / "eval"
"""Benchmarks in upstream's layout."""


def cache_folder() -> Path:
    """The user's folder for what can be made again (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoprune-llava"


def scripts_folder() -> Path:
    """The shell scripts of the benchmarks."""
    return (CHECKOUT or Path(__file__).resolve().parent) / "scripts"
