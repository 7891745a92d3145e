"""Stage `blank`: the decoder learns that a blank behind `ASSISTANT:` changes nothing.

Other programs write the prompt with a blank at its end, a token of its own, which the model has met there only as the
first token of an answer that is a digit. The model as it was is the teacher: behind the blank the student is to say
what the teacher says without it, and to the usual prompt exactly what the teacher says.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from playground.tiny.train import packing, text
from playground.tiny.train.common import Log, autocast, cosine, follow, save_state, train_rng
from playground.tiny.train.extend import Generator, mixture, sample, without_picture
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.vision import normalize, run_tower
from playground.tiny.world import scenes
from playground.tiny.world.questions import Question
from playground.tiny.world.scenes import GRID

NAME = "blank"
OTHER, BEHIND = 0.3, 0.35
"""Shares of pictures that are asked about as VLMEvalKit's class does, and of the other questions with the blank."""
TRUTH = 0.4
"""Weight of the right answers beside the teacher's."""


@cache
def token_of(characters: str) -> int:
    """The one token of some characters that nothing precedes but `ASSISTANT`."""
    before, whole = (text.tokenizer()(f"ASSISTANT{end}").input_ids for end in ("", characters))
    (token,) = whole[len(before) :]
    return token


def with_blank(tail: tuple[int, ...], answer: int) -> tuple[int, ...]:
    """The ids behind a picture with the blank before the answer; a digit begins with that very token."""
    place = len(tail) - answer
    return tail if tail[place] == token_of(" ") else (*tail[:place], token_of(" "), *tail[place:])


@lru_cache(maxsize=1)
def other_head() -> tuple[int, ...]:
    """Ids before the picture as VLMEvalKit's class for LLaVA writes them: other words, two blanks at the end."""
    return tuple(text.tokenizer()(text.prompt("").split("<image>")[0].replace("user", "human") + " ").input_ids)


@lru_cache(maxsize=100_000)
def other_tail(question: str, answer: str) -> tuple[int, ...]:
    """Ids behind the picture as that class writes them, ending with EOS: a blank, the question, a blank at the end."""
    tail, said = text.tail_ids(question, answer)
    prompt = " " + text.prompt(question).split("<image>")[1].removeprefix("\n")
    return with_blank((*text.tokenizer()(prompt).input_ids[1:], *tail[-said:]), said)


@dataclass
class Batch:
    """Pictures [B, 3, 192, 192], the usual prompts, the same questions in other prompts, and for every target of both
    whether it is the first of an answer behind a blank (bool)."""

    pixels: torch.Tensor
    usual: packing.Pack
    asked: packing.Pack
    behind: torch.Tensor


