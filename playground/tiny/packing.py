"""Training sequences: one picture, many questions, each of them exactly a first turn.

A sequence is [head ids | visual tokens | question 1 | question 2 | ...]. A block mask lets every question see the
head, the picture and itself only, and its positions restart behind the picture, so the picture is computed once for
all its questions and every question is computed as at test time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from playground.tiny import text
from playground.tiny.questions import NUMBERS, Question
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
        positions: [B, L]; mask: bool [B, 1, L, L]; where: flat indices whose next token is a target; targets: those
        tokens. owner: the question each target belongs to.
        pairs: [pairs, 3], for questions with two names the flat indices of the answering place and of both names.
        sides: [n, 2], for questions about a relation the flat index of the answering place and the token of the side
            on which the first object really is.
        counted: for questions about a number, the flat index of the answering place [n] and bool [n, L]: the centers of
            the objects to count, and BOS. Their true number is in sides.
        names, named: like rows and asked for the last token of every phrase that names an object.
        rows: per question the flat index of the place that predicts its answer; asked: bool [questions, L], the visual
            places that show what it asks about (none: nothing can be said).
    """

    ids: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    kinds: list[str]
    rows: torch.Tensor
    asked: torch.Tensor
    names: torch.Tensor | None = None
    named: torch.Tensor | None = None
    pairs: torch.Tensor | None = None
    sides: torch.Tensor | None = None
    counted: tuple[torch.Tensor, torch.Tensor] | None = None


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


def object_patches(scene: Scene, table: np.ndarray, objects: tuple[int, ...]) -> np.ndarray:
    """Patches of some objects: bool [576]."""
    out = np.zeros(len(table), dtype=bool)
    for i in objects:
        thing = scene.things[i]  # no two objects share both color and shape
        out |= (table[:, 0] == thing.color + 1) & (table[:, 1] == thing.shape + 1)
    return out


def asked_patches(scene: Scene, table: np.ndarray, question: Question) -> np.ndarray:
    """Patches of the objects that the question asks about: bool [576]. An absent object is nowhere."""
    present = question.kind != "exists" or question.answer == "Yes"
    return object_patches(scene, table, question.asked if present else ())


OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def side_token(question: Question) -> int:
    """The token of the side of the second object on which the first one is, whatever the question claims."""
    side = next(side for side in OPPOSITE if side in question.category)
    return text.tokenizer()(OPPOSITE[side] if question.answer == "No" else side).input_ids[1]


def guide(
    batch: Pack,
    patches: list[np.ndarray],
    scenes: list[Scene],
    tables: list[np.ndarray],
    questions: list[list[Question]],
) -> Pack:
    """Fill in where phrases name objects and which visual places those are (for `looking_loss`)."""
    head, length = len(text.head_ids()), batch.ids.shape[1]
    names, named, pairs, sides, counted, centers = [], [], [], [], [], []
    answering = iter(batch.rows.tolist())
    for b, (chosen, row) in enumerate(zip(patches, questions, strict=True)):
        start = head + len(chosen)
        for question in row:
            for name, index in question.names:
                names.append(b * length + start + text.name_place(question.question, name))
                mark = np.zeros(length, dtype=bool)
                mark[head : head + len(chosen)] = object_patches(scenes[b], tables[b], (index,))[chosen]
                named.append(mark)
            row_index = next(answering)
            if len(question.names) == 2:
                pairs.append([row_index, *names[-2:]])
            if question.kind in ("relation", "choose_relation"):
                sides.append([row_index, side_token(question)])
            if question.kind in ("count", "verify_count") and question.asked:
                sides.append([row_index, text.tokenizer()(NUMBERS[len(question.asked)]).input_ids[1]])
                mark = np.zeros(length, dtype=bool)
                mark[head : head + len(chosen)] = (
                    object_patches(scenes[b], tables[b], question.asked) & (tables[b][:, 5] > 0)
                )[chosen]
                mark[0] = True
                counted.append(row_index)
                centers.append(mark)
            start += len(text.tail_ids(question.text, question.answer)[0])
    batch.names, batch.named = torch.tensor(names), torch.from_numpy(np.stack(named))
    batch.pairs = torch.tensor(pairs).view(-1, 3)
    batch.sides = torch.tensor(sides).view(-1, 2)
    if counted:
        batch.counted = torch.tensor(counted), torch.from_numpy(np.stack(centers))
    return batch


