"""Stage `drive`: from the tiny LLaVA-1.5 to a model that plans from six views, and `drive-adapter` to one in Senna's
layout.

The tower is that of the 1.5 checkpoint and frozen: it tells colors apart, and its patches say where. Sequences hold the
patches of all things and some of the background of each view, the last part of the run all 3,456 visual tokens. A
street is computed once for many questions: what can be seen, and the plan under several orders. While the model learns
to see, plans are few; where an answer rests on is shown to the answering place (`guidance.looking_loss`), without which
such a model stays with what the front camera tells.

`drive-adapter` goes on from there with an adapter along the tokens, 576 to 128 a view, as Senna has it.

No checkpoint has been trained with these stages yet: what is tested is that they run and that their loss falls.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token
from llava.model.projector import TokenAdapter
from playground.tiny.train import guidance, packing, text
from playground.tiny.train.common import Log, autocast, follow, save_state, train_rng
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.language import make_optimizers
from playground.tiny.train.vision import normalize, run_tower
from playground.tiny.world import driving as dq
from playground.tiny.world.cameras import shown, squares
from playground.tiny.world.driving import CAMERAS, COMMANDS, SPEEDS, Street, asked_again, sample_street
from playground.tiny.world.scenes import GRID

PATCHES, MIXED = GRID * GRID, 128
WATCH = (2, 4)
"""Layers in which the answering place learns where to look (the second; the first is for names, and there are none)."""
BACKGROUND = 20
"""Patches of the background in each view."""


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


def things_at(street: Street) -> np.ndarray:
    """Index of the thing that each place of the block shows, -1 for none."""
    where = places(PATCHES)
    out = np.full(len(where), -1)
    for view, camera in enumerate(CAMERAS):
        out[where == view] = shown(street, camera).reshape(-1)
    return out


def choose(street: Street, table: np.ndarray, rng: np.random.Generator, full: bool) -> np.ndarray:
    """Places of the block that a sequence holds: those of things, some of the background, and all between pictures."""
    if full:
        return np.arange(len(table))
    where = places(PATCHES)
    keep = (table >= 0) | (where < 0)
    for view in range(len(CAMERAS)):
        rest = np.flatnonzero((where == view) & (table < 0))
        keep[rng.permutation(rest)[:BACKGROUND]] = True
    return np.flatnonzero(keep)


def draw_questions(street: Street, rng: np.random.Generator, plans: float) -> list[tuple[Street, dq.Asked]]:
    """What is asked about a street, each with the street under its order; plans: from 0 to 1, how many are plans."""
    asked = [(street, question) for question in dq.perception(street)]
    for _ in range(2 + round(4 * plans)):
        order = COMMANDS[int(rng.integers(3))], SPEEDS[int(rng.integers(2))]
        again = asked_again(street, *order)
        asked.append((again, dq.meta_question(again)))
    if rng.random() < plans:
        asked.append((asked[-1][0], dq.points_question(asked[-1][0])))
    return asked


def draw_batch(
    rng: np.random.Generator, size: int, plans: float, full: bool, adapted: bool = False
) -> tuple[np.ndarray, packing.Pack]:
    """Pictures uint8 [B, 6, 192, 192, 3], and packed questions."""
    pictures, chosen, tails, marks = [], [], [], []
    where = places(MIXED if adapted else PATCHES)
    for _ in range(size):
        street = sample_street(rng, held_out=False)
        table = np.full(len(where), -1) if adapted else things_at(street)
        facts = [thing.fact for thing in street.things]
        asked = draw_questions(street, rng, plans)
        pictures.append(squares(street))
        chosen.append(choose(street, table, rng, full or adapted))
        tails.append([(*text.tail_ids(q.text, q.answer), q.kind) for _, q in asked])
        marks.append([np.isin(table, [facts.index(fact) for fact in q.rests_on]) for _, q in asked])
    original = rng.random(size) < 0.5
    data = packing.pack_ids(chosen, tails, original, marks, totals=[len(where)] * size)
    length = data.ids.shape[1]
    data.names, data.named = torch.zeros(0, dtype=torch.long), torch.zeros(0, length, dtype=torch.bool)
    return np.stack(pictures), data


def block(model: TinyLlava, pictures: np.ndarray, adapter: nn.Module | None = None) -> torch.Tensor:
    """Embeddings of six pictures and what stands between them: [B, places, D]."""
    size, views = pictures.shape[:2]
    with torch.no_grad():
        features, _, _ = run_tower(model.tower, normalize(pictures.reshape(-1, *pictures.shape[2:])))
    projected = model.projector(features)
    if adapter is not None:
        projected = adapter(projected)
    gap = model.decoder.model.embed_tokens(torch.tensor(between())).to(projected.dtype)
    projected = projected.view(size, views, *projected.shape[1:])
    with_gaps = torch.cat([projected, gap.expand(size, views, -1, -1)], dim=2).flatten(1, 2)
    return with_gaps[:, : -len(between())]


def train_drive(
    model: TinyLlava,
    folder: Path,
    minutes: float,
    batch: int = 6,
    rate: float = 0.3,
    full_share: float = 0.08,
    run: int = 0,
    resume: bool = False,
    adapt: bool = False,
    steps: int | None = None,
) -> list[float]:
    """Train for `minutes` (or `steps`), the last `full_share` with all visual tokens; writes `folder/drive.pt`, with an
    adapter `folder/drive-adapter.pt`. resume: from the weights there. Returns the losses."""
    torch.manual_seed(80 + run)
    name = "drive-adapter" if adapt else "drive"
    adapter = TokenAdapter((PATCHES, MIXED, MIXED, MIXED)) if adapt else None
    if resume or adapt:
        state = torch.load(folder / f"{name if resume else 'drive'}.pt")
        model.load_state_dict(state["model"])
        if adapter is not None and resume:
            adapter.load_state_dict(state["adapter"])
    model.train()
    model.tower.requires_grad_(False)
    optimizers = make_optimizers(model.decoder, [])
    eyes = [*model.projector.parameters(), *([] if adapter is None else adapter.parameters())]
    optimizers.append(torch.optim.AdamW(eyes, lr=1e-3, betas=(0.9, 0.98), fused=True))
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    rng, log = train_rng(name, run), Log(name)
    scores: dict[str, float] = {}
    losses: list[float] = []
    start = time.time()

    def save() -> None:
        mixed = {} if adapter is None else {"adapter": adapter.state_dict()}
        layers = len(model.decoder.model.layers)
        save_state(folder / f"{name}.pt", model=model.state_dict(), layers=layers, step=len(losses), **mixed)

    def progress() -> float:
        return len(losses) / steps if steps else (time.time() - start) / (60 * minutes)

    while (done := progress()) < 1:
        full = done > 1 - full_share and adapter is None
        pictures, data = draw_batch(rng, 1 if full else batch, min(1.0, 2 * done), full, adapter is not None)
        scale = rate * min(1.0, (len(losses) + 1) / 60) * max(0.02, 1 - done)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        with autocast():
            visual = block(model, pictures, adapter)
            watch = None if adapter is not None else WATCH
            loss, right = guidance.forward(model.decoder, data, visual, watch, 0.1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*model.decoder.parameters(), *eyes], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        follow(scores, data.kinds, right.tolist())
        if len(losses) % 25 == 0:
            log.write(
                step=len(losses),
                seconds=round(time.time() - start),
                full=full,
                length=data.ids.shape[1],
                loss=round(loss.item(), 4),
                right=round(right.float().mean().item(), 3),
                **{kind: round(value, 2) for kind, value in sorted(scores.items())},
            )
        if len(losses) % 50 == 0:
            save()
    save()
    return losses
