"""The small LLaVA that ships with this package, and the miniature benchmarks that are made for it.

In a checkout both are `playground/tiny`, and this package has that folder's modules: `llava.tiny.build` is
`playground/tiny/build`. An installation brings the generator and the checkpoint along; the benchmarks, which are made
on first use, go to the user's cache.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from llava.places import CHECKOUT, cache_folder

FOLDER = Path(__file__).resolve().parent if CHECKOUT is None else CHECKOUT / "playground" / "tiny"
if CHECKOUT is not None:
    __path__.append(str(FOLDER))

CHECKPOINT = FOLDER / "models" / "tiny-llava-v1.5"
DATA = cache_folder() / "tiny" if CHECKOUT is None else FOLDER / "data"
"""Where the miniature benchmarks are made."""
BENCHMARKS = DATA / "eval"
"""Those for LLaVA-1.5, in upstream's layout."""
CROWDED = DATA / "eval_crowded"
"""The same on crowded scenes; made only where somebody asks for them."""


def make_benchmarks(folder: str | Path = BENCHMARKS) -> None:
    """Makes what is missing of the miniature benchmarks if `folder` is where they belong; `UserError` if that fails."""
    if Path(folder).resolve() == BENCHMARKS.resolve():
        importlib.import_module("llava.tiny.build.ensure").ensure(DATA)
    elif Path(folder).resolve() == CROWDED.resolve():
        importlib.import_module("llava.tiny.build.ensure").ensure_crowded(DATA)
