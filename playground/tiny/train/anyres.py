"""Stage `anyres`: from the tiny LLaVA-1.5 to the tiny LLaVA-1.6.

Large pictures reach the decoder as a squeezed view and up to four crops; the decoder, the projector and the newline
embedding are trained on them in both merge modes. The tower is that of the 1.5 checkpoint and frozen.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from playground.tiny.train import guidance, packing, wide
from playground.tiny.train.common import Log, autocast, follow, save_state, train_rng
from playground.tiny.train.extend import OPTIONS, WATCH, mixture, sample, without_picture
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.language import WIDTH, make_optimizers
from playground.tiny.train.vision import normalize, run_tower
from playground.tiny.world.scenes import sample_scene, sample_wide

SQUARE = ((4, 4),)


class Newline(nn.Module):
    """LLaVA's `image_newline`: one learned embedding behind every row of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(WIDTH) * 0.02)


def visual_tokens(
    model: TinyLlava, newline: torch.Tensor, pictures: list[np.ndarray], orders: list[np.ndarray]
) -> torch.Tensor:
    """Visual tokens of several pictures, padded to one length: [B, tokens, D].

    Args:
        pictures: per picture uint8 [views, 192, 192, 3]; orders: per picture the index of every token (`wide.order`).
    """
    with torch.no_grad():
        features, _, _ = run_tower(model.tower, normalize(np.concatenate(pictures)))
    projected = model.projector(features)
    out, start = [], 0
    for views, places in zip(pictures, orders, strict=True):
        own = projected[start : start + len(views)].flatten(0, 1)
        own = torch.cat([own, newline[None].to(own.dtype)])[torch.from_numpy(places)]  # -1 is the newline
        out.append(own)
        start += len(views)
    return nn.utils.rnn.pad_sequence(out, batch_first=True)


def draw_batch(
    rng: np.random.Generator, size: int, tokens: int, full: bool, kinds: list
) -> tuple[list[np.ndarray], list[np.ndarray], packing.Pack]:
    """Views and token orders of the pictures, and packed questions; the last row has questions without a picture."""
    pictures, orders, picked, tables, chosen, questions, marks = [], [], [], [], [], [], []
    for _ in range(size - 1):
        share = float(rng.choice([0.6, 0.9]))
        if rng.random() < 0.25:
            scene = sample_scene(rng, 3, 6, held_out=False, word_share=share, layouts=SQUARE)
        else:
            scene = sample_wide(rng, 4, 8, held_out=False, word_share=share)
        merge = wide.MERGES[int(rng.integers(2))]
        table, places = wide.attributes(scene, merge), wide.order(scene.rows, scene.cols, merge)
        objects = 1.0 if full or rng.random() < 0.3 else rng.uniform(0.3, 1.0)
        kept = packing.choose_patches(table, rng, objects, int(rng.integers(200, 1600) if full else rng.integers(40)))
        pictures.append(wide.views(scene))
        orders.append(places)
        chosen.append(np.union1d(kept, np.flatnonzero(places == wide.NEWLINE)) if full or rng.random() < 0.5 else kept)
        questions.append(sample(scene, rng, tokens, kinds))
        picked.append(scene)
        tables.append(table)
        marks.append([packing.asked_patches(scene, table, question) for question in questions[-1]])
    chosen.append(np.arange(0))
    picked.append(picked[0])
    tables.append(tables[0])
    questions.append(without_picture(rng, tokens // 45))
    marks.append([np.zeros(len(tables[0]), dtype=bool)] * len(questions[-1]))
    totals = [len(table) for table in tables]
    data = packing.pack(chosen, questions, rng.random(size) < 0.7, marks, totals)
    return pictures, orders, guidance.guide(data, chosen, picked, tables, questions)


def train_anyres(
    model: TinyLlava,
    folder: Path,
    minutes: float,
    batch: int = 6,
    tokens: int = 300,
    rate: float = 0.2,
    full_share: float = 0.1,
    run: int = 0,
    resume: bool = False,
) -> None:
    """Train for `minutes`, the last `full_share` with many more visual tokens; writes `folder/anyres.pt`. resume: from
    the weights there, with fresh optimizers."""
    torch.manual_seed(60 + run)
    line = Newline()
    if resume:
        state = torch.load(folder / "anyres.pt")
        model.load_state_dict(state["model"])
        line.load_state_dict(state["newline"])
    kinds = mixture()
    model.train()
    model.tower.requires_grad_(False)
    optimizers = make_optimizers(model.decoder, [*line.parameters()])
    optimizers.append(torch.optim.AdamW(model.projector.parameters(), lr=1e-3, betas=(0.9, 0.98), fused=True))
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    trained = [*model.decoder.parameters(), *model.projector.parameters(), *line.parameters()]
    rng, log = train_rng("anyres", run), Log("anyres")
    scores: dict[str, float] = {}
    start, step = time.time(), 0

    def save() -> None:
        save_state(
            folder / "anyres.pt",
            model=model.state_dict(),
            newline=line.state_dict(),
            layers=len(model.decoder.model.layers),
            step=step,
        )

    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        full = progress > 1 - full_share
        pictures, orders, data = draw_batch(rng, 3 if full else batch, tokens, full, kinds)
        scale = rate * min(1.0, (step + 1) / 60) * max(0.02, 1 - progress)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        with autocast():
            shown = visual_tokens(model, line.embedding, pictures, orders)
            shown = torch.cat([shown, torch.zeros_like(shown[:1])])  # the row without a picture
            loss, right = guidance.forward(model.decoder, data, shown, WATCH, 0.1, OPTIONS)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        follow(scores, data.kinds, right.tolist())
        if step % 25 == 0:
            log.write(
                step=step,
                seconds=round(time.time() - start),
                full=full,
                length=data.ids.shape[1],
                loss=round(loss.item(), 4),
                right=round(right.float().mean().item(), 3),
                **{k: round(v, 2) for k, v in sorted(scores.items())},
            )
        if step % 50 == 0:
            save()
    save()
