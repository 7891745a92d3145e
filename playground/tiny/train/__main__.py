"""Train the tiny LLaVA, stage by stage.

    python -m playground.tiny.train --stage tokenizer
    python -m playground.tiny.train --stage vision --minutes 25 --threads 1 &
    python -m playground.tiny.train --stage language --minutes 25 --threads 1
    python -m playground.tiny.train --stage align --minutes 1
    python -m playground.tiny.train --stage joint --minutes 20
    python -m playground.tiny.train.export && python -m playground.tiny.measure.arena
    python -m playground.tiny.train --stage extend --minutes 48
    python -m playground.tiny.train.export --state extend.pt && python -m playground.tiny.measure.arena
    python -m playground.tiny.train --stage blank --minutes 45
    python -m playground.tiny.train.export --state blank.pt && python -m playground.tiny.measure.arena
    python -m playground.tiny.train --stage anyres --minutes 20
    python -m playground.tiny.train.export --state anyres.pt
    python -m playground.tiny.train --stage drive --minutes 45 --threads 1
    python -m playground.tiny.train.export --state drive.pt
    python -m playground.tiny.train --stage drive-adapter --minutes 20
    python -m playground.tiny.train.export --state drive-adapter.pt
    python -m playground.tiny.train --stage sight --minutes 26 --threads 1
    python -m playground.tiny.train --stage deep --minutes 12 --device cuda --workers 15 --batch 48 --compile
    python -m playground.tiny.train.export --state deep.pt

Every stage saves its weights to `playground/tiny/runs/` as it goes, so a run can be stopped at any time; `--resume`
continues from there (with scenes not drawn before and fresh optimizers).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llava.utils import UserError, cli_main
from playground.tiny.train import text
from playground.tiny.train.anyres import train_anyres
from playground.tiny.train.blank import train_blank
from playground.tiny.train.common import RUNS
from playground.tiny.train.deep import STATE, start, train_deep
from playground.tiny.train.driving import Plan, train_drive
from playground.tiny.train.export import load
from playground.tiny.train.extend import train_extend
from playground.tiny.train.joint import align, train_joint
from playground.tiny.train.language import train_language
from playground.tiny.train.sight import train_sight
from playground.tiny.train.vision import train_vision

STAGES = {
    "tokenizer": (),
    "vision": (),
    "language": (),
    "align": ("vision.pt", "language.pt"),
    "joint": ("joint.pt",),
    "extend": (),
    "blank": (),
    "anyres": (),
    "drive": (),
    "drive-adapter": ("drive.pt",),
    "sight": (),
    "deep": ("sight.pt",),
}


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m playground.tiny.train",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--stage", choices=tuple(STAGES), required=True, help="what to train")
    parser.add_argument(
        "--minutes", type=float, default=20, help="training time; the learning rate falls towards its end"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rate", type=float, default=None, help="factor on the learning rates")
    parser.add_argument(
        "--resume", action="store_true", help="language, extend, blank, anyres, drive: continue the saved run"
    )
    parser.add_argument(
        "--run",
        type=int,
        default=0,
        help="number of the restart, chooses the random stream",
    )
    parser.add_argument("--copying", action="store_true", help="extend: set up the head that copies option letters")
    parser.add_argument("--deepen", action="store_true", help="joint: grow the decoder from six to twelve layers first")
    parser.add_argument(
        "--full-share",
        type=float,
        help="last part of the run with all visual tokens: joint (0.2), anyres (0.1), drive (0.25, one step in four)",
    )
    parser.add_argument("--folder", type=Path, default=RUNS, help="sight, deep: where states and logs lie")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="deep, drive: where to train")
    parser.add_argument("--batch", type=int, default=4, help="deep, drive: pictures or streets in a step")
    parser.add_argument("--pool", type=int, default=3000, help="drive: streets whose features are computed first")
    deep = parser.add_argument_group("stage deep", "goes on by itself where the last run stopped")
    deep.add_argument("--precise", action="store_true", help="fp32 instead of bf16")
    deep.add_argument("--compile", action="store_true", help="compile the layers, for a GPU")
    deep.add_argument("--workers", type=int, default=0, help="processes that draw pictures and questions; 0: none")
    deep.add_argument("--stop-after", type=float, default=float("inf"), help="end this run after so many seconds")
    args = parser.parse_args()
    folder = args.folder if args.stage in ("sight", "deep") else RUNS
    needed = STAGES[args.stage] + ((f"{args.stage}.pt",) if args.resume else ())
    if args.stage == "deep" and (folder / STATE).is_file():
        needed = ()
    for name in needed:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; train the earlier stages first")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine or this torch has no CUDA")
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes}: must be above 0")
    torch.set_num_threads(args.threads)
    if args.stage == "tokenizer":
        text.train_tokenizer()
    elif args.stage == "vision":
        train_vision(RUNS, args.minutes)
    elif args.stage == "language":
        train_language(RUNS, args.minutes, resume=args.resume, rate=args.rate or 0.6)
    elif args.stage == "align":
        align(RUNS, args.minutes)
    elif args.stage == "extend":
        train_extend(
            load(), RUNS, args.minutes, rate=args.rate or 0.3, run=args.run, resume=args.resume, copying=args.copying
        )
    elif args.stage == "blank":
        train_blank(load(), RUNS, args.minutes, rate=args.rate or 1.0, run=args.run, resume=args.resume)
    elif args.stage == "sight":
        train_sight(load(), folder, args.minutes, run=args.run, resume=args.resume)
    elif args.stage == "deep":
        sight = None if (folder / STATE).is_file() else torch.load(folder / "sight.pt", map_location="cpu")
        train_deep(
            start(load(), sight),
            folder,
            args.minutes,
            args.batch,
            rate=args.rate or 0.5,
            device=args.device,
            workers=args.workers,
            compiled=args.compile,
            stop_after=args.stop_after,
            run=args.run,
            precise=args.precise,
        )
    elif args.stage == "anyres":
        share = 0.1 if args.full_share is None else args.full_share
        train_anyres(
            load(), RUNS, args.minutes, 6, rate=args.rate or 0.2, full_share=share, run=args.run, resume=args.resume
        )
    elif args.stage.startswith("drive"):
        share = 0.25 if args.full_share is None else args.full_share
        plan = Plan(minutes=args.minutes, batch=args.batch, rate=args.rate or 0.5, full_share=share)
        train_drive(load(), RUNS, plan, args.pool, args.run, args.resume, args.stage == "drive-adapter", args.device)
    else:
        train_joint(
            RUNS,
            args.minutes,
            rate=args.rate or 0.3,
            run=args.run,
            full_share=args.full_share or 0.2,
            deepen=args.deepen,
        )


if __name__ == "__main__":
    main()
