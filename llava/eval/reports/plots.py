"""How all pictures of the reports are drawn: matplotlib into files, one set of colors.

Needs matplotlib, which is an extra (`pip install matplotlib`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import replacing
from llava.utils import UserError

DPI = 130
INK, MUTED, FAINT = "#222222", "#777777", "#d9d9d9"
EASY, HARD = "#1f77b4", "#d1495b"


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; `UserError` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(plot: Any, figure: Any, path: Path) -> None:
    """Writes a picture and frees it."""
    with replacing(path) as file:
        figure.savefig(file, dpi=DPI, facecolor="white", format=path.suffix.lstrip(".").lower() or None)
    plot.close(figure)
