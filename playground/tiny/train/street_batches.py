"""Training batches of the stage `drive`: streets of the pool, each with a few of its visual tokens and many questions.

A row is [head ids | visual tokens with what stands between pictures] and, apart from it, its questions: each sees the
row and itself only, and goes on where the prompt does, so that each is exactly what evaluation feeds. Rows hold the
patches of things and some of the background. Half of the rows are pruned prompts. In the other half every patch of the
background stands for all of its view that were left out: its attention logits are raised by the logarithm of their
number, which is what the softmax over all 3,456 visual tokens would see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token
from playground.tiny.train import text
from playground.tiny.train.streets import PATCHES, street_of, things_at
from playground.tiny.world import driving as dq
from playground.tiny.world.driving import CAMERAS, COMMANDS, LEADS, LIGHTS, SEEN, SPEEDS, Street, asked_again, rule

MIXED = 128
"""Tokens of a view behind Senna's adapter."""
FACTS = tuple(SEEN)
VALUES = {"light": LIGHTS, "lead": LEADS, **{name: (False, True) for name in FACTS[2:]}}
SHOWN = ("", "red light", "green light", "far lead", "near lead", *FACTS[2:])
"""What a patch can show: nothing that decides, or what fact."""
SHOWING = {name: torch.tensor([i for i, value in enumerate(SHOWN) if value.split()[-1:] == [name]]) for name in FACTS}
"""Classes of `SHOWN` that are a fact: `front_left` itself, `light` and `lead` in any of their forms."""
PACES = ("KEEP", "ACCELERATE", "DECELERATE", "STOP")
PATHS = ("STRAIGHT", "LEFT_TURN", "RIGHT_TURN", "LEFT_CHANGE", "RIGHT_CHANGE")
TOPICS = (
    "What color is the light?",
    *(f"Is the lane on the {side} free?" for side in ("left", "right")),
    *(f"Is there a car in the {name} view?" for name in dq.VIEW_NAMES.values()),
    *(f"Is there a walker on the {side}?" for side in ("left", "right")),
)
"""What can be asked about what can be seen."""
NONE = -100


@lru_cache(maxsize=1)
def between() -> tuple[int, ...]:
    """Ids between two pictures of a prompt, as evaluation feeds them."""
    whole = tokenizer_image_token(text.prompt("?").replace("<image>", "<image>\n<image>"), text.tokenizer())
    first, second = (i for i, token in enumerate(whole) if token == IMAGE_TOKEN_INDEX)
    return tuple(whole[first + 1 : second])


def places(per_view: int) -> np.ndarray:
    """The view of every place of a block of six pictures with what stands between them, -1 there."""
    rows = [np.full(per_view + len(between()), view) for view in range(len(CAMERAS))]
    for row in rows:
        row[per_view:] = -1
    return np.concatenate(rows)[: -len(between())]


@dataclass
class Batch:
    """B rows of P places in front of K questions of T places.

    Attributes:
        ids, visual, positions: [B, P]; visual: the index of a visual token among all of its row, -1 elsewhere.
        bias: [B, P], added to attention logits on these places, -inf for padding; all zero where `full`.
        views, shown: [B, P], view and class of `SHOWN` of a visual token, NONE elsewhere.
        marks: bool [B, facts, P], the places that show a fact; BOS for what is not there.
        tails, tail_positions: [B, K, T].
        where, targets, owner: [n], flat places in `tails` whose next token is part of an answer, that token, and the
            question.
        rows: [r], flat places in `tails` that must know: `facts` [r, 9] values, `orders` [r, 3] command, speed and
            which of `TOPICS`, `plans` [r, 2] pace and path, NONE where it does not matter.
        full: every visual token is there, each for itself.
    """

    ids: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor
    views: torch.Tensor
    shown: torch.Tensor
    marks: torch.Tensor
    tails: torch.Tensor
    tail_positions: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    rows: torch.Tensor
    facts: torch.Tensor
    orders: torch.Tensor
    plans: torch.Tensor
    kinds: list[str]
    full: bool

    def to(self, device: str) -> Batch:
        """The batch on another device."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in named.items() if isinstance(v, torch.Tensor)})


# -- what is asked


def under_all_orders(street: Street) -> list[Street]:
    """The street under all six orders."""
    return [asked_again(street, command, speed) for command in COMMANDS for speed in SPEEDS]


def ask_plans(street: Street, rng: np.random.Generator) -> list[tuple[Street, dq.Asked]]:
    """The plan under all six orders."""
    return [(other, dq.meta_question(other)) for other in under_all_orders(street)]


def ask_points(street: Street, rng: np.random.Generator) -> list[tuple[Street, dq.Asked]]:
    """Waypoints under four of the orders."""
    again = under_all_orders(street)
    return [(again[i], dq.points_question(again[i])) for i in rng.permutation(6)[:4]]


def ask_sight(street: Street, rng: np.random.Generator) -> list[tuple[Street, dq.Asked]]:
    """Twelve questions about what can be seen; the texture's number chooses sides and views."""
    out = []
    for _ in range(3):
        other = replace(street, texture=int(rng.integers(1 << 31)))
        out += [(other, question) for question in dq.perception(other)]
    return out


