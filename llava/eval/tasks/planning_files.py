"""Files of others that hold the truth of planning on nuScenes, as records of `planning.TRUTH`.

Reading a pickle runs whatever its author put into it.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.common.jsonio import require_file
from llava.eval.tasks.planning import STEPS
from llava.utils import UserError

VEHICLES = ("car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle")
COMMANDS = ("right", "left", "straight")  # of gt_ego_fut_cmd, one-hot
SPEED = 7  # of gt_ego_lcf_feat


def load_pickle(path: Path) -> Any:
    """What a pickle holds."""
    require_file(path, "pickle")
    print(f"reading {path} runs the code in it", file=sys.stderr)
    try:
        with open(path, "rb") as file:
            return pickle.load(file)
    except Exception as error:  # anything may happen in there
        raise UserError(f"{path}: cannot be read as a pickle ({type(error).__name__}: {error})") from None


def six(values: Any, where: str) -> np.ndarray:
    """The six future steps of an array whose first axis is time; with the present in front there is one more."""
    array = np.asarray(values)
    array = array[array.shape[0] % 2 :]
    if len(array) < STEPS:
        raise UserError(f"{where}: {len(array)} future steps, {STEPS} are needed")
    return array[:STEPS]


def from_folder(folder: Path) -> Iterator[dict[str, Any]]:
    """Records of GPT-Driver's evaluation folder; its grid has columns to the left and is turned over."""
    names = ("gt_traj.pkl", "gt_traj_mask.pkl", "planing_gt_segmentation_val")
    trajectories, masks, grids = (load_pickle(folder / name) for name in names)
    for token, trajectory in trajectories.items():
        where = f"{folder / names[0]}: {token}"
        try:
            path, mask, grid = np.asarray(trajectory)[0], np.asarray(masks[token])[0], np.asarray(grids[token])[0]
        except (KeyError, IndexError) as error:
            raise UserError(f"{where}: has no mask or no grid ({error})") from None
        grid = np.flip(six(grid, where), -1)
        mask = six(mask, where)
        yield {
            "token": str(token),
            "ego": rounded(six(path, where)[:, :2]),
            "mask": [int(bool(np.any(step))) for step in mask],
            "occupied": [np.argwhere(step).tolist() for step in grid],
        }


def from_infos(path: Path) -> Iterator[dict[str, Any]]:
    """Records of VAD's frames: steps are offsets, boxes are (x, y, z, width, length, height, yaw)."""
    content = load_pickle(path)
    infos = content.get("infos") if isinstance(content, Mapping) else content
    if not isinstance(infos, Sequence) or not infos:
        raise UserError(f"{path}: holds no 'infos'")
    for number, info in enumerate(infos):
        where = f"{path}: frame {number}"
        try:
            ego = np.cumsum(np.asarray(info["gt_ego_fut_trajs"], float).reshape(-1, 2), 0)
            record = {
                "token": str(info["token"]),
                "ego": rounded(six(ego, where)),
                "mask": [int(value) for value in six(np.asarray(info["gt_ego_fut_masks"]).reshape(-1), where)],
                "agents": list(agents_of(info)),
            }
            if "gt_ego_fut_cmd" in info:
                record["command"] = COMMANDS[int(np.argmax(np.asarray(info["gt_ego_fut_cmd"]).reshape(-1)))]
            if "gt_ego_lcf_feat" in info:
                record["speed"] = round(float(np.asarray(info["gt_ego_lcf_feat"]).reshape(-1)[SPEED]), 3)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise UserError(f"{where}: is no frame of VAD ({type(error).__name__}: {error})") from None
        yield record


def agents_of(info: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Vehicles and people of a frame, with a pose per step."""
    boxes = np.asarray(info["gt_boxes"], float)
    number = len(boxes)
    moves = np.asarray(info["gt_agent_fut_trajs"], float).reshape(number, -1, 2)[:, :STEPS].cumsum(1)
    masks = np.asarray(info["gt_agent_fut_masks"]).reshape(number, -1)[:, :STEPS]
    turns = np.asarray(info["gt_agent_fut_yaw"], float).reshape(number, -1)[:, :STEPS].cumsum(1)
    for box, name, move, mask, turn in zip(boxes, info["gt_names"], moves, masks, turns, strict=True):
        kind = kind_of(str(name))
        if kind is not None and mask.any():
            heading = -(box[6] + np.pi / 2)  # from the boxes' sense to that of the lidar's axes
            poses = np.column_stack([box[:2] + move, heading + turn])
            yield {
                "kind": kind, "length": round(float(box[4]), 3), "width": round(float(box[3]), 3),
                "poses": [rounded(pose) if there else None for pose, there in zip(poses, mask, strict=True)],
            }  # fmt: skip


def kind_of(name: str) -> str | None:
    """What a class of nuScenes is to the metric: a vehicle, a person, or nothing one can hit."""
    if name in VEHICLES or name.startswith("vehicle."):
        return "vehicle"
    return "pedestrian" if name == "pedestrian" or name.startswith("human.") else None


def rounded(values: np.ndarray) -> Any:
    """Numbers to a millimetre, for JSON."""
    return np.round(np.asarray(values, float), 3).tolist()
