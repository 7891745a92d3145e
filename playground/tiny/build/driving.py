"""Builder of the miniature driving benchmarks: 150 held-out streets, six views each, in the formats of the real ones.

Senna's questions (and the same as its own data have them), planning on nuScenes with waypoints, DriveLM's graph of
questions for 30 streets, and questions of what can be seen in GQA's format.
"""

from __future__ import annotations

import json
import math

from ..world import driving as dq
from ..world.cameras import View, outline
from ..world.driving import (
    CAMERAS,
    METERS_PER_SECOND,
    SEEN,
    UNIT,
    Street,
    Thing,
    deciding,
    rule,
    sample_street,
    waypoints,
)
from .items import Build, dumps_lines, stream

STREETS, GRAPHS = 150, 30
STORED = ("FRONT", "FRONT_RIGHT", "FRONT_LEFT", "BACK", "BACK_LEFT", "BACK_RIGHT")
"""The order in which Senna's data have the pictures, which is not that of the labels."""
SIZES = {"car": (4.5, 2.0), "walker": (0.8, 0.8)}
"""Length and width in metres of what can be hit."""


def streets() -> list[Street]:
    """The streets of the evaluation."""
    return [sample_street(stream("driving", index), held_out=True) for index in range(STREETS)]


def image(camera: str, index: int) -> str:
    """A picture's path below nuScenes' folder."""
    return f"samples/CAM_{camera}/{index:04d}.png"


def build_driving() -> Build:
    """All of them; the pictures are shared."""
    build = Build()
    planning, senna, points, seen, truth = [], [], [], [], {}
    for index, street in enumerate(streets()):
        token, views = f"{index:04d}", [image(camera, index) for camera in CAMERAS]
        for camera in CAMERAS:
            build.images[f"nuscenes/{image(camera, index)}"] = View(street, camera)
        actions = rule(street.facts)
        planning.append({"question_id": token, "images": views, "text": dq.meta_question(street).text})
        senna.append({"question_id": token, "speed": actions[0], "path": actions[1]})
        points.append({"question_id": token, "images": views, "text": dq.points_question(street).text})
        for number, asked in enumerate(dq.perception(street)):
            key = f"{token}{number}"
            seen.append({"question_id": key, "images": views, "text": asked.text})
            truth[key] = {
                "question": asked.text, "answer": asked.answer.lower(), "isBalanced": True,
                "types": {"structural": "query" if asked.kind == "light" else "verify", "semantic": asked.kind},
            }  # fmt: skip
    whole = streets()
    build.files |= {
        "senna/llava_senna.jsonl": dumps_lines(planning),
        "senna/senna_truth.json": json.dumps(senna),
        "senna/senna_plan_qa.json": json.dumps([senna_entry(street, i) for i, street in enumerate(whole)]),
        "nuscenes_planning/llava_nuscenes_planning.jsonl": dumps_lines(points),
        "nuscenes_planning/planning_truth.jsonl": dumps_lines([planned(s, f"{i:04d}") for i, s in enumerate(whole)]),
        "drivelm/drivelm_truth.json": json.dumps({f"s{i}": graph(s, i) for i, s in enumerate(whole[:GRAPHS])}),
        "drivelm/llava_drivelm.jsonl": dumps_lines(graph_questions(whole[:GRAPHS])),
        "perception/llava_drive_perception.jsonl": dumps_lines(seen),
        "perception/drive_perception.json": json.dumps(truth),
    }
    return build


def senna_entry(street: Street, index: int) -> dict:
    """A street as Senna's converter leaves a keyframe."""
    points = waypoints(street.facts.speed, rule(street.facts))
    return {
        "token": f"{index:04d}", "scene_token": f"s{index}", "prev": "", "next": "", "fut_valid_flag": "True",
        "image": image("FRONT", index), "images": [image(camera, index) for camera in STORED],
        "ego_fut_trajs": str([number * UNIT for point in points for number in point]),
        "conversations": [{"from": "human", "value": dq.senna_text(street)},
                          {"from": "gpt", "value": ", ".join(rule(street.facts)) + "\n"}],
    }  # fmt: skip


def planned(street: Street, token: str) -> dict:
    """A street as truth of planning: cars drive on at the car's own speed, walkers stand."""
    facts = street.facts
    agents = []
    for thing in street.things:
        if thing.kind in SIZES:
            length, width = SIZES[thing.kind]
            speed = METERS_PER_SECOND[facts.speed] if thing.kind == "car" else 0
            poses = [
                [thing.x / 100, round(thing.y / 100 + speed * k / 2, 2), round(math.pi / 2, 4)] for k in range(1, 7)
            ]
            kind = "vehicle" if thing.kind == "car" else "pedestrian"
            agents.append({"kind": kind, "length": length, "width": width, "poses": poses})
    ego = [[x * UNIT, y * UNIT] for x, y in waypoints(facts.speed, rule(facts))]
    return {"token": token, "ego": ego, "mask": [1] * 6, "command": facts.command,
            "speed": METERS_PER_SECOND[facts.speed], "unit": UNIT, "agents": agents}  # fmt: skip


def thing_of(street: Street, fact: str) -> Thing:
    """The thing that is a fact."""
    (thing,) = (thing for thing in street.things if thing.fact == fact)
    return thing


def tag_of(street: Street, fact: str, number: int) -> str:
    """A thing as DriveLM names it: number, camera, and the middle of its box in the picture."""
    left, top, right, bottom = outline(thing_of(street, fact), SEEN[fact]) or (0, 0, 0, 0)
    return f"<c{number},CAM_{SEEN[fact]},{(left + right) / 2:.1f},{(top + bottom) / 2:.1f}>"


def graph(street: Street, index: int) -> dict:
    """A street as a DriveLM scene of one frame: what decides, then questions about it."""
    facts = deciding(street.facts)
    tags = [tag_of(street, fact, number) for number, fact in enumerate(facts, 1)]
    objects = " and ".join(f"{fact.replace('_', ' ')} {tag}" for fact, tag in zip(facts, tags, strict=True))
    meta, lane = dq.meta_question(street), dq.perception(street)[1]
    important = {"Q": f"{dq.order_of(street.facts)} What are the important objects?", "A": objects or "nothing"}
    about = []
    if tags:
        answer = "Yes" if thing_of(street, facts[0]).kind == "car" else "No"
        about.append({"Q": f"Is {tags[0]} a car?", "A": answer, "tag": [0]})
    return {
        "key_frames": {
            f"{index:04d}": {
                "QA": {
                    "perception": [{**important, "tag": [2]}, *about],
                    "prediction": [{"Q": "Which object comes first?", "A": tags[0] if tags else "none", "tag": [3]}],
                    "planning": [{"Q": "What should you do?", "A": meta.answer, "tag": [1]}],
                    "behavior": [{"Q": lane.text, "A": lane.answer, "tag": [0]}],
                },
                "image_paths": {f"CAM_{camera}": f"../nuscenes/{image(camera, index)}" for camera in CAMERAS},
            }
        }
    }


def graph_questions(found: list[Street]) -> list[dict]:
    """The lines of DriveLM's question file."""
    lines = []
    for index, street in enumerate(found):
        for frame, content in graph(street, index)["key_frames"].items():
            asked = [entry["Q"] for group in content["QA"].values() for entry in group]
            views = [image(camera, index) for camera in CAMERAS]
            lines += [{"question_id": f"s{index}_{frame}_{i}", "images": views, "text": q} for i, q in enumerate(asked)]
    return lines