ASK: dict[str, Callable[[Street, np.random.Generator], list[tuple[Street, dq.Asked]]]] = {
    "meta": ask_plans,
    "points": ask_points,
    "sight": ask_sight,
}


def known_of(street: Street, question: dq.Asked) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the facts, of the order or the topic, of the plan."""
    facts = street.facts
    values = [VALUES[name].index(getattr(facts, name)) for name in FACTS]
    if question.kind not in ("meta", "points"):
        return values, [NONE, NONE, TOPICS.index(question.text)], [NONE, NONE]
    pace, path = rule(facts)
    return (
        values,
        [COMMANDS.index(facts.command), SPEEDS.index(facts.speed), NONE],
        [PACES.index(pace), PATHS.index(path)],
    )


@lru_cache(maxsize=1)
def comma() -> int:
    """The token that stands between pace and path."""
    return text.tokenizer().convert_tokens_to_ids(",")


def deciding_places(ids: tuple[int, ...], answer: int, kind: str) -> list[int]:
    """Where an answer is decided: the place in front of it, and the place in front of a plan's path."""
    start = len(ids) - answer
    if kind != "meta":
        return [start - 1]
    return [start - 1, start + ids[start:].index(comma()) + 1]


# -- which visual tokens


def shown_of(street: Street, table: np.ndarray) -> np.ndarray:
    """Class of `SHOWN` for every visual token."""
    names = {"light": f"{street.facts.light} light", "lead": f"{street.facts.lead} lead"}
    classes = [SHOWN.index(names.get(thing.fact, thing.fact)) for thing in street.things]
    return np.where(table >= 0, np.array([*classes, 0])[table], 0)


