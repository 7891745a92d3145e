#!/usr/bin/env python
"""Senna's planning questions as a question file with several images each, and their truth.

    python scripts/convert_senna_for_eval.py --qa eval_plan_qa.json --image-root /data/nuscenes \\
        --questions senna/llava_senna.jsonl --truth senna/senna_truth.json

Only entries that ask for a meta action are taken (`SPEED plan` is in the question). In Senna's data the pictures stand
in another order than the labels of the prompt, so that five of six labels name another camera. `--order labels` gives
every label its own picture; `--order published` leaves the pictures as they are stored.
"""

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, write_json, write_text_atomic
from llava.eval.common.outputs import JsonLines, JsonList
from llava.eval.tasks.join import warn
from llava.eval.tasks.senna import meta_action, read_meta_action
from llava.schema import TEXT, Fields, ListOf, check, one_of, optional
from llava.utils import UserError, cli_main

TURN = Fields({"from": one_of("human", "gpt"), "value": TEXT})
ENTRY = Fields({"token": TEXT, "conversations": ListOf(TURN, least=2), "image?": optional(TEXT),
                "images?": optional(ListOf(TEXT, least=1)), "ego_fut_trajs?": optional(TEXT)})  # fmt: skip
LABEL = re.compile(rf"<([A-Z]+(?: [A-Z]+)*) VIEW>[:\s]*{re.escape(DEFAULT_IMAGE_TOKEN)}")


def relative(name: str, root: str) -> str:
    """A picture's path below `root`, or as it is if it does not begin with it."""
    path, folder = PurePosixPath(name), PurePosixPath(root) if root else None
    return str(path.relative_to(folder)) if folder is not None and path.is_relative_to(folder) else str(path)


def by_labels(text: str, images: Sequence[str], where: str) -> list[str]:
    """The pictures in the order of the labels in front of their places, `<FRONT LEFT VIEW>` for CAM_FRONT_LEFT."""
    cameras = [f"CAM_{label.replace(' ', '_')}" for label in LABEL.findall(text)]
    if len(cameras) != len(images):
        raise UserError(f"{where}: {len(cameras)} labelled places for {len(images)} images; use --order published")
    ordered = []
    for camera in cameras:
        fitting = [name for name in images if camera in PurePosixPath(name).parts]
        if len(fitting) != 1:
            raise UserError(f"{where}: {len(fitting)} images lie in a folder {camera}, which the text asks for")
        ordered += fitting
    return ordered


def convert(entries: Sequence[Any], path: str, root: str, order: str) -> tuple[list[dict], list[dict], int]:
    """Questions, truth, and how many labels are not those of their trajectory."""
    questions, truth, other = [], [], 0
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: entry {index}"
        check(entry, ENTRY, where)
        text, answer = (turn["value"] for turn in entry["conversations"][:2])
        if "SPEED plan" not in text:
            continue
        actions = read_meta_action(answer)
        if actions is None:
            raise UserError(f"{where}: the answer {answer.strip()[:60]!r} is no meta action 'SPEED, PATH'")
        images = entry.get("images") or []
        if text.count(DEFAULT_IMAGE_TOKEN) == 1 and entry.get("image"):
            images = [entry["image"]]
        if not images or text.count(DEFAULT_IMAGE_TOKEN) not in (0, len(images)):
            places = text.count(DEFAULT_IMAGE_TOKEN)
            raise UserError(f"{where}: {places} places of images in the question, but {len(images)} images")
        if order == "labels" and len(images) > 1:
            images = by_labels(text, images, where)
        seen[entry["token"]] = number = seen.get(entry["token"], 0) + 1
        key = entry["token"] if number == 1 else f"{entry['token']}_{number}"
        questions.append({"question_id": key, "images": [relative(name, root) for name in images], "text": text})
        truth.append({"question_id": key, "speed": actions[0], "path": actions[1]})
        other += entry.get("ego_fut_trajs") is not None and meta_action(points(entry, where)) != actions
    return questions, truth, other


def points(entry: Any, where: str) -> list[tuple[float, float]]:
    """The trajectory, which is text in Senna's data: twelve numbers."""
    try:
        numbers = [float(number) for number in json.loads(entry["ego_fut_trajs"])]
    except (ValueError, TypeError, RecursionError):
        numbers = []
    if len(numbers) != 12:
        raise UserError(f"{where}: ego_fut_trajs must be twelve numbers in brackets")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Senna's planning questions as a question file, and their truth.")
    parser.add_argument("--qa", required=True, help="questions of Senna's converter, one JSON list")
    parser.add_argument("--image-root", default="", help="nuScenes' folder, taken off the images' paths")
    parser.add_argument("--order", choices=("labels", "published"), default="labels", help="order of the images")
    questions = JsonLines("questions with images", ("question_id", "images", "text"))
    truth = JsonList("meta actions", ("question_id", "speed", "path"))
    parser.add_argument("--questions", type=questions, required=True, help="written (.jsonl)")
    parser.add_argument("--truth", type=truth, required=True, help="written (.json)")
    args = parser.parse_args(argv)
    entries = read_json(args.qa, "question file")
    if not isinstance(entries, list):
        raise UserError(f"{args.qa}: not a list of questions")
    asked, answers, other = convert(entries, args.qa, args.image_root, args.order)
    if not asked:
        raise UserError(f"{args.qa}: none of {len(entries)} entries asks for a meta action ('SPEED plan')")
    if other:
        warn(f"{other} of {len(asked)} labels are not those that Senna's rules give for the trajectory beside them")
    write_text_atomic(args.questions, "".join(json.dumps(question) + "\n" for question in asked))
    write_json(args.truth, answers)
    print(f"{len(asked)} questions of {len(entries)} entries")


if __name__ == "__main__":
    main()
