"""Stage `drive`: from the tiny LLaVA-1.5 to a model that plans from six views, and `drive-adapter` to one in Senna's
layout.

The tower is that of the 1.5 checkpoint and frozen: it tells colors apart, and its patches say where. So its features
are computed once for a pool of streets (`streets`), and decoder and projector are trained on them alone. A street is
asked about under all six orders at once (`street_batches`); what guides is in `street_model`. In the last part of the
run some steps hold all 3,456 visual tokens.

`drive-adapter` goes on from there with an adapter along the tokens, 576 to 128 a view, as Senna has it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from llava.model.projector import TokenAdapter
from playground.tiny.train.common import BF16, Log, follow, save_state, train_rng
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.muon import BatchedMuon
from playground.tiny.train.street_batches import MIXED, draw_batch
from playground.tiny.train.street_model import Forward, Heads, total
from playground.tiny.train.streets import PATCHES, make_pool
from playground.tiny.world.driving import CAMERAS

CYCLE = ("meta", "sight", "meta", "points")
"""What the steps ask, one after the other."""
FULL_EVERY = 4
"""One step in so many of the last part holds all visual tokens."""


@dataclass(frozen=True)
class Plan:
    """How a run goes.

    Attributes:
        minutes: how long; steps: instead of it, so many steps.
        batch: streets in a step; full: in a step with all visual tokens.
        rate: factor on the learning rates.
        full_share: the last part of the run in which some steps have all visual tokens.
        unguided: from here to 0.2 later the guiding losses fade to a tenth.
    """

    minutes: float = 20
    steps: int | None = None
    batch: int = 4
    full: int = 1
    rate: float = 0.5
    full_share: float = 0.25
    unguided: float = 0.6


def features_of(pool: np.ndarray, numbers: list[int], visual: torch.Tensor) -> torch.Tensor:
    """Tower features of a batch's visual tokens in its order: float [n, 96]; visual: [B, P], -1 elsewhere."""
    rows = [pool[number][row[row >= 0].numpy()] for number, row in zip(numbers, visual, strict=True)]
    return torch.from_numpy(np.concatenate(rows)).float()


def visual_tokens(
    model: TinyLlava, adapter: nn.Module | None, pool: np.ndarray, numbers: list[int], visual: torch.Tensor
) -> torch.Tensor:
    """Embeddings of a batch's visual tokens in its order: [n, D]."""
    device = model.projector[0].weight.device
    if adapter is None:
        return model.projector(features_of(pool, numbers, visual).to(device))
    whole = torch.from_numpy(np.stack([pool[number] for number in numbers])).float().to(device)
    views = model.projector(whole).view(len(numbers) * len(CAMERAS), PATCHES, -1)
    return adapter(views).flatten(0, 1)


def make_optimizers(model: TinyLlava, heads: nn.Module, adapter: nn.Module | None) -> list:
    """Muon for the matrices of the layers, AdamW for what else the decoder has, for the projector and the heads."""
    named = list(model.decoder.named_parameters())
    inner = lambda name, p: p.dim() == 2 and ".layers." in name  # noqa: E731
    eyes = [*model.projector.parameters(), *([] if adapter is None else adapter.parameters())]
    return [
        BatchedMuon([p for n, p in named if inner(n, p)]),
        torch.optim.AdamW([p for n, p in named if not inner(n, p)], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.AdamW(eyes, lr=1e-3, betas=(0.9, 0.98)),
        torch.optim.AdamW(heads.parameters(), lr=4e-3, betas=(0.9, 0.98)),
    ]


def train_drive(
    model: TinyLlava,
    folder: Path,
    plan: Plan,
    pool_size: int = 3000,
    run: int = 0,
    resume: bool = False,
    adapt: bool = False,
    device: str = "cpu",
) -> list[float]:
    """Train as `plan` says; writes `folder/drive.pt`, with an adapter `folder/drive-adapter.pt`.

    pool_size: streets whose features are computed first, if `folder` has them not yet; resume: from the weights there;
    run: number of the run, chooses the random stream. Returns the losses over answers.
    """
    torch.manual_seed(80 + run)
    name = "drive-adapter" if adapt else "drive"
    adapter = TokenAdapter((PATCHES, MIXED, MIXED, MIXED)) if adapt else None
    heads = Heads()
    if resume or adapt:
        state = torch.load(folder / f"{name if resume else 'drive'}.pt", map_location="cpu")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        if adapter is not None and resume:
            adapter.load_state_dict(state["adapter"])
    pool = make_pool(model.tower, folder, pool_size)
    model.to(device).train()
    heads.to(device)
    if adapter is not None:
        adapter.to(device)
    optimizers = make_optimizers(model, heads, adapter)
    trained = [p for part in (model.decoder, model.projector, adapter) if part is not None for p in part.parameters()]
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    rng, log = train_rng(name, run), Log(name)
    scores: dict[str, float] = {}
    known: dict[str, float] = {}
    losses: list[float] = []
    start = saved = time.time()

    def save() -> None:
        mixed = {} if adapter is None else {"adapter": adapter.state_dict()}
        layers = len(model.decoder.model.layers)
        save_state(
            folder / f"{name}.pt",
            model=model.state_dict(), heads=heads.state_dict(), layers=layers, step=len(losses), **mixed,
        )  # fmt: skip

    def progress() -> float:
        return len(losses) / plan.steps if plan.steps else (time.time() - start) / (60 * plan.minutes)

    while (done := progress()) < 1:
        step = len(losses)
        full = adapter is None and done > 1 - plan.full_share and step % FULL_EVERY == 0
        kind = "meta" if full else CYCLE[step % len(CYCLE)]
        numbers, batch = draw_batch(rng, plan.full if full else plan.batch, pool_size, kind, full, adapter is not None)
        guide = 1 - 0.9 * min(1.0, max(0.0, (done - plan.unguided) / 0.2))
        scale = plan.rate * min(1.0, (step + 1) / 60) * max(0.02, 1 - done)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        with torch.autocast(device, dtype=torch.bfloat16, enabled=BF16):
            forward = Forward(model.decoder, heads, batch.to(device))
            right = forward(visual_tokens(model, adapter, pool, numbers, batch.visual))
        for optimizer in optimizers:
            optimizer.zero_grad()
        total(forward.losses, guide).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(forward.losses["answer"].item())
        kinds = [f"full_{k}" for k in batch.kinds] if full else batch.kinds
        follow(scores, kinds, right.tolist())
        for key, value in {**forward.scores, **{k: v.item() for k, v in forward.losses.items() if "look" in k}}.items():
            known[key] = 0.9 * known.get(key, value) + 0.1 * value
        if len(losses) % 25 == 0:
            log.write(
                step=len(losses),
                seconds=round(time.time() - start),
                length=batch.ids.shape[1],
                loss=round(losses[-1], 4),
                **{key: round(value, 2) for key, value in sorted(scores.items())},
                **{f"knows_{key}": round(value, 2) for key, value in known.items()},
            )
        if time.time() - saved > 60:
            save()
            saved = time.time()
    save()
    return losses