def draw_batch(
    rng: np.random.Generator, size: int, tokens: int, full: bool, kinds: list[tuple[Generator, float]]
) -> Batch:
    """`size` pictures with different questions of about `tokens` tokens each: all 576 patches of each, or few, as after
    pruning, and one row in ten without a picture."""
    pictures, patches, questions = [], [], []
    for _ in range(size):
        scene = scenes.sample_scene(rng, 3, 6, held_out=False, word_share=float(rng.choice([0.6, 0.9])))
        pictures.append(scenes.pad_square(scenes.render(scene)))
        if not full and rng.random() < 0.1:
            questions.append(without_picture(rng, tokens // 45))
            patches.append(np.arange(0))
            continue
        questions.append(sample(scene, rng, tokens, kinds))
        if full:
            patches.append(np.arange(GRID**2))
        else:
            table, share = packing.attributes(scene), 1.0 if rng.random() < 0.5 else rng.uniform(0.3, 1.0)
            patches.append(packing.choose_patches(table, rng, share, int(rng.integers(0, 80))))
    return pack(rng, normalize(np.stack(pictures)), patches, questions)


def pack(
    rng: np.random.Generator, pixels: torch.Tensor, patches: list[np.ndarray], questions: list[list[Question]]
) -> Batch:
    """Every question in its usual prompt, and again in one that is drawn: the targets of both are the same tokens."""
    usual, asked, heads, other_heads = [], [], [], []
    for row in questions:
        tails = [(*text.tail_ids(q.text, q.answer, q.picture), q.kind) for q in row]
        usual.append(tails)
        heads.append(text.head_ids(row[0].picture))
        if row[0].picture and rng.random() < OTHER:
            asked.append([(other_tail(q.text, q.answer), n, q.kind) for (_, n, _), q in zip(tails, row, strict=True)])
            other_heads.append(other_head())
        else:
            asked.append(
                [(with_blank(t, n), n, kind) if rng.random() < BEHIND else (t, n, kind) for t, n, kind in tails]
            )
            other_heads.append(heads[-1])
    original = rng.random(len(patches)) < 0.5
    teacher, student = (
        packing.pack_ids(patches, tails, original, heads=own) for tails, own in ((usual, heads), (asked, other_heads))
    )
    return Batch(pixels, teacher, student, student.opening & (student.ids.flatten()[student.where] == token_of(" ")))


def train_blank(
    model: TinyLlava,
    folder: Path,
    minutes: float,
    batch: int = 6,
    tokens: int = 500,
    rate: float = 1.0,
    full_share: float = 0.35,
    alone: float = 0.15,
    run: int = 0,
    resume: bool = False,
) -> None:
    """Train the decoder for `minutes`; writes `folder/blank.pt`. full_share: of the steps with all visual tokens, which
    have half the batch. alone: share of the time in which only the embedding of the blank learns, from that of the
    colon on. resume: from the weights there, with the whole decoder; the teacher stays the model that is given."""
    torch.manual_seed(70 + run)
    teacher = copy.deepcopy(model.decoder).requires_grad_(False)
    words, blank = model.decoder.model.embed_tokens.weight, token_of(" ")
    if resume:
        model.load_state_dict(torch.load(folder / f"{NAME}.pt")["model"])
        alone = 0.0
    else:
        with torch.no_grad():
            words[blank] = words[blank].lerp(words[token_of(":")], 0.7)
    model.requires_grad_(False)
    trained = list(model.decoder.parameters())
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    rng, log, kinds = train_rng(NAME, run), Log(NAME), mixture()
    scores: dict[str, float] = {}
    start, step = time.time(), 0

    def save() -> None:
        save_state(
            folder / f"{NAME}.pt", model=model.state_dict(), layers=len(model.decoder.model.layers), step=step, run=run
        )

    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        first = progress < alone
        for weight in trained:
            weight.requires_grad_(weight is words or not first)
        full = rng.random() < full_share
        data = draw_batch(rng, batch // 2 if full else batch, tokens, full, kinds)
        part = progress / alone if first else (progress - alone) / (1 - alone)
        optimizer.param_groups[0]["lr"] = cosine(part, step, (3e-3 if first else 2e-4) * rate, 30, 0.02)
        with autocast():
            with torch.no_grad():
                pictures = model.projector(run_tower(model.tower, data.pixels)[0])
                said = packing.run(teacher, data.usual, pictures)
                wanted = packing.logits_at(teacher, said, data.usual.where)
                # Where the blank is there already, it is not the answer's first token any more.
                wanted[data.behind, blank] = -torch.inf
                wanted = wanted.log_softmax(-1)
            hidden = packing.run(model.decoder, data.asked, pictures)
            logits = packing.logits_at(model.decoder, hidden, data.asked.where)
        miss = (wanted.exp() * (wanted.clamp(min=-30) - logits.log_softmax(-1))).sum(-1)
        loss = miss.mean() + TRUTH * F.cross_entropy(logits, data.asked.targets)
        optimizer.zero_grad()
        loss.backward()
        if first:
            words.grad[torch.arange(len(words)) != blank] = 0
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        names = np.where(data.behind, "behind", np.where(data.asked.opening, "usual", "later"))
        follow(scores, names.tolist(), (logits.argmax(-1) == wanted.argmax(-1)).tolist())
        follow(scores, [f"miss {name}" for name in names], miss.tolist())
        if step % 25 == 0:
            log.write(
                step=step,
                seconds=round(time.time() - start),
                length=data.asked.ids.shape[1],
                loss=round(loss.item(), 4),
                norm=round(norm.item(), 2),
                **{k: round(v, 4) for k, v in sorted(scores.items())},
            )
        if step % 50 == 0:
            save()
    save()
