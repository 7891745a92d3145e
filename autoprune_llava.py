"""The command `autoprune`, and a look at which `llava` Python finds.

Apart from the package, because LLaVA's own package has the same name and may be found in its place.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def problem() -> str | None:
    """What to say if the `llava` that Python finds is not this package; None if it is."""
    spec = importlib.util.find_spec("llava")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if any((Path(place) / "pruning" / "registry.py").is_file() for place in places):
        return None
    found = f"is in {places[0]}" if places else "is not installed"
    return (
        f"the package llava that Python finds {found} and is not that of autoprune-llava: "
        "pip uninstall llava (LLaVA's own package), then pip install --force-reinstall --no-deps autoprune-llava"
    )


def main() -> None:
    """The console command."""
    found = problem()
    if found is not None:
        print(f"error: {found}", file=sys.stderr)
        sys.exit(2)
    from llava.__main__ import main as run
    from llava.launch import explain_missing_packages

    explain_missing_packages()
    run()


if __name__ == "__main__":
    main()
