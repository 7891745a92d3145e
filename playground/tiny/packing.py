"""Training sequences: one picture, many questions, each of them exactly a first turn.

A sequence is [head ids | visual tokens | question 1 | question 2 | ...]. A block mask lets every question see the head, the
picture and itself only, and its positions restart behind the picture, so the picture is computed once for all its
questions and every question is computed as at test time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from playground.tiny import text
from playground.tiny.questions import Question
from playground.tiny.scenes import GRID, Scene
from playground.tiny.vision import patch_labels

BACKGROUND = 0
ATTRIBUTES = ("color", "shape", "word", "row", "col", "center")


@dataclass
class Pack:
    """A batch of packed sequences, padded to one length L.

    Attributes:
        ids: [B, L] token ids, 0 at visual places and padding.
        visual: [B, L] index of the visual token of the row in its picture (0..575), -1 elsewhere.
        positions: [B, L]; mask: bool [B, 1, L, L]; where: flat indices whose next token is a target; targets: those tokens.
        first: indices into `targets` of the first token of every answer; owner: the question each target belongs to.
    """

    ids: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    kinds: list[str]


def attributes(scene: Scene) -> np.ndarray:
    """What a perfect tower would know about every patch: int64 [576, 6], zeros on the background."""
    labels = patch_labels(scene)
    table = np.stack([labels[name].reshape(-1) for name in ATTRIBUTES], axis=1)
    table[table[:, 0] <= 0] = BACKGROUND
    return table


def choose_patches(table: np.ndarray, rng: np.random.Generator, objects: float, background: int) -> np.ndarray:
    """Sorted indices of a subset: a share of the object patches (centers always) and some of the background."""
    on = table[:, 0] > 0
    keep = on & ((rng.random(len(on)) < objects) | (table[:, 5] > 0))
    rest = np.flatnonzero(~on)
    keep[rng.permutation(rest)[:background]] = True
    return np.flatnonzero(keep)


def pack(patches: list[np.ndarray], questions: list[list[Question]], original: np.ndarray) -> Pack:
    """Build a batch; `original[b]` tells that visual tokens keep the positions they have among all 576."""
    head = text.head_ids()
    tails = [[text.tail_ids(q.text, q.answer) for q in row] for row in questions]
    lengths = [len(head) + len(p) + sum(len(t) for t, _ in row) for p, row in zip(patches, tails, strict=True)]
    size, length = len(patches), -(-max(lengths) // 8) * 8
    ids = np.zeros((size, length), dtype=np.int64)
    visual = np.full((size, length), -1, dtype=np.int64)
    positions = np.zeros((size, length), dtype=np.int64)
    segment = np.full((size, length), -1, dtype=np.int64)
    where, targets, owner, kinds = [], [], [], []
    for b, (chosen, row) in enumerate(zip(patches, tails, strict=True)):
        start, end = len(head), len(head) + len(chosen)
        ids[b, :start], visual[b, start:end], segment[b, :end] = head, chosen, 0
        positions[b, :start] = np.arange(start)
        positions[b, start:end] = start + (chosen if original[b] else np.arange(len(chosen)))
        behind = start + (GRID * GRID if original[b] else len(chosen))
        for k, ((tail, answer), question) in enumerate(zip(row, questions[b], strict=True)):
            stop = end + len(tail)
            ids[b, end:stop], segment[b, end:stop] = tail, k + 1
            positions[b, end:stop] = behind + np.arange(len(tail))
            where.append(b * length + np.arange(stop - answer - 1, stop - 1))
            targets.append(tail[-answer:])
            owner.append(np.full(answer, len(kinds)))
            kinds.append(question.kind)
            end = stop
    segment = torch.from_numpy(segment)
    order = torch.arange(length)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    mask = (same & (order[None, :] <= order[:, None])[None])[:, None]
    return Pack(torch.from_numpy(ids), torch.from_numpy(visual), torch.from_numpy(positions), mask,
                torch.from_numpy(np.concatenate(where)), torch.from_numpy(np.concatenate(targets)),
                torch.from_numpy(np.concatenate(owner)), kinds)


def forward(decoder, batch: Pack, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss over answer tokens, and per question whether all of its answer tokens are right (bool).

    Args:
        decoder: LlamaForCausalLM.
        pictures: [B, 576, D] visual embeddings (rows that the batch does not use may hold anything).
    """
    embedded = decoder.model.embed_tokens(batch.ids)
    rows, places = torch.nonzero(batch.visual >= 0, as_tuple=True)
    embedded = embedded.index_put((rows, places), pictures[rows, batch.visual[rows, places]].to(embedded.dtype))
    hidden = decoder.model(inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions,
                           use_cache=False).last_hidden_state
    logits = decoder.lm_head(hidden.flatten(0, 1)[batch.where]).float()
    right = logits.detach().argmax(-1) == batch.targets
    wrong = torch.zeros(len(batch.kinds)).index_add(0, batch.owner, (~right).float())
    return F.cross_entropy(logits, batch.targets), wrong == 0
