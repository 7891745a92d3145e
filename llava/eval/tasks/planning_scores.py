"""Figures of planned trajectories; what the conventions are stands in `planning`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.tasks.collision import Grid, Obstacle, center_hits, hits, occupancy, turned_hits
from llava.eval.tasks.join import join_answers, load_answers, require_joined
from llava.eval.tasks.planning import CONVENTIONS, HORIZONS, STEPS, load_truth

FARTHEST = 1000.0
"""Metres; a point beyond it is no point of a plan for three seconds."""
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_IN_BRACKETS = re.compile(rf"[(\[]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[)\]]")
_BARE = re.compile(rf"\s*({_NUMBER})\s+({_NUMBER})\s*")
_COARSE, _FINE = Grid(0.5), Grid(0.1)


def read_points(text: str, unit: float = 1.0, frame: str = "lidar") -> np.ndarray | None:
    """The six points `[6, 2]` (right, forward; metres) of an answer; None if it does not hold exactly six.

    Read are pairs in brackets, `(0.0, 2.5), ...` with any words around them, and, as the whole text, `0 5,0 10,...`.
    unit: metres that a 1 stands for; frame: `ego` for pairs (forward, left), as OmniDrive has them.
    """
    pairs = _IN_BRACKETS.findall(text)
    if not pairs:
        found = [_BARE.fullmatch(part) for part in text.strip().rstrip(".").split(",")]
        pairs = [part.groups() for part in found if part is not None] if all(found) else []
    if len(pairs) != STEPS:
        return None
    points = np.array([[float(number) for number in pair] for pair in pairs]) * unit
    if not np.isfinite(points).all() or np.abs(points).max() > FARTHEST:
        return None
    return points if frame == "lidar" else np.stack([-points[:, 1], points[:, 0]], 1)


@dataclass(frozen=True)
class Scored:
    """One sample: errors `[6]` in metres, collisions `[6]` by name of the convention, what has truth `[6]`.

    collisions, center: None without obstacles in the truth, or where their form does not do for the convention.
    """

    errors: np.ndarray
    mask: np.ndarray
    collisions: Mapping[str, np.ndarray | None]
    center: Mapping[str, np.ndarray | None]


def score_sample(truth: Mapping[str, Any], points: np.ndarray, conventions: Sequence[str] = CONVENTIONS) -> Scored:
    """Errors and collisions of one trajectory `[6, 2]`."""
    ego = np.array(truth["ego"], float)
    mask = np.array(truth.get("mask", [1] * STEPS), bool)
    collisions: dict[str, np.ndarray | None] = dict.fromkeys(CONVENTIONS)
    center: dict[str, np.ndarray | None] = dict.fromkeys(CONVENTIONS)
    for name in conventions:
        grid = _FINE if name == "omnidrive" else _COARSE
        cells = _occupied(truth, grid, ("vehicle", "pedestrian") if name == "stp3" else ("vehicle",), name)
        if cells is not None:
            box = turned_hits if name == "omnidrive" else hits
            free = ~box(ego, cells, grid) & mask
            collisions[name] = box(points, cells, grid) & free
            center[name] = center_hits(points, cells, grid) & free
    return Scored(np.hypot(*(points - ego).T) * mask, mask, collisions, center)


def _occupied(truth: Mapping[str, Any], grid: Grid, kinds: Sequence[str], convention: str) -> np.ndarray | None:
    if "agents" in truth:
        # OmniDrive looks from the car's rear axle, not from the lidar.
        forward = grid.lidar_to_ego if convention == "omnidrive" else 0.0
        obstacles = [
            Obstacle(
                a["length"], a["width"], tuple(pose and (pose[0], pose[1] + forward, pose[2]) for pose in a["poses"])
            )
            for a in truth["agents"]
            if a["kind"] in kinds
        ]
        return occupancy(obstacles, grid, STEPS)
    if "occupied" in truth and grid is _COARSE:
        cells = np.zeros((STEPS, grid.size, grid.size), bool)
        for step, places in enumerate(truth["occupied"]):
            for row, column in places:
                cells[step, row, column] = True
        return cells
    return None


def evaluate_planning(
    truth: Mapping[str, Mapping[str, Any]], answers: Sequence[dict[str, Any]], conventions: Sequence[str] = CONVENTIONS
) -> dict[str, Any]:
    """Figures of each convention over the answered samples.

    truth: token -> a record of `TRUTH`; answers: `question_id` (the token) and `text`. An answer without six points
    counts as standing still and is counted in `unread` (percent). Figures: `l2_1s`, `l2_2s`, `l2_3s`, `l2_avg` in
    metres; `collision_...` of the car's box and `center_...` of its center in percent, None where the truth does not
    say; `samples`.
    """
    found, coverage = join_answers(truth, answers, lambda answer: str(answer["question_id"]))
    scored, unread = [], 0
    for token, text in found.items():
        record = truth[token]
        points = read_points(text, record.get("unit", 1.0), record.get("frame", "lidar"))
        unread += points is None
        points = np.zeros((STEPS, 2)) if points is None else points
        scored.append(score_sample(record, points, conventions))
    return {
        "conventions": {name: figures_of(name, scored) for name in conventions},
        "unread": 100.0 * unread / len(found) if found else 0.0,
        "samples": len(found),
        "coverage": coverage,
    }


def figures_of(convention: str, scored: Sequence[Scored]) -> dict[str, float | None]:
    """The figures of one convention; None for what the truth does not say."""
    counted = [s for s in scored if convention == "uniad" or s.mask.all()]
    figures: dict[str, float | None] = {}
    kinds: dict[str, tuple[list[Any], float]] = {
        "l2": ([s.errors for s in counted], 1.0),
        "collision": ([s.collisions[convention] for s in counted], 100.0),
        "center": ([s.center[convention] for s in counted], 100.0),
    }
    for name, (rows, factor) in kinds.items():
        if not rows or any(row is None for row in rows):
            values: list[float | None] = [None] * len(HORIZONS)
        else:
            steps = np.array(rows, float)
            values = [factor * float(_until(convention, name, steps[:, :end]).mean()) for end in HORIZONS]
        figures |= {f"{name}_{second}s": value for second, value in enumerate(values, 1)}
        known = [value for value in values if value is not None]
        figures[f"{name}_avg"] = sum(known) / len(known) if known else None
    figures["samples"] = len(counted)
    return figures


def _until(convention: str, name: str, steps_NT: np.ndarray) -> np.ndarray:
    """One value per sample from its steps up to a horizon."""
    if convention == "uniad":
        return steps_NT[:, -1]
    if convention == "omnidrive" and name != "l2":
        return steps_NT.max(1)
    return steps_NT.mean(1)


def score_files(truth: str, result_file: str, conventions: Sequence[str] = CONVENTIONS) -> dict[str, Any]:
    """`evaluate_planning` on files; raises `UserError` when no answer belongs to a sample."""
    result = evaluate_planning(load_truth(truth), load_answers(result_file, keep_torn=True), conventions)
    require_joined(result["samples"], result_file, f"a sample of {Path(truth).name}")
    return result
