"""Training sequences: one picture, many questions, each of them exactly a first turn.

A sequence is [head ids | visual tokens | question 1 | question 2 | ...]. A block mask lets every question see the
head, the picture and itself only, and its positions restart behind the picture, so the picture is computed once for
all its questions and every question is computed as at test time. What guides attention in training is in `guidance.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch

from playground.tiny.train import text
from playground.tiny.train.vision import patch_labels
from playground.tiny.world.crowded import Crowd
from playground.tiny.world.questions import Question
from playground.tiny.world.scenes import GRID, Scene

BACKGROUND = 0
OF_LABEL = ("with the", "单词", "数字", '"')
"""What a phrase says that names an object of a crowd by its label."""
READING = ("What word", "What digit", "Is the word", "单词是什么", "Which animal")
"""What a question says that asks for a label of a crowd."""
ATTRIBUTES = ("color", "shape", "word", "row", "col", "center")


@dataclass
class Pack:
    """A batch of packed sequences, padded to one length L.

    Attributes:
        ids: [B, L] token ids, 0 at visual places and padding.
        visual: [B, L] index of the visual token of the row in its picture (0..575), -1 elsewhere.
        positions: [B, L]; segment: [B, L], 0 for head and picture, k + 1 for question k, -1 for padding; where: flat
        indices whose next token is a target; targets: those tokens. owner: the question each target belongs to.
        pairs: [pairs, 3], for questions with two names the flat indices of the answering place and of both names.
        sides: [n, 2], for questions about a relation the flat index of the answering place and the token of the side
            on which the first object really is.
        counted: for questions about a number, the flat index of the answering place [n] and bool [n, L]: the centers of
            the objects to count, and BOS. Their true number is in sides.
        names, named: like rows and asked for the last token of every phrase that names an object; in a crowd the part
            of the object that the phrase speaks of. whole: the whole object, if that is more.
        prefix: where questions begin if all rows have room for a whole picture before them, else 0.
        letters: [n, 2], for every option of a lettered question the flat indices of its last token and of its letter.
        lettered: [n, 2], the last token of every option and the token that answers with its letter.
        chosen: [n, 2], for every lettered question the flat indices of the answering place and of the last token of the
            right option.
        meanings: [n, 2], flat index of the last token of a Chinese word and the token of the English one; of the letter
            of an option and the token that answers with it.
        rows: per question the flat index of the place that predicts its answer; asked: bool [questions, L], the visual
            places that show what it asks about (none: nothing can be said).
    """

    ids: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    segment: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    kinds: list[str]
    rows: torch.Tensor
    asked: torch.Tensor
    names: torch.Tensor | None = None
    named: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    pairs: torch.Tensor | None = None
    sides: torch.Tensor | None = None
    counted: tuple[torch.Tensor, torch.Tensor] | None = None
    letters: torch.Tensor | None = None
    lettered: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    meanings: torch.Tensor | None = None
    prefix: int = 0

    @cached_property
    def mask(self) -> torch.Tensor:
        """What every place may look at: bool [B, 1, L, L]."""
        every = torch.arange(self.ids.numel(), device=self.ids.device)
        return self.visible(every).view(len(self.ids), 1, self.ids.shape[1], -1)

    @cached_property
    def opening(self) -> torch.Tensor:
        """Which targets are the first token of their answer: bool [targets]."""
        return torch.isin(self.where, self.rows)

    def visible(self, rows: torch.Tensor) -> torch.Tensor:
        """What some places (flat indices [n]) may look at: bool [n, L]."""
        length = self.ids.shape[1]
        theirs, own = self.segment[rows // length], self.segment.flatten()[rows][:, None]
        order = torch.arange(length, device=rows.device)
        return ((theirs == own) | (theirs == 0)) & (order <= (rows % length)[:, None])

    def to(self, device: torch.device | str) -> Pack:
        """The batch with its tensors on another device."""

        def moved(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(moved(v) for v in value)
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return replace(self, **{field.name: moved(getattr(self, field.name)) for field in fields(self)})


def attributes(scene: Scene) -> np.ndarray:
    """What a perfect tower would know about every patch: int64 [576, 6], zeros on the background."""
    labels = patch_labels(scene)
    table = np.stack([labels[name].reshape(-1) for name in ATTRIBUTES], axis=1)
    table[(table[:, 0] <= 0) & (table[:, 2] <= 0)] = BACKGROUND  # a label in a crowd has no color
    return table


def choose_patches(table: np.ndarray, rng: np.random.Generator, objects: float, background: int) -> np.ndarray:
    """Sorted indices of a subset: a share of the object patches (centers always) and some of the background."""
    on = (table[:, [0, 2]] > 0).any(1)
    keep = on & ((rng.random(len(on)) < objects) | (table[:, 5] > 0))
    rest = np.flatnonzero(~on)
    keep[rng.permutation(rest)[:background]] = True
    return np.flatnonzero(keep)


def object_patches(scene: Scene, table: np.ndarray, objects: tuple[int, ...]) -> np.ndarray:
    """Patches of some objects: bool [576]."""
    out = np.zeros(len(table), dtype=bool)
    if isinstance(scene, Crowd):
        return scene.parts()[list(objects)].any((0, 1))
    for i in objects:
        thing = scene.things[i]  # no two objects share both color and shape
        out |= (table[:, 0] == thing.color + 1) & (table[:, 1] == thing.shape + 1)
    return out


def named_patches(scene: Scene, table: np.ndarray, phrase: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches of the part of an object that a phrase speaks of, and of the whole object: bool [576] each. A name by
    color and shape means every object of a crowd that has both."""
    if not isinstance(scene, Crowd):
        patches = object_patches(scene, table, (index,))
        return patches, patches
    by_label, thing = any(word in phrase for word in OF_LABEL), scene.things[index]
    alike = [i for i, t in enumerate(scene.things) if (t.color, t.shape) == (thing.color, thing.shape)]
    parts = scene.parts()[[index] if by_label else alike].any(0)
    return parts[int(by_label)], parts.any(0)


