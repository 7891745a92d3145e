"""Who answers which questions: their costs, and shares of about equal cost."""

from __future__ import annotations

import contextlib
import heapq
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.common.questions import Question
from llava.jsonfiles import read_json
from llava.utils import UserError

_CHARACTERS_PER_TOKEN = 4


def crop_counter(model_path: str | os.PathLike[str]) -> Callable[[tuple[int, int]], int]:
    """Image size (w, h) -> crops that the vision tower sees: several for a checkpoint that tiles, else 1."""
    from llava.mm_utils import parse_grid_pinpoints, select_best_resolution

    config: Any = {}
    with contextlib.suppress(UserError):
        config = read_json(Path(model_path) / "config.json", "config")
    config = config if isinstance(config, dict) else {}
    pinpoints = config.get("image_grid_pinpoints")
    tiles = "anyres" in str(config.get("image_aspect_ratio")) or config.get("model_type") == "llava_next"
    if not pinpoints or not tiles:
        return lambda size: 1

    def crops(size: tuple[int, int]) -> int:
        width, height = select_best_resolution(size, grid, config.get("anyres_resolution_rule", "effective"))
        return 1 + max(width // side, 1) * max(height // side, 1)

    try:
        grid = parse_grid_pinpoints(pinpoints)
        side = min(min(pair) for pair in grid)  # the narrowest canvas is one tile wide
        crops((1, 1))
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return lambda size: 1  # a guess at costs is good enough: the loader says what is wrong with the file
    return crops


def question_costs(
    questions: Sequence[Question], image_folder: Path, crops: Callable[[tuple[int, int]], int], patches: int = 576
) -> np.ndarray:
    """About how many tokens each prompt has, float64 `[questions]`: text by its length, images by their crops.

    Sizes come from the headers of the image files; an image that cannot be read counts as one crop.
    """
    from PIL import Image

    from llava.eval.answering.answerer import SampleError, image_path

    last: tuple[tuple[str, ...], int] = ((), 0)
    costs = np.empty(len(questions))
    varies = crops((1, 1)) > 1

    def crops_of(name: str) -> int:
        with contextlib.suppress(SampleError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            with Image.open(image_path(image_folder, name)) as image:
                return crops(image.size)
        return 1

    for i, question in enumerate(questions):
        if question.images != last[0]:
            # Where all images cost the same, nobody needs to open them.
            count = sum(map(crops_of, question.images)) if varies else len(question.images)
            last = question.images, patches * count
        tokens = last[1]
        costs[i] = tokens + len(question.text) / _CHARACTERS_PER_TOKEN + 1
    return costs


def deal(questions: Sequence[Question], costs: np.ndarray, processes: int) -> list[np.ndarray]:
    """Positions for each process, ascending, of about equal cost. Consecutive questions about an image stay together.

    Largest first to whoever has least so far; the same input gives the same parts.
    """
    groups: list[tuple[int, int]] = []
    begin = 0
    images: tuple[str, ...] = ()
    # An image with very many questions must not become the longest part: groups stay well below a fair share.
    most = max(1, min(16, len(questions) // (4 * processes)))
    for position, question in enumerate(questions):
        fresh = not question.images or question.images != images or position - begin >= most
        if position > begin and fresh:
            groups.append((begin, position))
            begin = position
        images = question.images
    if begin < len(questions):
        groups.append((begin, len(questions)))
    sums = [(float(costs[start:stop].sum()), start, stop) for start, stop in groups]
    loads = [(0.0, rank) for rank in range(processes)]
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for cost, start, stop in sorted(sums, key=lambda group: (-group[0], group[1])):
        load, rank = heapq.heappop(loads)
        dealt[rank].extend(range(start, stop))
        heapq.heappush(loads, (load + cost, rank))
    return [np.sort(np.asarray(positions, dtype=np.int64)) for positions in dealt]
