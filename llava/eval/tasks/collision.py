"""Whether a planned car and other road users share cells of a bird's-eye grid, as the planning metrics of nuScenes ask.

Grids lie around the car: rows go forward, columns to the right, 100 m each way, the origin in the middle. The car is
4.084 m long and 1.85 m wide; its middle lies half a metre in front of the point that a trajectory names (the lidar).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

LENGTH, WIDTH = 4.084, 1.85
MIDDLE = 0.5
EXTENT = 50.0
TURNS_FROM = 1.0
"""Metres: a car that moves less in a step keeps looking forward."""


@dataclass(frozen=True)
class Grid:
    """A grid of cells of `side` metres."""

    side: float
    lidar_to_ego: float = 0.985793
    """Metres by which the lidar is in front of the rear axle."""

    @property
    def size(self) -> int:
        """Rows, and columns."""
        return round(2 * EXTENT / self.side)

    @property
    def first(self) -> float:
        """Where the middle of the first cell lies."""
        return -EXTENT + self.side / 2


@dataclass(frozen=True)
class Obstacle:
    """A box. poses: (x, y, heading) per step, None where it is not there; heading 0 is to the right, pi / 2 forward."""

    length: float
    width: float
    poses: Sequence[tuple[float, float, float] | None]


def occupancy(obstacles: Sequence[Obstacle], grid: Grid, steps: int) -> np.ndarray:
    """Which cells are taken, bool `[steps, rows, columns]`.

    Corners are rounded to cells and the box between them is filled with its edges, as the published code does; cells
    along edges that are not parallel to the grid may be others than OpenCV's.
    """
    taken = np.zeros((steps, grid.size, grid.size), bool)
    for step in range(steps):
        present = [(o, o.poses[step]) for o in obstacles]
        canvas = Image.new("1", (grid.size, grid.size))
        draw = ImageDraw.Draw(canvas)
        for obstacle, pose in present:
            if pose is not None:
                corners = np.round((_corners(obstacle, pose) + EXTENT) / grid.side)
                # Far outside nothing is drawn, and PIL takes no number of any size.
                if np.abs(corners).max() < 100 * grid.size:
                    draw.polygon([(int(x), int(y)) for x, y in corners], fill=1, outline=1)
        taken[step] = np.array(canvas, bool)
    return taken


def _corners(obstacle: Obstacle, pose: tuple[float, float, float]) -> np.ndarray:
    x, y, heading = pose
    along = np.array([math.cos(heading), math.sin(heading)]) * obstacle.length / 2
    across = np.array([-math.sin(heading), math.cos(heading)]) * obstacle.width / 2
    return np.array([along + across, -along + across, -along - across, along - across]) + (x, y)


def _car(grid: Grid, middle: float) -> np.ndarray:
    """Row and column `[cells, 2]`, not yet rounded to a place, of the cells whose middle lies in the car."""
    ends = [(middle - LENGTH / 2, middle + LENGTH / 2), (-WIDTH / 2, WIDTH / 2)]
    rows, columns = (
        np.arange(math.ceil((low - grid.first) / grid.side), math.floor((high - grid.first) / grid.side) + 1)
        for low, high in ends
    )
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def _taken(cells: np.ndarray, taken: np.ndarray) -> bool:
    """cells: whole numbers `[cells, 2]`; those beyond the border count as the border's, as published."""
    row, column = np.clip(cells, 0, len(taken) - 1).T
    return bool(taken[row, column].any())


def hits(points: np.ndarray, taken: np.ndarray, grid: Grid) -> np.ndarray:
    """Whether the car, never turned, is on a taken cell: bool `[steps]`.

    points: `[steps, 2]`, right and forward; taken: `[steps, rows, columns]`.
    """
    car = _car(grid, MIDDLE)
    places = [np.floor(car + point[::-1] / grid.side).astype(int) for point in points]
    return np.array([_taken(cells, step) for cells, step in zip(places, taken, strict=True)])


def turned_hits(points: np.ndarray, taken: np.ndarray, grid: Grid) -> np.ndarray:
    """The same for a car that looks where it goes, seen from the rear axle."""
    moves = np.diff(points, axis=0, prepend=np.zeros((1, 2)))
    car = _car(grid, MIDDLE + grid.lidar_to_ego) * grid.side + grid.first  # metres, forward and right
    found = []
    for point, (right, forward), step in zip(points, moves, taken, strict=True):
        angle = math.atan2(right, forward) if math.hypot(right, forward) >= TURNS_FROM else 0.0
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        cells = np.round((car @ turn - grid.first) / grid.side) + point[::-1] / grid.side
        found.append(_taken(np.floor(cells).astype(int), step))
    return np.array(found)


def center_hits(points: np.ndarray, taken: np.ndarray, grid: Grid) -> np.ndarray:
    """Whether the cell of the point itself is taken; points outside the grid hit nothing: bool `[steps]`."""
    cells = np.floor((points[:, ::-1] - grid.first) / grid.side).astype(int)
    inside = ((cells >= 0) & (cells < grid.size)).all(1)
    row, column = np.clip(cells, 0, grid.size - 1).T
    return taken[np.arange(len(points)), row, column] & inside
