"""Stage `sight`: the tower of the shipped checkpoint learns crowded scenes beside the ones it knows.

The heads are fitted to the tower as it is first, on the scenes it knows, so that what it learns about small objects
gets the directions that the decoder already understands. Then tower and heads learn both kinds of scenes; in crowded
ones a patch tells only what it shows itself, shape or label.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from playground.tiny.train.common import Log, autocast, save_state, train_rng
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.vision import HEADS, attention_loss, normalize, patch_labels, run_tower
from playground.tiny.world import scenes
from playground.tiny.world.crowded import sample_crowd
from playground.tiny.world.scenes import GRID, PATCH, Scene

NAMED = ("color", "shape", "word")
STATE = "sight.pt"


def draw_scene(rng: np.random.Generator, crowded: float) -> Scene:
    """A training scene, crowded with this probability."""
    share = float(rng.choice([0.6, 0.9]))
    if rng.random() < crowded:
        return sample_crowd(rng, held_out=False, word_share=share)
    return scenes.sample_scene(rng, 3, 6, held_out=False, word_share=share)


def draw_windows(rng: np.random.Generator, count: int, side: int, crowded: float) -> tuple:
    """Pictures or windows of `side` patches, four per scene: uint8 [B, h, w, 3], corners [B, 2], labels."""
    images, corners, labels = [], [], {name: [] for name in HEADS}
    per_scene = 1 if side == GRID else 4
    for _ in range(count // per_scene):
        scene = draw_scene(rng, crowded)
        picture, marks = scenes.pad_square(scenes.render(scene)), patch_labels(scene)
        for y, x in rng.integers(0, GRID - side + 1, (per_scene, 2)):
            corners.append((y, x))
            images.append(picture[PATCH * y : PATCH * (y + side), PATCH * x : PATCH * (x + side)])
            for name, mark in marks.items():
                labels[name].append(mark[y : y + side, x : x + side].reshape(-1))
    packed = {name: torch.from_numpy(np.stack(mark)) for name, mark in labels.items()}
    return np.stack(images), np.array(corners), packed


def on_object(labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Patches that show a shape or a label: bool [B, n]."""
    return (labels["color"] > 0) | (labels["word"] > 0)


def seeing_losses(
    heads: nn.ModuleDict, features: torch.Tensor, labels: dict[str, torch.Tensor], measure: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the losses of the heads, and (to `measure`) how often each is right where there is something to
    say."""
    loss, right = torch.zeros((), device=features.device), {}
    for name, head in heads.items():
        out = head(features).float()
        weight = torch.ones(out.shape[-1], device=out.device)
        weight[0] = 0.3 if name in NAMED else 1.0
        loss = loss + F.cross_entropy(out.flatten(0, 1), labels[name].flatten(), ignore_index=-100, weight=weight)
        if not measure:
            continue
        there = labels[name] > 0 if name in NAMED else labels[name] >= 0
        right[name] = (out.argmax(-1) == labels[name])[there].float().mean()
    return loss, right


def train_sight(
    model: TinyLlava,
    folder: Path,
    minutes: float,
    batch: int = 12,
    peak: float = 1e-3,
    run: int = 0,
    resume: bool = False,
) -> None:
    """Train tower and heads for `minutes`, windows first, whole pictures in the last third; writes `folder/sight.pt`
    every 100 steps. resume: from there."""
    torch.manual_seed(80 + run)
    path = folder / STATE
    if resume:
        state = torch.load(path)
        model.tower.load_state_dict(state["tower"])
        model.heads.load_state_dict(state["heads"])
    rng, log = train_rng("sight", run), Log("sight")
    known = adam(model.heads.parameters(), 5e-3)
    every = adam([*model.tower.parameters(), *model.heads.parameters()], peak)
    start, step, fitting = time.time(), 0, 0 if resume else 250
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        alone = step < fitting
        side = GRID if progress > 0.67 else 12
        pixels, corners, labels = draw_windows(rng, batch if side == GRID else 4 * batch, side, 0.0 if alone else 0.8)
        with autocast():
            with torch.set_grad_enabled(not alone):
                features, attention, _ = run_tower(model.tower, normalize(pixels), corners)
            loss, right = seeing_losses(model.heads, features, labels)
            loss = loss + 0.3 * attention_loss(attention, on_object(labels))
        optimizer = known if alone else every
        optimizer.param_groups[0]["lr"] = (
            5e-3 if alone else peak * min(1, (step - fitting + 1) / 100) * (1.02 - progress)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            log.write(
                step=step,
                side=side,
                seconds=round(time.time() - start),
                loss=round(loss.item(), 4),
                **{name: round(value.item(), 3) for name, value in right.items()},
            )
        if step % 100 == 0:
            save_state(path, tower=model.tower.state_dict(), heads=model.heads.state_dict(), step=step)
    save_state(path, tower=model.tower.state_dict(), heads=model.heads.state_dict(), step=step)


def adam(parameters: object, rate: float) -> torch.optim.Optimizer:
    """AdamW as all stages have it."""
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
