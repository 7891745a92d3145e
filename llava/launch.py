"""What happens when a tool is started with a Python that lacks packages: one line instead of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType

from llava.places import CHECKOUT


def explain_missing_packages() -> None:
    """From now on, a package that is missing ends the process with one line and exit status 2."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or name in ("", "llava"):
            previous(kind, error, trace)
            return
        print(f"error: {sys.executable} lacks the package {name}; run: {_remedy(name)}", file=sys.stderr)
        sys.exit(2)

    sys.excepthook = hook


def _remedy(package: str) -> str:
    if CHECKOUT is None:
        return f"{sys.executable} -m pip install {package}"
    script, python = CHECKOUT / "scripts" / "demo.sh", CHECKOUT / ".venv" / "bin" / "python"
    return f"{sys.executable} -m pip install -e {CHECKOUT} (or once bash {script}, and then {python})"
