"""Miniature benchmarks in the file formats of the real ones.

    python -m playground.tiny.make_benchmarks            # writes playground/tiny/data, the same every time
    python -m playground.tiny.make_benchmarks --check    # compares what is there with what would be written

Knows which benchmarks there are and where they go; the builders are in `build_arena` (TextVQA, POPE, GQA, MME),
`build_short` (VQAv2, VizWiz), `build_choice` (ScienceQA, MMBench, MMBench-CN, SEED-Bench) and `build_open` (MM-Vet,
LLaVA-Bench).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava.utils import UserError, cli_main
from playground.tiny.build_arena import build_gqa, build_mme, build_pope, build_textvqa
from playground.tiny.build_choice import build_mmbench, build_mmbench_cn, build_scienceqa, build_seed
from playground.tiny.build_open import build_llava_bench, build_mmvet
from playground.tiny.build_short import build_vizwiz, build_vqav2
from playground.tiny.building import Build, differences, write
from playground.tiny.scenes import Scene
from playground.tiny.wide import sample_wide

ROOT = Path(__file__).resolve().parent / "data"
DATA, DATA_WIDE = ROOT / "eval", ROOT / "eval_wide"
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


def build_wide() -> Build:
    """TextVQA and GQA on wide, tall and large pictures, for the tiny LLaVA-1.6."""
    total = build_textvqa(30, "wide-textvqa", wide_scene)
    total.add(build_gqa(30, "wide-gqa", wide_scene))
    return total


def wide_scene(rng: np.random.Generator, word_share: float = 0.6) -> Scene:
    """Five to eight objects, from the evaluation half."""
    return sample_wide(rng, 5, 8, held_out=True, word_share=word_share)


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of eval and eval_wide (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="compare instead of writing; exit status 2 on a difference"
    )
    args = parser.parse_args()
    for root, build in ((args.root / DATA.name, build_all()), (args.root / DATA_WIDE.name, build_wide())):
        if not args.check:
            write(build, root)
        wrong = differences(build, root)
        if wrong:
            raise UserError(f"{root}: {len(wrong)} files differ from what the generator makes, first: {wrong[0]}")
        others = len(build.files) + len(build.tables)
        print(f"{len(build.items)} questions, {len(build.images)} pictures, {others} other files in {root}")


if __name__ == "__main__":
    main()
