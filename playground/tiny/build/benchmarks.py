"""The miniature benchmarks by name, and where they lie.

Their builders are in `arena` (TextVQA, POPE, GQA, MME), `short` (VQAv2, VizWiz), `choice` (ScienceQA, MMBench,
MMBench-CN, SEED-Bench), `open_ended` (MM-Vet, LLaVA-Bench) and `driving` (six views a question, in a folder of its
own).
"""

from __future__ import annotations

from collections.abc import Callable

from llava.tiny import DATA as ROOT

from .arena import build_gqa, build_mme, build_pope, build_textvqa
from .choice import build_mmbench, build_mmbench_cn, build_scienceqa, build_seed
from .items import CROWDED, PLAIN, WIDE, Build, Family
from .open_ended import build_llava_bench, build_mmvet
from .short import build_vizwiz, build_vqav2

DATA, DATA_WIDE, DATA_DRIVE = ROOT / "eval", ROOT / "eval_wide", ROOT / "eval_drive"
DATA_CROWDED = ROOT / "eval_crowded"
ARENA = ("textvqa", "pope", "gqa", "mme")
BUILDERS: dict[str, Callable[..., Build]] = {
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


def build_all(names: tuple[str, ...] = tuple(BUILDERS), family: Family = PLAIN) -> Build:
    """Several benchmarks in one, on one family of scenes."""
    total = Build()
    for name in names:
        total.add(BUILDERS[name](family=family))
    return total


def build_wide() -> Build:
    """TextVQA and GQA on wide, tall and large pictures, for the tiny LLaVA-1.6."""
    total = build_textvqa(30, WIDE)
    total.add(build_gqa(30, WIDE))
    return total


def build_crowded(names: tuple[str, ...] = tuple(BUILDERS)) -> Build:
    """The same benchmarks on crowded scenes."""
    return build_all(names, CROWDED)
