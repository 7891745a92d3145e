"""Makes the miniature benchmarks in the file formats of the real ones: what is missing of `playground/tiny/data`.

    python -m playground.tiny.build                # makes what is missing, the same on every machine
    python -m playground.tiny.build --check        # makes every file in memory and compares; writes nothing
    python -m playground.tiny.build --overwrite    # also replaces files that were altered
    python -m playground.tiny.build --record       # after a change of the generator: writes the new checksums
    python -m playground.tiny.build --crowded ...  # any of these for the benchmarks on crowded scenes

Scripts and tests call it before they need the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.utils import UserError, cli_main

from .benchmarks import ROOT
from .ensure import COMMAND, crowded_makers, ensure, ensure_crowded, makers
from .files import CHECKSUMS, CHECKSUMS_CROWDED, Unreadable, checksum, read_checksums, write_checksums


def check(root: Path, crowded: bool = False) -> int:
    """Compare files and generator with the committed checksums; returns the number of files."""
    checksums = CHECKSUMS_CROWDED if crowded else CHECKSUMS
    wanted = read_checksums(checksums)
    make = crowded_makers() if crowded else makers()
    if make.keys() != wanted.keys():
        raise UserError(f"{checksums}: has not the files that the generator makes; `{COMMAND} --record` writes it anew")
    for path, digits in wanted.items():
        if checksum(path, make[path]()) != digits:
            raise UserError(f"{path}: the generator makes something else than {checksums.name} names")
        try:
            same = checksum(path, (root / path).read_bytes()) == digits
        except Unreadable as error:
            raise UserError(f"{root / path}: {error}") from error
        if not same:
            raise UserError(f"{root / path}: not the content that {checksums.name} names")
    return len(wanted)


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the data (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare instead of writing; exit status 2 on a difference")
    what.add_argument("--overwrite", action="store_true", help="also replace files that were altered")
    what.add_argument("--record", action="store_true", help="write the checksums of what the generator makes now")
    parser.add_argument("--quiet", action="store_true", help="say nothing where nothing is missing")
    parser.add_argument("--crowded", action="store_true", help="the benchmarks on crowded scenes")
    args = parser.parse_args(argv)
    checksums = CHECKSUMS_CROWDED if args.crowded else CHECKSUMS
    if args.record:
        make = crowded_makers() if args.crowded else makers()
        write_checksums(((path, checksum(path, make[path]())) for path in make), checksums)
        print(f"{len(make)} checksums in {checksums}")
    elif args.check:
        print(f"{check(args.root, args.crowded)} files as the generator makes them in {args.root}")
    else:
        made = (ensure_crowded if args.crowded else ensure)(args.root, overwrite=args.overwrite)
        if made or not args.quiet:
            print(f"{len(read_checksums(checksums))} files in {args.root}, {made} of them made now")


if __name__ == "__main__":
    main()
