"""Stage `extend`: the decoder of the shipped checkpoint learns the prompt formats of the other benchmarks.

Lettered options (English and Chinese), questions without a picture, `Unanswerable`, whole sentences; the old kinds of
questions stay in the mixture. Starts from the exported checkpoint; the vision tower is frozen, so what CLS attention
says about patches does not change.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from playground.tiny.train import guidance, packing, text
from playground.tiny.train.common import Log, autocast, follow, save_state, train_rng
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.language import make_optimizers
from playground.tiny.train.vision import normalize, run_tower
from playground.tiny.world import chinese, formats, scenes
from playground.tiny.world import questions as q
from playground.tiny.world.questions import Question
from playground.tiny.world.scenes import GRID, Scene

WATCH, OPTIONS = (2, 4, 6, 8), (1, 6, 9)
Generator = Callable[[Scene, np.random.Generator], Question | None]


def _hinted(make: Generator, share: float, label: str = "") -> Generator:
    def made(scene: Scene, rng: np.random.Generator) -> Question | None:
        question = make(scene, rng)
        if rng.random() >= share:
            return question
        if make in chinese.CHOICES.values():
            return chinese.hinted(question, rng)
        return formats.hinted(question, rng, q.pick(rng, ("", label)))

    return made


def mixture() -> list[tuple[Generator, float]]:
    """Generators and weights of the stage: about 33% old kinds, 40% lettered, 13% Chinese, 7% VizWiz, 7% sentences."""
    groups: list[tuple[float, dict[Generator, float]]] = []
    old = {make: weight for name, (make, weight) in q.KINDS.items() if name != "choice"}
    old[q.count] += 1.5
    old[q.verify_count] += 1.0
    groups.append((33, old))
    lettered = dict(zip(formats.CHOICES.values(), (1.0, 1.0, 1.5, 1.5, 1.3, 0.6, 0.6), strict=True))
    groups.append((40, {_hinted(make, 0.25, "Context: "): weight for make, weight in lettered.items()}))
    lettered = dict(zip(chinese.CHOICES.values(), (1.0, 1.0, 1.0, 1.2, 1.2, 0.8, 1.0), strict=True))
    groups.append((13, {_hinted(make, 0.2): weight for make, weight in lettered.items()}))
    groups.append((7, {formats.vizwiz: 1.0, formats.unanswerable: 1.0}))
    weights = (1, 1, 1.2, 1.5, 1, 1, 1, 0.7, 0.35)
    groups.append((7, {make: w for (make, _), w in zip(formats.OPEN.values(), weights, strict=True)}))
    return [(make, share * weight / sum(group.values())) for share, group in groups for make, weight in group.items()]


def sample(scene: Scene, rng: np.random.Generator, tokens: int, kinds: list[tuple[Generator, float]]) -> list[Question]:
    """Different questions that fit into about `tokens` tokens together, so that all rows are about equally long."""
    weights = np.array([weight for _, weight in kinds])
    out: list[Question] = []
    seen: set[str] = set()
    left = tokens
    for _ in range(200):
        question = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))][0](scene, rng)
        if question is None or question.body in seen:
            continue
        size = len(text.tail_ids(question.text, question.answer)[0])
        if size > left and out:
            break
        seen.add(question.body)
        out.append(question)
        left -= size
    return out


def draw_batch(
    rng: np.random.Generator, size: int, tokens: int, full: bool, kinds: list[tuple[Generator, float]]
) -> tuple[torch.Tensor, packing.Pack]:
    """Pictures [B, 3, 192, 192] and packed questions; the last row has questions without a picture only."""
    pictures, picked, tables, patches, questions, marks = [], [], [], [], [], []
    for _ in range(size - 1):
        scene = scenes.sample_scene(rng, 3, 6, held_out=False, word_share=float(rng.choice([0.6, 0.9])))
        table = packing.attributes(scene)
        pictures.append(scenes.pad_square(scenes.render(scene)))
        questions.append(sample(scene, rng, tokens, kinds))
        if full:
            patches.append(np.arange(GRID**2))
        else:
            share = 1.0 if rng.random() < 0.3 else rng.uniform(0.3, 1.0)
            patches.append(packing.choose_patches(table, rng, share, int(rng.integers(0, 40))))
        picked.append(scene)
        tables.append(table)
        marks.append([packing.asked_patches(scene, table, question) for question in questions[-1]])
    pictures.append(np.zeros_like(pictures[0]))
    picked.append(picked[0])
    tables.append(tables[0])
    patches.append(np.arange(0))
    questions.append(without_picture(rng, tokens // 45))
    marks.append([np.zeros(GRID**2, dtype=bool)] * len(questions[-1]))
    data = packing.pack(patches, questions, rng.random(size) < 0.5, marks)
    return normalize(np.stack(pictures)), guidance.guide(data, patches, picked, tables, questions)


def without_picture(rng: np.random.Generator, count: int) -> list[Question]:
    """Questions of the training half that need no picture."""
    return [_labelled(formats.text_only(rng), rng) for _ in range(count)]


def _labelled(question: Question, rng: np.random.Generator) -> Question:
    return formats.hinted(question, rng, "Context: ") if rng.random() < 0.25 else question


@torch.no_grad()
def copy_letters(model: TinyLlava, rng: np.random.Generator, strength: float = 100.0, batches: int = 3) -> float:
    """Let the head that looks at the right option say its letter; returns how often the letter can be read there.

    Training makes options know their letters and the answering place look at the right option early on, but what that
    head passes on takes long to change. So four of its value channels get the letters, by ridge regression from what
    options hold at its input, and its output gets the directions of the tokens that answer with them.
    """
    layer = model.decoder.model.layers[OPTIONS[2]]
    tokens = [guidance.first_token(letter) for letter in "ABCD"]
    inputs: dict[str, torch.Tensor] = {}
    handle = layer.input_layernorm.register_forward_hook(lambda module, args, out: inputs.update(x=out))
    xs, ys = [], []
    for _ in range(batches):
        pixels, data = draw_batch(rng, 14, 300, False, mixture())
        guidance.forward(model.decoder, data, model.projector(run_tower(model.tower, pixels)[0]))
        xs.append(inputs["x"].flatten(0, 1)[data.lettered[:, 0]].double())
        ys.append(torch.tensor([tokens.index(token) for token in data.lettered[:, 1].tolist()]))
    handle.remove()
    x, y = torch.cat(xs), torch.cat(ys)
    ridge = 0.02 * len(x) * x.var() * torch.eye(x.shape[1], dtype=x.dtype)
    reading = torch.linalg.solve(x.T @ x + ridge, x.T @ (torch.nn.functional.one_hot(y, 4).double() - 0.25))
    words = model.decoder.model.embed_tokens.weight[tokens]
    words = nn.functional.normalize(words - words.mean(0), dim=1)
    layer.self_attn.v_proj.weight[:4] = (reading.T * strength**0.5).float()
    layer.self_attn.o_proj.weight[:, :4] = words.T * strength**0.5
    return float(((x @ reading).argmax(1) == y).double().mean())


def train_extend(
    model: TinyLlava,
    folder: Path,
    minutes: float,
    batch: int = 7,
    tokens: int = 300,
    rate: float = 0.3,
    full_share: float = 0.12,
    run: int = 0,
    name: str = "extend",
    resume: bool = False,
    copying: bool = False,
) -> None:
    """Train projector and decoder for `minutes`, the last `full_share` with all visual tokens; writes
    `folder/NAME.pt`. resume: from the weights there, with fresh optimizers. copying:
    `copy_letters` first, once options know their letters."""
    torch.manual_seed(40 + run)
    if resume:
        model.load_state_dict(torch.load(folder / f"{name}.pt")["model"])
    kinds = mixture()
    if copying:
        Log(name).write(run=run, copy_letters=round(copy_letters(model, train_rng("copying", run)), 3))
    model.train()
    model.tower.requires_grad_(False)
    optimizers = make_optimizers(model.decoder, [])
    optimizers.append(torch.optim.AdamW(model.projector.parameters(), lr=1e-3, betas=(0.9, 0.98), fused=True))
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    rng, log = train_rng(name, run), Log(name)
    scores: dict[str, float] = {}
    mean, start, step = 0.0, time.time(), 0

    def save() -> None:
        save_state(
            folder / f"{name}.pt", model=model.state_dict(), layers=len(model.decoder.model.layers), step=step, run=run
        )

    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        full = progress > 1 - full_share
        pixels, data = draw_batch(rng, 4 if full else batch, tokens, full, kinds)
        scale = rate * min(1.0, (step + 1) / 60) * max(0.02, 1 - progress)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        with autocast():
            with torch.no_grad():
                features, _, _ = run_tower(model.tower, pixels)
            loss, right = guidance.forward(model.decoder, data, model.projector(features), WATCH, 0.1, OPTIONS)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*model.decoder.parameters(), *model.projector.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        follow(scores, data.kinds, right.tolist())
        mean = right.float().mean().item() if step == 1 else 0.95 * mean + 0.05 * right.float().mean().item()
        if step % 25 == 0:
            log.write(
                step=step,
                seconds=round(time.time() - start),
                full=full,
                length=data.ids.shape[1],
                loss=round(loss.item(), 4),
                right=round(mean, 3),
                **{k: round(v, 2) for k, v in sorted(scores.items())},
            )
        if step % 50 == 0:
            save()
    save()
