"""Makes the miniature benchmarks in the file formats of the real ones: what is missing of `playground/tiny/data`.

    python -m playground.tiny.build                # makes what is missing, the same on every machine
    python -m playground.tiny.build --check        # makes every file in memory and compares; writes nothing
    python -m playground.tiny.build --overwrite    # also replaces files that were altered
    python -m playground.tiny.build --record       # after a change of the generator: writes the new checksums

Scripts and tests call it before they need the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.utils import UserError, cli_main

from .benchmarks import ROOT
from .ensure import COMMAND, ensure, makers
from .files import CHECKSUMS, Unreadable, checksum, read_checksums, write_checksums


def check(root: Path) -> int:
    """Compare files and generator with the committed checksums; returns the number of files."""
    wanted = read_checksums()
    make = makers()
    if make.keys() != wanted.keys():
        raise UserError(f"{CHECKSUMS}: has not the files that the generator makes; `{COMMAND} --record` writes it anew")
    for path, digits in wanted.items():
        if checksum(path, make[path]()) != digits:
            raise UserError(f"{path}: the generator makes something else than {CHECKSUMS.name} names")
        try:
            same = checksum(path, (root / path).read_bytes()) == digits
        except Unreadable as error:
            raise UserError(f"{root / path}: {error}") from error
        if not same:
            raise UserError(f"{root / path}: not the content that {CHECKSUMS.name} names")
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
    args = parser.parse_args(argv)
    if args.record:
        make = makers()
        write_checksums((path, checksum(path, make[path]())) for path in make)
        print(f"{len(make)} checksums in {CHECKSUMS}")
    elif args.check:
        print(f"{check(args.root)} files as the generator makes them in {args.root}")
    else:
        made = ensure(args.root, overwrite=args.overwrite)
        if made or not args.quiet:
            print(f"{len(read_checksums())} files in {args.root}, {made} of them made now")


if __name__ == "__main__":
    main()