def asked_patches(scene: Scene, table: np.ndarray, question: Question) -> np.ndarray:
    """Patches that show what the question asks about: bool [576]. An absent object is nowhere."""
    present = "exists" not in question.kind or "Yes" in (question.answer, question.target)
    asked = question.asked if present else ()
    if not isinstance(scene, Crowd):
        return object_patches(scene, table, asked)
    return scene.parts()[list(asked), int(any(word in question.question for word in READING))].any(0)


def pack(
    patches: list[np.ndarray],
    questions: list[list[Question]],
    original: np.ndarray,
    asked: list[list[np.ndarray]] | None = None,
    totals: list[int] | None = None,
    room: tuple[int, int] | None = None,
) -> Pack:
    """Build a batch; `original[b]` tells that visual tokens keep the positions they have among all.

    asked: per picture and question the visual tokens it asks about, bool; totals: visual tokens of each whole picture,
    576 if not given.
    """
    tails = [[(*text.tail_ids(q.text, q.answer, q.picture), q.kind) for q in row] for row in questions]
    heads = [text.head_ids(row[0].picture) for row in questions]
    return pack_ids(patches, tails, original, asked, heads, totals, room)


def pack_ids(
    patches: list[np.ndarray],
    tails: list[list[tuple[tuple[int, ...], int, str]]],
    original: np.ndarray,
    asked: list[list[np.ndarray]] | None = None,
    heads: list[tuple[int, ...]] | None = None,
    totals: list[int] | None = None,
    room: tuple[int, int] | None = None,
) -> Pack:
    """`pack` for ready ids: per picture and question the ids behind the picture, the length of the answer, the kind;
    `heads`: the ids before the picture where they are not the usual ones; `room`: places before the questions and for
    them, where all batches are to have the same shape."""
    heads = heads or [text.head_ids()] * len(patches)
    totals = totals or [GRID * GRID] * len(patches)
    lengths = [
        len(head) + len(p) + sum(len(t) for t, _, _ in row) for head, p, row in zip(heads, patches, tails, strict=True)
    ]
    size, length = len(patches), sum(room) if room else -(-max(lengths) // 8) * 8
    ids = np.zeros((size, length), dtype=np.int64)
    visual = np.full((size, length), -1, dtype=np.int64)
    positions = np.zeros((size, length), dtype=np.int64)
    segment = np.full((size, length), -1, dtype=np.int16)
    where, targets, owner, kinds, rows, marks = [], [], [], [], [], []
    for b, (head, chosen, row) in enumerate(zip(heads, patches, tails, strict=True)):
        start, end = len(head), len(head) + len(chosen)
        ids[b, :start], visual[b, start:end], segment[b, :end] = head, chosen, 0
        positions[b, :start] = np.arange(start)
        positions[b, start:end] = start + (chosen if original[b] else np.arange(len(chosen)))
        behind = start + (totals[b] if original[b] and len(chosen) else len(chosen))
        end = room[0] if room else end
        for k, (tail, answer, kind) in enumerate(row):
            stop = end + len(tail)
            ids[b, end:stop], segment[b, end:stop] = tail, k + 1
            positions[b, end:stop] = behind + np.arange(len(tail))
            where.append(b * length + np.arange(stop - answer - 1, stop - 1))
            targets.append(np.array(tail[len(tail) - answer :], dtype=np.int64))
            owner.append(np.full(answer, len(kinds)))
            kinds.append(kind)
            rows.append(b * length + stop - answer - 1)
            if asked is not None:
                mark = np.zeros(length, dtype=bool)
                mark[start : start + len(chosen)] = asked[b][k][chosen]
                marks.append(mark)
            end = stop
    return Pack(
        torch.from_numpy(ids),
        torch.from_numpy(visual),
        torch.from_numpy(positions),
        torch.from_numpy(segment),
        torch.from_numpy(np.concatenate(where)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(owner)),
        kinds,
        torch.tensor(rows),
        torch.from_numpy(np.stack(marks)) if marks else torch.zeros(len(kinds), length, dtype=torch.bool),
        prefix=room[0] if room else 0,
    )


def embed(decoder, batch: Pack, pictures: torch.Tensor) -> torch.Tensor:
    """Embeddings of the packed sequences with the visual tokens in their places: [B, L, D]."""
    embedded = decoder.model.embed_tokens(batch.ids)
    rows, places = torch.nonzero(batch.visual >= 0, as_tuple=True)
    return embedded.index_put((rows, places), pictures[rows, batch.visual[rows, places]].to(embedded.dtype))


def run(decoder, batch: Pack, pictures: torch.Tensor) -> torch.Tensor:
    """The decoder's normed output for the packed sequences: [B, L, D]."""
    return decoder.model(
        inputs_embeds=embed(decoder, batch, pictures),
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state


def logits_at(decoder, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Logits at some places (flat indices [n]) of what `run` returns: [n, vocabulary] in fp32."""
    return decoder.lm_head(hidden.flatten(0, 1)[places]).float()


def next_tokens(decoder, batch: Pack, pictures: torch.Tensor) -> torch.Tensor:
    """The most likely token behind every question (packed without answers): int64 [questions]."""
    return logits_at(decoder, run(decoder, batch, pictures), batch.rows).argmax(-1)
