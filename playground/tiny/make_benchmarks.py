"""Miniature benchmarks in the file formats of the real ones.

    python -m playground.tiny.make_benchmarks            # writes playground/tiny/data/eval, the same every time
    python -m playground.tiny.make_benchmarks --check    # compares what is there with what would be written

Knows which benchmarks there are and where they go; the builders are in `build_arena` (TextVQA, POPE, GQA, MME),
`build_short` (VQAv2, VizWiz), `build_choice` (ScienceQA, MMBench, MMBench-CN, SEED-Bench) and `build_open` (MM-Vet,
LLaVA-Bench).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from llava.utils import UserError, cli_main
from playground.tiny.build_arena import build_gqa, build_mme, build_pope, build_textvqa
from playground.tiny.build_choice import build_mmbench, build_mmbench_cn, build_scienceqa, build_seed
from playground.tiny.build_open import build_llava_bench, build_mmvet
from playground.tiny.build_short import build_vizwiz, build_vqav2
from playground.tiny.building import Build, Item, differences, write

DATA = Path(__file__).resolve().parent / "data" / "eval"
ARENA = ("textvqa", "pope", "gqa", "mme")
BUILDERS: dict[str, Callable[[], Build]] = {
    "textvqa": build_textvqa,
    "pope": build_pope,
    "gqa": build_gqa,
    "mme": build_mme,
    "vqav2": build_vqav2,
    "vizwiz": build_vizwiz,
    "scienceqa": build_scienceqa,
    "mmbench": build_mmbench,
    "mmbench_cn": build_mmbench_cn,
    "seed_bench": build_seed,
    "mm-vet": build_mmvet,
    "llava-bench": build_llava_bench,
}


def build_all(names: tuple[str, ...] = tuple(BUILDERS)) -> Build:
    """Several benchmarks in one."""
    total = Build()
    for name in names:
        total.add(BUILDERS[name]())
    return total


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=DATA, help="folder to write or check (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="compare instead of writing; exit status 2 on a difference"
    )
    args = parser.parse_args()
    build = build_all()
    if not args.check:
        write(build, args.root)
    wrong = differences(build, args.root)
    if wrong:
        raise UserError(f"{args.root}: {len(wrong)} files differ from what the generator makes, first: {wrong[0]}")
    others = len(build.files) + len(build.tables)
    print(f"{len(build.items)} questions, {len(build.images)} pictures, {others} other files in {args.root}")


__all__ = ["ARENA", "BUILDERS", "DATA", "Build", "Item", "build_all", "differences", "main", "write"]

if __name__ == "__main__":
    main()
