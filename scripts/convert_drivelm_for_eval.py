#!/usr/bin/env python
"""DriveLM's scenes as a question file with six images each, and the truth with the challenge's tags.

    python scripts/convert_drivelm_for_eval.py --src v1_1_train_nus.json --hold-out 0.1 \\
        --questions drivelm/llava_drivelm.jsonl --truth drivelm/drivelm_truth.json

A public truth exists for the training scenes alone. `--hold-out 0.1` takes a tenth of them, chosen by a hash of their
tokens, `--scenes FILE` those of a list; a model must not have been trained on them, and neither is the challenge's
validation split. Scenes without tags get the challenge's choice of questions; moving status and behavior become
questions of four options, drawn by a hash of the question's id where the original draws anew each time.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, read_text, write_json, write_text_atomic
from llava.eval.common.outputs import JsonLines, JsonObject
from llava.eval.tasks.drivelm import ACCURACY, GPT, GROUPS, LANGUAGE, MATCH, questions_of_frame
from llava.schema import ANYTHING, TEXT, Fields, ListOf, MapOf, check
from llava.utils import UserError, cli_main

CAMERAS = [f"CAM_{name}" for name in ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "BACK", "BACK_LEFT", "BACK_RIGHT")]
QA = Fields({"Q": TEXT, "A": TEXT})
FRAME = Fields({"QA": Fields({f"{group}?": ListOf(QA) for group in GROUPS}), "image_paths": MapOf(TEXT, least=1),
                "key_object_infos?": MapOf(ANYTHING)})  # fmt: skip
SCENES = MapOf(Fields({"key_frames": MapOf(FRAME)}), least=1)
STATUS = ("Going ahead.", "Turn right.", "Turn left.", "Stopped.", "Back up.", "Reverse parking.")
SPEEDS = ("not moving", "driving slowly", "driving with normal speed", "driving fast", "driving very fast")
TURNS = ("going straight", "slightly steering to the left", "slightly steering to the right",
         "steering to the left", "steering to the right")  # fmt: skip
# A car that stands steers nowhere.
BEHAVIORS = tuple(
    f"The ego vehicle is {turn}. The ego vehicle is {speed}."
    for turn in TURNS
    for speed in SPEEDS
    if speed != SPEEDS[0] or turn == TURNS[0]
)
PLANNED = ("what actions could the ego vehicle take", "lead to a collision", "safe actions")
MOVING = "what is the moving status of object"


def chosen(scenes: dict[str, Any], share: float | None, listed: set[str] | None) -> dict[str, Any]:
    """The scenes that are held out."""

    def place(token: str) -> float:
        return int.from_bytes(hashlib.sha256(token.encode()).digest()[:8], "big") / 2**64

    if listed is not None:
        return {token: scene for token, scene in scenes.items() if token in listed}
    return {token: scene for token, scene in scenes.items() if share is None or place(token) < share}


def lettered(entry: dict[str, Any], options: Sequence[str], seed: str) -> dict[str, Any]:
    """The question with four options, one of them right; an answer of another kind stays as it is."""
    if entry["A"] not in options:
        return entry
    draw = random.Random(seed)
    choices = [*draw.sample([option for option in options if option != entry["A"]], 3), entry["A"]]
    draw.shuffle(choices)
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    text = f"{entry['Q']} Please select the correct answer from the following options: {listed}"
    return {**entry, "Q": text, "A": "ABCD"[choices.index(entry["A"])]}


def tagged(frame: dict[str, Any], seed: str) -> dict[str, list[dict[str, Any]]]:
    """The questions of the challenge among all of a frame, with tags."""
    all_qa = {group: frame["QA"].get(group, []) for group in GROUPS}
    infos = frame.get("key_object_infos") or {}
    objects = [key.lower() for key in infos]
    classes = [str(info.get("Visual_description", "")).split(".")[0].lower() for info in infos.values()]

    def first(group: str, tag: int, fits: Any) -> Iterator[dict[str, Any]]:
        for entry in all_qa[group]:
            if fits(entry["Q"].lower(), entry["A"].lower()):
                yield {**entry, "tag": [tag]}
                return

    important = first("perception", LANGUAGE, lambda question, answer: all(name in answer for name in classes))
    moving = first("perception", ACCURACY, lambda question, answer: MOVING in question)
    graph = first("prediction", MATCH, lambda question, answer: all(key in answer for key in objects))
    yes_no = first("prediction", ACCURACY, lambda question, answer: "yes" in answer or "no" in answer)
    return {
        "perception": [*important, *(lettered(entry, STATUS, seed + "moving") for entry in moving)],
        "prediction": [*graph, *yes_no],
        "planning": [e for part in PLANNED for e in first("planning", GPT, lambda q, answer, part=part: part in q)],
        "behavior": [
            lettered({**entry, "tag": [ACCURACY]}, BEHAVIORS, f"{seed}{i}")
            for i, entry in enumerate(all_qa["behavior"])
        ],
    }


def is_tagged(frame: dict[str, Any]) -> bool:
    return all("tag" in entry for group in GROUPS for entry in frame["QA"].get(group, []))


def image_name(path: str) -> str:
    """A picture's path from `samples` on, whatever folder DriveLM has in front."""
    parts = PurePosixPath(path).parts
    return "/".join(parts[parts.index("samples") :]) if "samples" in parts else PurePosixPath(path).name


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="DriveLM's scenes as a question file, and their truth.")
    parser.add_argument("--src", required=True, help="DriveLM's scenes (.json)")
    scenes = parser.add_mutually_exclusive_group()
    scenes.add_argument("--hold-out", type=float, metavar="SHARE", help="share of the scenes, 0 to 1; default: all")
    scenes.add_argument("--scenes-file", help="tokens of the scenes to take, one a line")
    kind = JsonLines("questions with images", ("question_id", "images", "text"))
    parser.add_argument("--questions", type=kind, required=True, help="written (.jsonl)")
    parser.add_argument(
        "--truth", type=JsonObject("DriveLM's scenes", of=("key_frames",)), required=True, help="written"
    )
    args = parser.parse_args(argv)
    if args.hold_out is not None and not 0 < args.hold_out <= 1:
        raise UserError(f"--hold-out must be above 0 and at most 1, got {args.hold_out}")
    listed = set(read_text(args.scenes_file, "list of scenes").split()) if args.scenes_file else None
    source = check(read_json(args.src, "scenes"), SCENES, args.src)
    taken = chosen(source, args.hold_out, listed)
    if not taken:
        raise UserError(f"{args.src}: none of {len(source)} scenes is taken")
    questions, truth = [], {}
    for scene, content in taken.items():
        truth[scene] = {"key_frames": {}}
        for name, frame in content["key_frames"].items():
            missing = [camera for camera in CAMERAS if camera not in frame["image_paths"]]
            if missing:
                raise UserError(f"{args.src}: scene {scene}, frame {name}: no picture of {missing[0]}")
            images = [image_name(frame["image_paths"][camera]) for camera in CAMERAS]
            asked = frame["QA"] if is_tagged(frame) else tagged(frame, f"{scene}_{name}_")
            kept = {"QA": {group: asked.get(group, []) for group in GROUPS}, "image_paths": frame["image_paths"]}
            truth[scene]["key_frames"][name] = kept
            questions += [{"question_id": q.id, "images": images, "text": q.text}
                          for q in questions_of_frame(scene, name, kept)]  # fmt: skip
    write_text_atomic(args.questions, "".join(json.dumps(question) + "\n" for question in questions))
    write_json(args.truth, truth)
    print(f"{len(questions)} questions of {len(taken)} of {len(source)} scenes")


if __name__ == "__main__":
    main()
