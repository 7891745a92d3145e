"""`python -m llava` is the command `autoprune`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.doors import enter
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return enter(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
