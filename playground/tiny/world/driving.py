"""A street seen from a car: what stands where, what its driver should do, where the car goes, and questions about it.

One bird's-eye layout, in centimetres, x to the right and y forward, the car at the origin; three lanes of 6 m, so that
what stands beside the car is seen by one camera alone. Every view matters: the light and the car in front are seen
ahead, walkers and cars beside at the sides, cars coming up from behind in the three cameras that look back.

Things are told by color, not by shape: cars are blue, walkers yellow, lights red or green, and nothing is decided by
purple barriers and cyan signs.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

LANE = 600
CAMERAS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "BACK_LEFT", "BACK_RIGHT", "BACK")
"""In the order in which a prompt shows them."""
LIGHTS, LEADS = ("none", "green", "red"), ("none", "far", "near")
COMMANDS, SPEEDS = ("straight", "left", "right"), ("slow", "fast")
METERS_PER_SECOND = {"slow": 7, "fast": 11}
ACCELERATION = 2
"""Metres per second squared, up or down."""
RADIUS = 8.0
"""Metres, of the arc of a turn."""
ASIDE = 4.5
"""Metres, of a change of lane."""
CHANGE_DEGREES = 20.0
"""Up to here a path that ends aside is a change of lane; Senna's 5 degrees would take 51 m in three seconds."""
UNIT = 0.5
"""Metres that a 1 in an answer stands for."""
SEEN = {
    "light": "FRONT", "lead": "FRONT", "front_left": "FRONT_LEFT", "front_right": "FRONT_RIGHT",
    "back_left": "BACK_LEFT", "back_right": "BACK_RIGHT", "walker_left": "FRONT_LEFT", "walker_right": "FRONT_RIGHT",
    "behind": "BACK",
}  # fmt: skip
"""Which camera sees what."""
SHARES = {
    "light": (0.53, 0.35, 0.12), "lead": (0.35, 0.15, 0.5), "command": (0.5, 0.25, 0.25), "speed": (0.5, 0.5),
    "front_left": (0.55, 0.45), "front_right": (0.55, 0.45), "back_left": (0.55, 0.45), "back_right": (0.55, 0.45),
    "walker_left": (0.65, 0.35), "walker_right": (0.65, 0.35), "behind": (0.4, 0.6),
}  # fmt: skip
"""How often scenes have what."""
_VALUES = {"light": LIGHTS, "lead": LEADS, "command": COMMANDS, "speed": SPEEDS}


@dataclass(frozen=True)
class Facts:
    """What decides."""

    light: str = "none"
    lead: str = "none"
    command: str = "straight"
    speed: str = "slow"
    front_left: bool = False
    front_right: bool = False
    back_left: bool = False
    back_right: bool = False
    walker_left: bool = False
    walker_right: bool = False
    behind: bool = False


@dataclass(frozen=True)
class Thing:
    """An upright rectangle: what it is, where its foot stands, its size and how far above the ground it begins, in
    centimetres; shade: added to its color; fact: what of `Facts` it is, empty for what decides nothing.
    """

    kind: str
    x: int
    y: int
    width: int
    height: int
    above: int = 0
    shade: int = 0
    fact: str = ""


@dataclass(frozen=True)
class Street:
    """A scene; texture: seeds what is drawn as sky."""

    facts: Facts
    things: tuple[Thing, ...]
    texture: int

    def held_out(self) -> bool:
        """Whether this arrangement belongs to evaluation: a property of what stands where, whatever is asked."""
        key = sorted((t.kind, t.x, t.y) for t in self.things)
        return zlib.crc32(repr(key).encode()) % 16 == 0


# --- what a driver does -------------------------------------------------------------------------------------------


def rule(facts: Facts) -> tuple[str, str]:
    """Speed and path, in Senna's words."""
    if facts.light == "red":
        return "STOP", "STRAIGHT"
    if facts.command != "straight":
        side = facts.command
        if getattr(facts, f"walker_{side}"):
            return "STOP", "STRAIGHT"
        careful = getattr(facts, f"back_{side}") or facts.speed == "fast"
        return "DECELERATE" if careful else "KEEP", f"{side.upper()}_TURN"
    if facts.lead == "near":
        for side in ("left", "right"):
            if not getattr(facts, f"front_{side}") and not getattr(facts, f"back_{side}"):
                return "KEEP", f"{side.upper()}_CHANGE"
        return ("STOP" if facts.speed == "slow" else "DECELERATE"), "STRAIGHT"
    return ("ACCELERATE" if facts.lead == "none" and facts.behind else "KEEP"), "STRAIGHT"


def deciding(facts: Facts) -> tuple[str, ...]:
    """The facts in a scene that the decision rests on, those that are there; what is not there has no place."""
    if facts.light == "red":
        return ("light",)
    if facts.command != "straight":
        names: Iterable[str] = (f"walker_{facts.command}", f"back_{facts.command}")
    elif facts.lead == "near":
        names = ("lead", "front_left", "back_left", "front_right", "back_right")
    else:
        names = ("lead", "behind")
    return tuple(name for name in names if getattr(facts, name) not in (False, "none"))