def choose(table: np.ndarray, rng: np.random.Generator, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sorted visual tokens of a row, and for how many each stands: all of things and some of the background of every
    view; not `whole`: as after pruning, also a part of the things' (at least one of each)."""
    keep, stands = table >= 0, np.ones(len(table))
    share = 1.0 if whole or rng.random() < 0.5 else rng.uniform(0.3, 1.0)
    if share < 1:
        first = rng.permutation(np.flatnonzero(keep))
        _, one = np.unique(table[first], return_index=True)
        keep &= rng.random(len(table)) < share
        keep[first[one]] = True
    most = int(rng.integers(8, 48)) if whole else int(rng.integers(0, 40))
    for view in range(len(CAMERAS)):
        own = slice(view * PATCHES, (view + 1) * PATCHES)
        rest = np.flatnonzero(table[own] < 0)
        some = rng.permutation(rest)[: most if whole else int(rng.integers(0, most + 1))]
        keep[own][some] = True
        if whole:
            stands[own][some] = len(rest) / len(some)
    return np.flatnonzero(keep), stands


def draw_batch(
    rng: np.random.Generator,
    size: int,
    pool: int,
    kind: str,
    full: bool = False,
    adapted: bool = False,
    numbers: list[int] | None = None,
) -> tuple[list[int], Batch]:
    """Numbers of `size` streets among the first `pool`, and the batch; kind: of `ASK`; full: all visual tokens;
    adapted: 128 mixed tokens a view, which show nothing by themselves; numbers: these streets."""
    numbers = numbers or rng.integers(0, pool, size).tolist()
    head, gap = text.head_ids(), between()
    per_view = MIXED if adapted else PATCHES
    view_of = places(per_view)
    visual_of = np.full(len(view_of), -1)
    visual_of[view_of >= 0] = np.arange((view_of >= 0).sum())
    rows, asked = [], []
    for number in numbers:
        street = street_of(number)
        whole = full or adapted or rng.random() < 0.5
        if adapted:
            table = np.full(per_view * len(CAMERAS), -1)
        else:
            table = things_at(street)
        if full or adapted:
            chosen, stands = np.arange(len(table)), np.ones(len(table))
        else:
            chosen, stands = choose(table, rng, whole)
        kept = np.isin(visual_of, chosen) | (view_of < 0)
        there, visual = np.flatnonzero(kept), visual_of[kept]
        shows = shown_of(street, table)
        on = visual >= 0
        original = whole or rng.random() < 0.5
        rows.append(
            {
                "ids": np.concatenate([head, np.where(on, 0, gap[0])]),
                "visual": np.concatenate([np.full(len(head), -1), visual]),
                "positions": np.concatenate(
                    [np.arange(len(head)), len(head) + (there if original else np.arange(len(there)))]
                ),
                "bias": np.concatenate([np.zeros(len(head)), np.where(on, np.log(stands[visual]), 0.0)]),
                "views": np.concatenate([np.full(len(head), NONE), np.where(on, view_of[kept], NONE)]),
                "shown": np.concatenate([np.full(len(head), NONE), np.where(on, shows[visual], NONE)]),
                "behind": len(head) + (len(view_of) if original else len(there)),
            }
        )
        asked.append(ASK[kind](street, rng))
    return numbers, _assemble(rows, asked, full or adapted)


def _assemble(rows: list[dict], asked: list[list[tuple[Street, dq.Asked]]], full: bool) -> Batch:
    length = max(len(row["ids"]) for row in rows)

    def stacked(name: str, fill: float) -> torch.Tensor:
        padded = [np.pad(row[name], (0, length - len(row[name])), constant_values=fill) for row in rows]
        return torch.from_numpy(np.stack(padded))

    shown = stacked("shown", NONE)
    marks = torch.zeros(len(rows), len(FACTS), length, dtype=torch.bool)
    tails = [[text.tail_ids(q.text, q.answer) for _, q in row] for row in asked]
    longest = max(len(ids) for row in tails for ids, _ in row)
    ids = np.zeros((len(rows), len(tails[0]), longest), dtype=np.int64)
    positions = np.zeros_like(ids)
    where, targets, owner, kinds, places_, facts, orders, plans = [], [], [], [], [], [], [], []
    for b, (row, own) in enumerate(zip(asked, tails, strict=True)):
        for place, name in enumerate(FACTS):
            there = torch.isin(shown[b], SHOWING[name])
            marks[b, place] = there
            marks[b, place, 0] = not there.any()
        for k, ((street, question), (tail, answer)) in enumerate(zip(row, own, strict=True)):
            base = (b * ids.shape[1] + k) * longest
            ids[b, k, : len(tail)] = tail
            positions[b, k] = rows[b]["behind"] + np.arange(longest)
            where += range(base + len(tail) - answer - 1, base + len(tail) - 1)
            targets += tail[len(tail) - answer :]
            owner += [len(kinds)] * answer
            kinds.append(question.kind)
            values = known_of(street, question)
            for place in deciding_places(tail, answer, question.kind):
                places_.append(base + place)
                for column, value in zip((facts, orders, plans), values, strict=True):
                    column.append(value)
    return Batch(
        ids=stacked("ids", 0),
        visual=stacked("visual", -1),
        positions=stacked("positions", 0),
        bias=stacked("bias", -np.inf).float(),
        views=stacked("views", NONE),
        shown=shown,
        marks=marks,
        tails=torch.from_numpy(ids),
        tail_positions=torch.from_numpy(positions),
        where=torch.tensor(where),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
        rows=torch.tensor(places_),
        facts=torch.tensor(facts),
        orders=torch.tensor(orders),
        plans=torch.tensor(plans),
        kinds=kinds,
        full=full,
    )
