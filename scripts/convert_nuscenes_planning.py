#!/usr/bin/env python
"""The truth of open-loop planning from the files of others, as `eval_planning` reads it (JSON lines).

    python scripts/convert_nuscenes_planning.py --gt-dir gpt-driver/eval --out planning_truth.jsonl
    python scripts/convert_nuscenes_planning.py --infos vad_nuscenes_infos_temporal_val.pkl --out planning_truth.jsonl

`--gt-dir`: the evaluation folder that GPT-Driver shares: `gt_traj.pkl`, `gt_traj_mask.pkl` and
`planing_gt_segmentation_val` (so spelled), a grid of taken cells per step. `--infos`: the frames of VAD, with
boxes, which every convention can be computed from.

Reading a pickle runs whatever its author put into it. Convert once, files of people you trust, and keep the result.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import require_folder, write_lines_atomic
from llava.eval.common.outputs import JsonLines
from llava.eval.tasks.planning import TRUTH
from llava.schema import check
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="The truth of open-loop planning as JSON lines.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gt-dir", help="evaluation folder of GPT-Driver")
    source.add_argument("--infos", help="frames of VAD, or others with the same keys (.pkl)")
    kind = JsonLines("planning truth", ("token", "ego"))
    parser.add_argument("--out", type=kind, required=True, help="written (.jsonl)")
    args = parser.parse_args(argv)
    from llava.eval.tasks.planning_files import from_folder, from_infos  # needs numpy, as the pickles do

    found = from_folder(require_folder(args.gt_dir, "folder")) if args.gt_dir else from_infos(Path(args.infos))
    records = [check(record, TRUTH, f"sample {record['token']}") for record in found]
    write_lines_atomic(args.out, ((json.dumps(record) + "\n").encode() for record in records))
    print(f"{len(records)} samples")


if __name__ == "__main__":
    main()
