"""Open-loop planning on nuScenes: distance to the driven trajectory and collisions, in three conventions.

The conventions differ by more than methods do (a factor of 1.6 for equal predictions), so every figure carries the name
of its own. Trajectories are six points (x right, y forward) in metres, every half second, from the lidar at time 0.

| | L2 at 1, 2, 3 s | collision at 1, 2, 3 s | obstacles | samples |
|---|---|---|---|---|
| uniad | that of the point | at the point | vehicles | all; points without truth count 0 |
| stp3 (VAD too) | mean up to there | mean up to there | vehicles and pedestrians | all six points have truth |
| omnidrive | mean up to there | any up to there | vehicles | all six points have truth |

A step where the true trajectory collides counts as none. OmniDrive's rate of leaving the road needs maps and is not
computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_records
from llava.eval.common.questions import Question
from llava.eval.tasks.task import Task, covered, id_of
from llava.schema import NUMBER, TEXT, WHOLE, Fields, ListOf, above, between, one_of, optional
from llava.utils import UserError

STEPS = 6
HORIZONS = (2, 4, 6)
"""Steps of the figures at 1, 2 and 3 seconds."""
CONVENTIONS = ("uniad", "stp3", "omnidrive")
TITLES = {"uniad": "UniAD", "stp3": "ST-P3 and VAD", "omnidrive": "OmniDrive"}
ROWS = {"l2": "L2 (m)", "collision": "collision (%)", "center": "collision of the center (%)"}
_PAIR = ListOf(NUMBER, least=2, most=2)
_AGENT = Fields({"kind": one_of("vehicle", "pedestrian"), "length": above(0), "width": above(0),
                 "poses": ListOf(optional(ListOf(NUMBER, least=3, most=3)), least=STEPS, most=STEPS)})  # fmt: skip
_CELL = ListOf(between(0, 199, WHOLE), least=2, most=2)
TRUTH = Fields({
    "token": TEXT, "ego": ListOf(_PAIR, least=STEPS, most=STEPS),
    "mask?": ListOf(one_of(0, 1), least=STEPS, most=STEPS),
    "agents?": ListOf(_AGENT), "occupied?": ListOf(ListOf(_CELL), least=STEPS, most=STEPS),
    "unit?": above(0), "frame?": one_of("lidar", "ego"),
})  # fmt: skip


def load_truth(path: str | Path) -> dict[str, dict[str, Any]]:
    """Token -> record, from JSON lines."""
    truth: dict[str, dict[str, Any]] = {}
    for record in read_records(path, "truth file", TRUTH):
        if record["token"] in truth:
            raise UserError(f"{path}: token {record['token']} occurs twice")
        truth[record["token"]] = record
    if not truth:
        raise UserError(f"{path}: holds no trajectory")
    return truth


def print_scores(result: Mapping[str, Any]) -> None:
    """One table per convention, never one with several."""
    for name, figures in result["conventions"].items():
        print(f"{TITLES[name]} convention, {figures['samples']} samples\t1 s\t2 s\t3 s\tavg")
        for kind, title in ROWS.items():
            values = [figures[f"{kind}_{end}"] for end in ("1s", "2s", "3s", "avg")]
            print("\t".join([title, *("-" if value is None else f"{value:.3f}" for value in values)]))
    print(f"answers without six points, scored as standing still: {result['unread']:.2f}%")


def flat_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """`CONVENTION_FIGURE` for all figures, `unread` in percent, `samples`."""
    flat = {f"{name}_{key}": v for name, figures in result["conventions"].items() for key, v in figures.items()}
    return {**flat, "unread": result["unread"], "samples": result["samples"]}


class Planning(Task):
    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        return covered(load_truth(folder / self.truth[0]), questions, id_of, self.truth[0])


TASK = Planning(
    name="nuscenes_planning",
    title="nuScenes-planning",
    folder="nuscenes_planning",
    question_file="llava_nuscenes_planning.jsonl",
    image_folder="../nuscenes",
    truth=("planning_truth.jsonl",),
    source="questions of your model's kind, truth of scripts/convert_nuscenes_planning.py; images: nuscenes.org",
)
