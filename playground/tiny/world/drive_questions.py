"""Questions about streets: what to do, where to go, and what can be seen, with the facts each rests on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .driving import CAMERAS, SEEN, Facts, Street, deciding, rule, said, waypoints

VIEW_NAMES = {camera: camera.lower().replace("_", " ") for camera in CAMERAS}
GOALS = {"straight": "go straight", "left": "turn left", "right": "turn right"}
META, POINTS = "SPEED plan and PATH plan?", "Six points, in half metres?"
ACTIONS = "KEEP ACCELERATE DECELERATE STOP; STRAIGHT LEFT_TURN RIGHT_TURN LEFT_CHANGE RIGHT_CHANGE"


@dataclass(frozen=True)
class Asked:
    """A question: kind, text, answer, and the facts of the street whose things it rests on."""

    kind: str
    text: str
    answer: str
    rests_on: tuple[str, ...]


def order_of(facts: Facts) -> str:
    """What the driver is told: the speed, and where to go."""
    return f"You drive {facts.speed} and want to {GOALS[facts.command]}."


def meta_question(street: Street) -> Asked:
    """What to do: a speed and a path."""
    facts = street.facts
    return Asked("meta", f"{order_of(facts)} {META}", ", ".join(rule(facts)), deciding(facts))


def points_question(street: Street) -> Asked:
    """Where the car goes in three seconds."""
    facts = street.facts
    return Asked("points", f"{order_of(facts)} {POINTS}", said(waypoints(facts.speed, rule(facts))), deciding(facts))


def senna_text(street: Street) -> str:
    """The question in Senna's manner, with a label in front of every view."""
    views = "".join(f"<{VIEW_NAMES[camera].upper()} VIEW>:\n<image>\n" for camera in CAMERAS)
    return f"{views}{order_of(street.facts)} SPEED plan and PATH plan? Choose one of each: {ACTIONS}."


def perception(street: Street) -> list[Asked]:
    """Four things to see: the light, both lanes beside, what is in a view, a walker."""
    facts, number = street.facts, street.texture
    lane, walk = ("left", "right")[number % 2], ("left", "right")[number // 2 % 2]
    beside = (f"front_{lane}", f"back_{lane}")
    camera = CAMERAS[number // 4 % len(CAMERAS)]
    cars = _there(facts, beside)
    seen = [thing for thing in street.things if thing.kind == "car" and SEEN.get(thing.fact) == camera]
    walker = _there(facts, (f"walker_{walk}",))
    return [
        Asked("light", "What color is the light?", facts.light, _there(facts, ("light",))),
        Asked("lane", f"Is the lane on the {lane} free?", "No" if cars else "Yes", cars),
        Asked("car", f"Is there a car in the {VIEW_NAMES[camera]} view?", "Yes" if seen else "No",
              tuple(thing.fact for thing in seen)),
        Asked("walker", f"Is there a walker on the {walk}?", "Yes" if walker else "No", walker),
    ]  # fmt: skip


def questions(street: Street) -> list[Asked]:
    """All of them, the plans first."""
    return [meta_question(street), points_question(street), *perception(street)]


def _there(facts: Facts, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if getattr(facts, name) not in (False, "none"))
