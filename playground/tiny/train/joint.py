"""Stages `align` and `joint`: tower and decoder are connected by the projector and trained together.

`align` regresses the projected patch features to the symbolic embeddings that the decoder already understands. `joint`
trains tower, projector and decoder on answers; the dense losses and the CLS attention loss of the vision stage stay on.
Most sequences hold all object patches and a random part of the background (cheaper, and robust to pruning); the last
part of the run uses all 576 visual tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from playground.tiny.train import guidance, packing
from playground.tiny.train.common import Log, autocast, follow, save_state, train_rng
from playground.tiny.train.language import WIDTH, Symbols, build_decoder, grow, make_optimizers
from playground.tiny.train.vision import HEADS, attention_loss, build_tower, normalize, patch_labels, run_tower
from playground.tiny.world import scenes
from playground.tiny.world.questions import sample_questions


class TinyLlava(nn.Module):
    """The three parts, under the names the export expects, and the temporary heads of the tower."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.tower, self.decoder = build_tower(), build_decoder(layers)
        self.projector = nn.Sequential(nn.Linear(96, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.heads = nn.ModuleDict({name: nn.Linear(96, size) for name, size in HEADS.items()})


def batch_of_scenes(rng: np.random.Generator, size: int, per_scene: int, low: int, full: bool) -> tuple:
    """Pictures [B, 3, 192, 192], packed questions, patch labels (name -> [B, 576])."""
    picked, tables, marks = [], [], []
    pictures, patches, questions, labels = [], [], [], defaultdict(list)
    for _ in range(size):
        scene = scenes.sample_scene(rng, low, 6, held_out=False, word_share=float(rng.choice([0.6, 0.9])))
        pictures.append(scenes.pad_square(scenes.render(scene)))
        questions.append(sample_questions(scene, rng, per_scene))
        for name, mark in patch_labels(scene).items():
            labels[name].append(mark.reshape(-1))
        table = packing.attributes(scene)
        picked.append(scene)
        tables.append(table)
        marks.append([packing.asked_patches(scene, table, question) for question in questions[-1]])
        if full:
            patches.append(np.arange(scenes.GRID**2))
        else:
            share = 1.0 if rng.random() < 0.6 else rng.uniform(0.5, 1.0)
            patches.append(packing.choose_patches(table, rng, share, int(rng.integers(0, 90))))
    data = guidance.guide(
        packing.pack(patches, questions, rng.random(size) < 0.5, marks), patches, picked, tables, questions
    )
    packed = {name: torch.from_numpy(np.stack(mark)) for name, mark in labels.items()}
    return normalize(np.stack(pictures)), data, packed


def dense_losses(model: TinyLlava, features: torch.Tensor, attention: torch.Tensor, labels: dict) -> torch.Tensor:
    """The losses of the vision stage on whole pictures, in one number."""
    total = 0.3 * attention_loss(attention, labels["color"] > 0)
    for name, head in model.heads.items():
        weight = torch.tensor([0.3] + [1.0] * (HEADS[name] - 1)) if name in ("color", "shape", "word") else None
        total = total + F.cross_entropy(
            head(features).float().flatten(0, 1), labels[name].flatten(), ignore_index=-100, weight=weight
        )
    return total


def align(folder: Path, minutes: float, batch: int = 16) -> None:
    """Fit a fresh projector to the symbolic embeddings; writes `folder/joint.pt` from the first two stages."""
    torch.manual_seed(3)
    seen, said = torch.load(folder / "vision.pt"), torch.load(folder / "language.pt")
    model, symbols = TinyLlava(said["layers"]), Symbols()
    model.tower.load_state_dict(seen["tower"])
    model.heads.load_state_dict(seen["heads"])
    model.decoder.load_state_dict(said["decoder"])
    symbols.load_state_dict(said["symbols"])
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=3e-3, betas=(0.9, 0.98), fused=True)
    rng, log = train_rng("align"), Log("align")
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 3e-3 * max(0.05, 1 - progress)
        picked = [scenes.sample_scene(rng, 3, 6, held_out=False) for _ in range(batch)]
        pixels = normalize(np.stack([scenes.pad_square(scenes.render(s)) for s in picked]))
        tables = torch.from_numpy(np.stack([packing.attributes(s) for s in picked]))
        with torch.no_grad(), autocast():
            features, _, _ = run_tower(model.tower, pixels)
            target = symbols(tables, model.decoder.model.embed_tokens).float()
        features = features.float()
        on = tables[..., 0] > 0
        miss = (model.projector(features) - target).square().mean(-1) / target[on].var()
        loss = miss[on].mean() + 0.3 * miss[~on].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 25 == 0:
            log.write(
                step=step,
                seconds=round(time.time() - start),
                unexplained=round(miss[on].mean().item(), 4),
                background=round(miss[~on].mean().item(), 4),
            )
    save_state(folder / "joint.pt", model=model.state_dict(), layers=said["layers"], step=0)


def train_joint(
    folder: Path,
    minutes: float,
    batch: int = 12,
    per_scene: int = 10,
    rate: float = 0.3,
    low: int = 3,
    full_share: float = 0.2,
    name: str = "joint",
    run: int = 0,
    deepen: bool = False,
) -> None:
    """Train everything together for `minutes`, the last `full_share` with all visual tokens; updates `folder/joint.pt`.

    deepen: twice the layers first, if there are six (see `language.grow`).
    """
    torch.manual_seed(4 + run)
    state = torch.load(folder / "joint.pt")
    model = TinyLlava(state["layers"])
    model.load_state_dict(state["model"])
    if deepen and state["layers"] == 6:
        model.decoder, state["layers"] = grow(model.decoder), 12
    watch = (1, 2, 3, 4) if state["layers"] == 6 else (2, 4, 6, 8)
    optimizers = make_optimizers(model.decoder, [])
    eyes = torch.optim.AdamW(
        [*model.tower.parameters(), *model.projector.parameters(), *model.heads.parameters()],
        lr=1.5e-3,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    optimizers.append(eyes)
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    rng, log = train_rng(name, run), Log(name)
    scores: dict[str, float] = {}
    mean, start, step = 0.0, time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        full = progress > 1 - full_share
        pixels, data, labels = batch_of_scenes(rng, batch // 2 if full else batch, per_scene, low, full)
        scale = rate * min(1.0, (step + 1) / 60) * max(0.03, 1 - progress)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        with autocast():
            features, attention, _ = run_tower(model.tower, pixels)
            extra = dense_losses(model, features, attention, labels)
            loss, right = guidance.forward(model.decoder, data, model.projector(features), watch, 0.1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + 0.1 * extra).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        follow(scores, data.kinds, right.tolist())
        mean = right.float().mean().item() if step == 1 else 0.95 * mean + 0.05 * right.float().mean().item()
        if step % 25 == 0:
            on = labels["color"] > 0
            top = [on[i][attention[i].topk(64).indices].float().mean() for i in range(len(on)) if on[i].sum() >= 55]
            log.write(
                step=step,
                seconds=round(time.time() - start),
                full=full,
                loss=round(loss.item(), 4),
                dense=round(float(extra.detach()), 3),
                right=round(mean, 3),
                top64=round(float(torch.stack(top).mean()), 3) if top else None,
                **{k: round(v, 2) for k, v in sorted(scores.items())},
            )
        if step % 50 == 0:
            save_state(folder / "joint.pt", model=model.state_dict(), layers=state["layers"], step=step)
    save_state(folder / "joint.pt", model=model.state_dict(), layers=state["layers"], step=step)
