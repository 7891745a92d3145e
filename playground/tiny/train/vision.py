"""Stage `vision`: the tower learns to say at every patch what object covers it, and its CLS token to look at objects.

Dense supervision by temporary linear heads at the output of the selected layer (-2); the head-mean CLS attention of
that same layer is pulled to the patches of the objects; a multi-label loss trains CLS at the last layer. Starts on
windows of 12 x 12 patches (four times cheaper), ends on whole pictures.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from playground.tiny.train.common import Log, autocast, cosine, save_state, train_rng
from playground.tiny.world import scenes
from playground.tiny.world.crowded import Crowd
from playground.tiny.world.scenes import GRID, ON_OBJECT, PATCH

SELECTED = 2
"""Index of the encoder layer that feeds the projector: `mm_vision_select_layer` -2 of 4 layers."""
HEADS = {"color": 9, "shape": 7, "word": 23, "row": 7, "col": 7, "center": 2}
"""Temporary heads and their classes: the first of color, shape and word is none; words are followed by digits."""
SEVERAL = sum(HEADS[name] - 1 for name in ("color", "shape", "word"))


def build_tower() -> CLIPVisionModel:
    """A CLIP vision tower with random weights: 24 x 24 patches of 8 pixels, width 96, four layers."""
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=192,
        patch_size=8,
        projection_dim=96,
        attention_dropout=0.0,
    )
    tower = CLIPVisionModel(config)
    nn.init.normal_(vision_body(tower).embeddings.patch_embedding.weight, std=0.05)
    return tower


def vision_body(tower: CLIPVisionModel) -> nn.Module:
    """The module that owns `embeddings` and `encoder`, whatever the version of transformers calls it."""
    return getattr(tower, "vision_model", tower)


def normalize(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] as the checkpoint's image processor makes it."""
    pixels = torch.as_tensor(images)
    mean, std = (torch.tensor(x, device=pixels.device) for x in (scenes.PIXEL_MEAN, scenes.PIXEL_STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def run_tower(
    tower: CLIPVisionModel, pixels: torch.Tensor, corners: np.ndarray | None = None, last: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the tower on pictures or on patch-aligned windows of them.

    Args:
        pixels: [B, 3, h, w].
        corners: [B, 2] row and column (in patches) of each window; None: whole pictures.
        last: also run the layers behind the selected one.

    Returns:
        Patch features of the selected layer [B, n, C], head-mean attention of CLS over the patches there, summing to
        one over the patches [B, n], and CLS after the last layer [B, C] or None.
    """
    body = vision_body(tower)
    patches = body.embeddings.patch_embedding(pixels)
    side = patches.shape[-1]
    table = body.embeddings.position_embedding.weight
    if corners is None:
        place = table[1:][None]
    else:
        offsets = torch.arange(side)
        rows = torch.from_numpy(corners[:, :1]) + offsets
        cols = torch.from_numpy(corners[:, 1:]) + offsets
        place = table[1 + rows[:, :, None] * GRID + cols[:, None, :]].flatten(1, 2)
    cls = (body.embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
    hidden = body.pre_layrnorm(torch.cat([cls, patches.flatten(2).transpose(1, 2) + place], dim=1))
    attention = None
    for i, layer in enumerate(body.encoder.layers):
        if i > SELECTED and not last:
            break
        if i == SELECTED:
            attention = cls_attention(layer, hidden)
        out = layer(hidden, attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out
        if i == SELECTED:
            features = hidden[:, 1:]
    return features, attention, body.post_layernorm(hidden[:, 0]) if last else None


def cls_attention(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Head-mean attention of CLS over the patches, normalized over the patches: [B, n]."""
    block = layer.self_attn
    hidden = layer.layer_norm1(hidden)
    batch, length, width = hidden.shape
    heads = block.num_heads
    query = block.q_proj(hidden[:, :1]).view(batch, 1, heads, -1).transpose(1, 2).float()
    key = block.k_proj(hidden).view(batch, length, heads, -1).transpose(1, 2).float()
    weights = (query @ key.transpose(2, 3) * (width // heads) ** -0.5).softmax(-1).mean(1)[:, 0, 1:]
    return weights / weights.sum(-1, keepdim=True)


def attention_loss(attention: torch.Tensor, on_object: torch.Tensor) -> torch.Tensor:
    """Cross entropy between the uniform distribution over object patches (bool [B, n]) and CLS attention."""
    rows = on_object.any(1)
    target = on_object[rows].float()
    target = target / target.sum(1, keepdim=True)
    return -(target * (attention[rows] + 1e-6).log()).sum(1).mean()


def patch_labels(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Class of every patch for every head, int64 [24, 24]; -100 where nothing should be said.

    In a crowd a patch says what it shows itself: color and shape where the shape is, word or digit on the label.
    """
    if isinstance(scene, Crowd):
        return _crowd_labels(scene)
    cover = scenes.coverage(scene)
    owner, share = cover.argmax(0), cover.max(0)
    labels = {name: np.zeros((GRID, GRID), dtype=np.int64) for name in HEADS}
    on = share >= ON_OBJECT
    for i, thing in enumerate(scene.things):
        mask = on & (owner == i)
        row, col = scene.bins(thing)
        for name, value in (
            ("color", thing.color + 1),
            ("shape", thing.shape + 1),
            ("word", thing.word + 1),
            ("row", row),
            ("col", col),
        ):
            labels[name][mask] = value
        labels["center"][scenes.center_patch(scene, thing)] = 1
    unclear = (share > 0.04) & ~on
    for name in ("color", "shape", "word"):
        labels[name][unclear] = -100
    for name in ("row", "col"):
        labels[name][~on] = -100
    return labels


def _crowd_labels(scene: Crowd) -> dict[str, np.ndarray]:
    labels = {name: np.zeros(GRID * GRID, dtype=np.int64) for name in HEADS}
    shares, things = scene.shares(), scene.things
    owner, most = shares.argmax(0), shares.max(0)  # [2, 576]: of shapes, of labels
    on, unclear = most >= ON_OBJECT, (most > 0.04) & (most < ON_OBJECT)
    place = np.array([scene.coarse(t) for t in things])
    for name, part, values in (
        ("color", 0, [t.color + 1 for t in things]),
        ("shape", 0, [t.shape + 1 for t in things]),
        ("word", 1, [t.label + 1 for t in things]),
    ):
        labels[name][on[part]] = np.array(values)[owner[part]][on[part]]
        labels[name][unclear[part]] = -100
    for name, column in (("row", 0), ("col", 1)):
        labels[name][:] = -100
        for part in (1, 0):
            labels[name][on[part]] = place[owner[part], column][on[part]]
    for i, thing in enumerate(things):
        row, col = scene.center(thing)
        middle = GRID * row + col
        labels["center"][middle if shares[i, 0, middle] >= ON_OBJECT else shares[i, 0].argmax()] = 1
    return {name: value.reshape(GRID, GRID) for name, value in labels.items()}


def window_batch(rng: np.random.Generator, count: int, side: int) -> tuple:
    """Random windows of `side` x `side` patches, four per scene (one per scene when whole): pixels, corners, labels."""
    images, corners, labels = [], [], {name: [] for name in HEADS}
    per_scene = 1 if side == GRID else 4
    for _ in range(count // per_scene):
        scene = scenes.sample_scene(rng, 3, 8 if side < GRID else 6, held_out=False)
        picture, marks = scenes.pad_square(scenes.render(scene)), patch_labels(scene)
        for _ in range(per_scene):
            y, x = rng.integers(0, GRID - side + 1, 2)
            corners.append((y, x))
            images.append(picture[PATCH * y : PATCH * (y + side), PATCH * x : PATCH * (x + side)])
            for name, mark in marks.items():
                labels[name].append(mark[y : y + side, x : x + side].reshape(-1))
    packed = {name: torch.from_numpy(np.stack(mark)) for name, mark in labels.items()}
    return normalize(np.stack(images)), np.array(corners), packed


def multi_label(labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which colors, shapes and words occur: float [B, SEVERAL]."""
    return torch.cat(
        [torch.stack([(labels[n] == k).any(1) for k in range(1, HEADS[n])], 1) for n in ("color", "shape", "word")], 1
    ).float()


def train_vision(
    folder: Path, minutes: float, batch: int = 32, peak: float = 1.5e-3, whole_share: float = 0.25
) -> None:
    """Train the tower for `minutes` (the last `whole_share` of them on whole pictures); writes `folder/vision.pt`."""
    torch.manual_seed(1)
    tower = build_tower()
    heads = nn.ModuleDict({name: nn.Linear(96, size) for name, size in HEADS.items()})
    several = nn.Linear(96, SEVERAL)
    modules = nn.ModuleList([tower, heads, several])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    rng, log = train_rng("vision"), Log("vision")
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        side = 12 if progress < 1 - whole_share else GRID
        pixels, corners, labels = window_batch(rng, batch * 2 if side < GRID else batch // 2, side)
        for group in optimizer.param_groups:
            group["lr"] = cosine(progress, step, peak, warmup=200)
        last = step % 4 == 0
        with autocast():
            features, attention, cls = run_tower(tower, pixels, corners, last)
            outputs = {name: head(features) for name, head in heads.items()}
            extra = several(cls) if last else None
        on = labels["color"] > 0
        losses = {
            name: F.cross_entropy(
                out.float().flatten(0, 1),
                labels[name].flatten(),
                ignore_index=-100,
                weight=torch.tensor([0.3] + [1.0] * (out.shape[-1] - 1))
                if name in ("color", "shape", "word")
                else None,
            )
            for name, out in outputs.items()
        }
        losses["attention"] = 0.3 * attention_loss(attention, on)
        if last:
            losses["cls"] = 0.5 * F.binary_cross_entropy_with_logits(extra.float(), multi_label(labels))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            with torch.no_grad():
                right = {}
                for name, out in outputs.items():
                    mask = (labels[name] > 0) if name != "word" else on
                    right[name] = (out.argmax(-1) == labels[name])[mask].float().mean().item()
                count = on.sum(1).clamp(min=1)
                top = [
                    on[i][attention[i].topk(min(64 if side == GRID else 16, int(count[i]))).indices].float().mean()
                    for i in range(len(on))
                ]
            log.write(
                step=step,
                side=side,
                seconds=round(time.time() - start),
                loss=round(loss.item(), 4),
                on_object=round(torch.stack(top).mean().item(), 3),
                **{k: round(v, 3) for k, v in right.items()},
            )
        if step % 500 == 0:
            save_state(folder / "vision.pt", tower=tower.state_dict(), heads=heads.state_dict(), step=step)
    save_state(folder / "vision.pt", tower=tower.state_dict(), heads=heads.state_dict(), step=step)