def pack(
    patches: list[np.ndarray],
    questions: list[list[Question]],
    original: np.ndarray,
    asked: list[list[np.ndarray]] | None = None,
) -> Pack:
    """Build a batch; `original[b]` tells that visual tokens keep the positions they have among all 576.

    asked: per picture and question the patches it asks about, bool [576].
    """
    tails = [[(*text.tail_ids(q.text, q.answer), q.kind) for q in row] for row in questions]
    return pack_ids(patches, tails, original, asked)


def pack_ids(
    patches: list[np.ndarray],
    tails: list[list[tuple[tuple[int, ...], int, str]]],
    original: np.ndarray,
    asked: list[list[np.ndarray]] | None = None,
) -> Pack:
    """`pack` for ready ids: per picture and question the ids behind the picture, the length of the answer, the kind."""
    head = text.head_ids()
    lengths = [len(head) + len(p) + sum(len(t) for t, _, _ in row) for p, row in zip(patches, tails, strict=True)]
    size, length = len(patches), -(-max(lengths) // 8) * 8
    ids = np.zeros((size, length), dtype=np.int64)
    visual = np.full((size, length), -1, dtype=np.int64)
    positions = np.zeros((size, length), dtype=np.int64)
    segment = np.full((size, length), -1, dtype=np.int64)
    where, targets, owner, kinds, rows, marks = [], [], [], [], [], []
    for b, (chosen, row) in enumerate(zip(patches, tails, strict=True)):
        start, end = len(head), len(head) + len(chosen)
        ids[b, :start], visual[b, start:end], segment[b, :end] = head, chosen, 0
        positions[b, :start] = np.arange(start)
        positions[b, start:end] = start + (chosen if original[b] else np.arange(len(chosen)))
        behind = start + (GRID * GRID if original[b] else len(chosen))
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
    segment = torch.from_numpy(segment)
    order = torch.arange(length)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    mask = (same & (order[None, :] <= order[:, None])[None])[:, None]
    return Pack(
        torch.from_numpy(ids),
        torch.from_numpy(visual),
        torch.from_numpy(positions),
        mask,
        torch.from_numpy(np.concatenate(where)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(owner)),
        kinds,
        torch.tensor(rows),
        torch.from_numpy(np.stack(marks)) if marks else torch.zeros(len(kinds), length, dtype=torch.bool),
    )


def embed(decoder, batch: Pack, pictures: torch.Tensor) -> torch.Tensor:
    """Embeddings of the packed sequences with the visual tokens in their places: [B, L, D]."""
    embedded = decoder.model.embed_tokens(batch.ids)
    rows, places = torch.nonzero(batch.visual >= 0, as_tuple=True)
    return embedded.index_put((rows, places), pictures[rows, batch.visual[rows, places]].to(embedded.dtype))


def forward(
    decoder, batch: Pack, pictures: torch.Tensor, watch: tuple[int, ...] | None = None, weight: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss over answer tokens, and per question whether all of its answer tokens are right (bool).

    `watch`: layers whose attention is guided with `weight` (`looking_loss`): in the first, names look at the
    objects they name; in the second too, and the place of the answer looks at the objects asked about; in the third,
    it looks back at both names (`comparing_loss`). Behind the fourth, it must say on which side the first object is.

    Args:
        decoder: LlamaForCausalLM.
        pictures: [B, 576, D] visual embeddings (rows that the batch does not use may hold anything).
    """
    embedded = embed(decoder, batch, pictures)
    watched: dict[int, dict] = {}
    handles = [
        decoder.model.layers[i].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: watched.update({i: kwargs}), with_kwargs=True
        )
        for i in (watch or ())[:3]
    ]
    if watch is not None and len(watch) > 3:
        handles.append(
            decoder.model.layers[watch[3]].register_forward_hook(
                lambda module, args, output: watched.update(
                    {"late": output[0] if isinstance(output, tuple) else output}
                )
            )
        )
    hidden = decoder.model(
        inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    logits = decoder.lm_head(hidden.flatten(0, 1)[batch.where]).float()
    right = logits.detach().argmax(-1) == batch.targets
    wrong = torch.zeros(len(batch.kinds)).index_add(0, batch.owner, (~right).float())
    loss = F.cross_entropy(logits, batch.targets)
    for handle in handles:
        handle.remove()
    if watch is not None:
        first, second = (decoder.model.layers[i].self_attn for i in watch[:2])
        loss = loss + weight * looking_loss(first, watched[watch[0]], batch, batch.names, batch.named)
        loss = loss + weight * looking_loss(second, watched[watch[1]], batch, batch.rows, batch.asked)
        loss = loss + weight * looking_loss(second, watched[watch[1]], batch, batch.names, batch.named)
        if len(watch) > 3 and len(batch.sides):
            late = decoder.model.norm(watched["late"].flatten(0, 1)[batch.sides[:, 0]])
            loss = loss + 3 * weight * F.cross_entropy(decoder.lm_head(late).float(), batch.sides[:, 1])
        if batch.counted is not None:
            loss = loss + weight * counting_loss(second, watched[watch[1]], batch)
        if len(watch) > 2 and len(batch.pairs):
            loss = loss + weight * comparing_loss(decoder.model.layers[watch[2]].self_attn, watched[watch[2]], batch)
    return loss, wrong == 0


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, halves convention."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def looking_loss(
    attention: torch.nn.Module, given: dict, batch: Pack, rows: torch.Tensor, asked: torch.Tensor
) -> torch.Tensor:
    """How little the first half of the heads look from `rows` (flat indices [n]) at the places `asked` (bool [n, L]).

    Minus the log of the share of the attention over visual tokens that lies on those objects. Without it binding
    ("what color is the star") takes several times as many steps to appear.
    """
    hidden, (cos, sin) = given["hidden_states"], given["position_embeddings"]
    size, length, _ = hidden.shape
    width = attention.head_dim
    heads = attention.q_proj.out_features // width // 2
    use = asked.any(1)
    rows, asked = rows[use], asked[use]
    sample = rows // length
    query = attention.q_proj(hidden.flatten(0, 1)[rows])[:, : heads * width].view(-1, heads, width).float()
    key = attention.k_proj(hidden)[..., : heads * width].view(size, length, heads, width).float()
    cos, sin = cos.float().expand(size, -1, -1), sin.float().expand(size, -1, -1)
    query = rotate(query, cos.flatten(0, 1)[rows][:, None], sin.flatten(0, 1)[rows][:, None])
    key = rotate(key, cos[:, :, None], sin[:, :, None])
    scores = torch.einsum("qhd,qlhd->qhl", query, key[sample]) * attention.scaling
    visual = (batch.visual >= 0)[sample][:, None]
    every = scores.masked_fill(~visual, -1e9).logsumexp(-1)
    there = scores.masked_fill(~asked[:, None], -1e9).logsumexp(-1)
    return (every - there).mean()


def next_tokens(decoder, batch: Pack, pictures: torch.Tensor) -> torch.Tensor:
    """The most likely token behind every question (packed without answers): int64 [questions]."""
    hidden = decoder.model(
        inputs_embeds=embed(decoder, batch, pictures),
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return decoder.lm_head(hidden.flatten(0, 1)[batch.rows]).float().argmax(-1)


def head_scores(attention: torch.nn.Module, given: dict, batch: Pack, rows: torch.Tensor, heads: slice) -> torch.Tensor:
    """Masked attention logits of some heads from `rows` (flat indices [n]): [n, heads, L]."""
    hidden, (cos, sin) = given["hidden_states"], given["position_embeddings"]
    size, length, _ = hidden.shape
    width = attention.head_dim
    sample = rows // length
    query = attention.q_proj(hidden.flatten(0, 1)[rows]).view(len(rows), -1, width)[:, heads].float()
    key = attention.k_proj(hidden).view(size, length, -1, width)[:, :, heads].float()
    cos, sin = cos.float().expand(size, -1, -1), sin.float().expand(size, -1, -1)
    query = rotate(query, cos.flatten(0, 1)[rows][:, None], sin.flatten(0, 1)[rows][:, None])
    key = rotate(key, cos[:, :, None], sin[:, :, None])
    scores = torch.einsum("qhd,qlhd->qhl", query, key[sample]) * attention.scaling
    return scores.masked_fill(~batch.mask[sample, 0, rows % length][:, None], -1e9)


def counting_loss(attention: torch.nn.Module, given: dict, batch: Pack) -> torch.Tensor:
    """The third head should spread evenly over BOS and the centers of the objects to count, so that the share of BOS,
    1 / (n + 1), tells their number."""
    rows, places = batch.counted
    scores = head_scores(attention, given, batch, rows, slice(2, 3))[:, 0]
    target = places.float() / places.sum(1, keepdim=True)
    return -(target * scores.log_softmax(-1)).sum(1).mean()


def comparing_loss(attention: torch.nn.Module, given: dict, batch: Pack) -> torch.Tensor:
    """Where a question names two objects: how little the answering place looks back at the two names, at the first one
    with the last head but one, at the second one with the last head. What the names found is what is to be compared."""
    rows, targets = batch.pairs[:, 0], batch.pairs[:, 1:] % batch.ids.shape[1]
    scores = head_scores(attention, given, batch, rows, slice(-2, None))
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())