def waypoints(speed: str, actions: tuple[str, str]) -> list[tuple[int, int]]:
    """Six points (right, forward) in half metres, every half second: what an answer says."""
    start, (pace, path) = METERS_PER_SECOND[speed], actions
    points = []
    for step in range(1, 7):
        time = step / 2
        if pace == "STOP":
            way = start / 4 + 0.5 * (step > 1)
        else:
            way = start * time + {"ACCELERATE": 1, "DECELERATE": -1}.get(pace, 0) * ACCELERATION * time**2 / 2
        x, y = 0.0, way
        if path.endswith("CHANGE"):
            x = ASIDE * step / 6
        elif path.endswith("TURN"):
            angle = min(way / RADIUS, math.pi / 2)
            x, y = RADIUS * (1 - math.cos(angle)) + way - RADIUS * angle, RADIUS * math.sin(angle)
        side = -1 if path.startswith("LEFT") else 1
        points.append((side * math.floor(x / UNIT + 0.5), math.floor(y / UNIT + 0.5)))
    return points


def said(points: Sequence[tuple[int, int]]) -> str:
    """Waypoints as an answer: `0 7,0 14,...`."""
    return ",".join(f"{x} {y}" for x, y in points)


# --- how much can be known ----------------------------------------------------------------------------------------


def worlds() -> Iterator[tuple[Facts, float]]:
    """All combinations of facts with their probability."""
    names = list(SHARES)
    for places in itertools.product(*(range(len(SHARES[name])) for name in names)):
        facts = Facts(**{name: _value(name, place) for name, place in zip(names, places, strict=True)})
        yield facts, math.prod(SHARES[name][place] for name, place in zip(names, places, strict=True))


def best_accuracy(cameras: Iterable[str]) -> float:
    """Share of right meta actions, in percent, of whoever knows the rule and the question and sees these views."""
    views = set(cameras)
    seen = ["command", "speed", *(name for name, camera in SEEN.items() if camera in views)]
    mass: dict[tuple, dict[tuple[str, str], float]] = defaultdict(lambda: defaultdict(float))
    for facts, share in worlds():
        mass[tuple(getattr(facts, name) for name in seen)][rule(facts)] += share
    return 100 * sum(max(actions.values()) for actions in mass.values())


def _value(name: str, place: int) -> str | bool:
    return _VALUES[name][place] if name in _VALUES else bool(place)


# --- drawing scenes -----------------------------------------------------------------------------------------------


def sample_facts(rng: np.random.Generator) -> Facts:
    """Facts with the probabilities of `SHARES`."""
    drawn = {}
    for name, shares in SHARES.items():
        place = int(np.searchsorted(np.cumsum(shares), rng.random(), side="right"))
        drawn[name] = _value(name, min(place, len(shares) - 1))
    return Facts(**drawn)


def sample_street(rng: np.random.Generator, held_out: bool, facts: Facts | None = None) -> Street:
    """Draw a scene in the wanted half of the split; facts: these ones, in another arrangement."""
    while True:
        own = sample_facts(rng) if facts is None else facts
        things = [_place(name, own, rng) for name in SEEN if getattr(own, name) not in (False, "none")]
        for _ in range(int(rng.integers(0, 4))):
            if (extra := _distraction(things, rng)) is not None:
                things.append(extra)
        street = Street(own, tuple(things), int(rng.integers(1 << 31)))
        if street.held_out() == held_out:
            return street


def _place(name: str, facts: Facts, rng: np.random.Generator) -> Thing:
    """The thing that is a fact, with a little play in where it stands."""

    def about(center: int, play: int = 60) -> int:
        return center + int(rng.integers(-play, play + 1))

    shade = int(rng.integers(-14, 15))
    if name == "light":
        return Thing(f"{facts.light} light", about(300), about(1500), 110, 150, 330, shade, name)
    if name.startswith("walker"):
        side = -1 if name.endswith("left") else 1
        return Thing("walker", side * about(800, 40), about(900), 90, 180, 0, shade, name)
    if name == "lead":
        x, y = about(0, 40), about(900 if facts.lead == "near" else 1500, 50)
    elif name == "behind":
        x, y = about(0, 40), -about(800, 100)
    else:
        x = LANE * (-1 if name.endswith("left") else 1)
        y = about(350, 50) if name.startswith("front") else -about(400, 80)
    return Thing("car", x, y, 200, 150, 0, shade, name)


def _distraction(things: Sequence[Thing], rng: np.random.Generator) -> Thing | None:
    """A barrier or a sign somewhere around the car where it hides nothing; None if the first try fails."""
    degrees, distance = int(rng.integers(-180, 180)), int(rng.integers(700, 1100))
    angle = math.radians(degrees)
    x, y = round(distance * math.sin(angle)), round(distance * math.cos(angle))
    for thing in things:
        apart = abs((degrees - math.degrees(math.atan2(thing.x, thing.y)) + 180) % 360 - 180)
        if apart < 16:
            return None
    kind, width, height, above = (("barrier", 160, 90, 0), ("sign", 90, 90, 160))[int(rng.integers(2))]
    return Thing(kind, x, y, width, height, above, int(rng.integers(-14, 15)))


def asked_again(street: Street, command: str, speed: str) -> Street:
    """The same scene under another order."""
    return replace(street, facts=replace(street.facts, command=command, speed=speed))


# --- what is asked -------------------------------------------------------------------------------------------------

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
