"""Makes what is missing of the miniature benchmarks, and says where they and the small model lie.

python -m llava.tiny
python -m llava.tiny --only-for DATA_DIR    # does nothing for any other folder than theirs, and says nothing
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.tiny import BENCHMARKS, CHECKPOINT, make_benchmarks
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--only-for", metavar="DATA_DIR", help="make them if this is their folder, and say nothing")
    args = parser.parse_args(argv)
    make_benchmarks(args.only_for or BENCHMARKS)
    if args.only_for is None:
        print(f"model: {CHECKPOINT}\nbenchmarks: {BENCHMARKS}")


if __name__ == "__main__":
    main()
