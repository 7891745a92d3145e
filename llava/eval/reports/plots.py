"""How all pictures of the reports are drawn: matplotlib into files, one set of colors.

Needs matplotlib, which is an extra (`pip install matplotlib`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llava.eval.common.jsonio import replacing
from llava.utils import UserError

DPI = 130
INK, MUTED, FAINT = "#222222", "#777777", "#d9d9d9"
EASY, HARD = "#1f77b4", "#d1495b"
_COLORS = 128


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
    """Writes a picture and frees it; a PNG with as many colors as lines and letters need, a third as large."""
    kind = path.suffix.lstrip(".").lower() or "png"
    with replacing(path) as file:
        if kind == "png":
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=DPI, facecolor="white", format=kind)
            picture = Image.open(drawn)
            few = picture.convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE)
            made_by = PngInfo()  # by which a later run knows that it may overwrite the picture
            made_by.add_text("Software", picture.info["Software"])
            few.save(file, format=kind, optimize=True, pnginfo=made_by)
        else:
            figure.savefig(file, dpi=DPI, facecolor="white", format=kind)
    plot.close(figure)
