"""What guides attention while the decoder is trained, beside the answers themselves.

Some heads are told where to look, and some layers what to know already: names look at what they name, the answering
place at what is asked about, at both names of a comparison, at everything that is to be counted, and at the right one
of lettered options. None of this exists at test time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from playground.tiny.train import text
from playground.tiny.train.packing import Pack, logits_at, named_patches, object_patches, run
from playground.tiny.world import chinese
from playground.tiny.world.questions import NUMBERS, Question
from playground.tiny.world.scenes import Scene

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def first_token(word: str) -> int:
    """The first token of a word that stands behind a blank; digits have no token of their own with the blank."""
    return text.tokenizer()(word).input_ids[1]


def side_token(question: Question) -> int:
    """The token of the side of the second object on which the first one is, whatever the question claims."""
    side = next(side for side in OPPOSITE if side in question.category)
    return first_token(OPPOSITE[side] if question.answer == "No" else side)


def known_token(question: Question) -> int | None:
    """What the answering place should know before the last layers, where that is not the answer itself."""
    if question.kind in ("relation", "choose_relation"):
        return side_token(question)
    if question.kind.endswith("count") and question.asked:
        return first_token(NUMBERS[len(question.asked)])
    return first_token(question.target) if question.target else None


def words_of(question: Question) -> list[tuple[int, str]]:
    """Chinese words of a question: character behind the word, English word."""
    out = []
    for word, english in chinese.MEANING.items():
        place = question.body.find(word)
        while place >= 0:
            out.append((place + len(word), english))
            place = question.body.find(word, place + 1)
    for (end, _), option in zip(option_ends(question), question.options, strict=True):
        if option in chinese.ANSWERS:  # one character, which also occurs in other words
            out.append((end, chinese.ANSWERS[option]))
    return out


def option_ends(question: Question) -> list[tuple[int, int]]:
    """Per option the characters of the question's text behind its last letter and behind its option letter."""
    lines = question.body.split("\n")
    end, out = len(question.body), []
    for line in reversed(lines[len(lines) - len(question.options) :]):
        out.append((end, end - len(line) + 1))
        end -= len(line) + 1
    return out[::-1]


def guide(
    batch: Pack,
    patches: list[np.ndarray],
    scenes: list[Scene],
    tables: list[np.ndarray],
    questions: list[list[Question]],
) -> Pack:
    """Fill in where phrases name objects, which visual places those are, and all else that the losses below need."""
    length = batch.ids.shape[1]
    names, named, whole, pairs, sides, counted, centers = [], [], [], [], [], [], []
    letters, lettered, chosen_options, meanings = [], [], [], []
    answering = iter(batch.rows.tolist())

    def mark(b: int, there: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        out = np.zeros(length, dtype=bool)
        head = len(text.head_ids(questions[b][0].picture))
        out[head : head + len(chosen)] = there[chosen]
        return out

    for b, (chosen, row) in enumerate(zip(patches, questions, strict=True)):
        start = batch.prefix or len(text.head_ids(row[0].picture)) + len(chosen)
        for question in row:
            ends = text.token_ends(question.text, question.picture)
            base, row_index = b * length + start, next(answering)
            offset = len(question.lead) + 1 if question.lead else 0
            for name, index in question.names:
                names.append(base + ends[offset + question.question.index(name) + len(name)])
                part, both = named_patches(scenes[b], tables[b], name, index)
                named.append(mark(b, part, chosen))
                whole.append(mark(b, both, chosen))
            if len(question.names) == 2:
                pairs.append([row_index, *names[-2:]])
            known = known_token(question)
            if known is not None:
                sides.append([row_index, known])
            if question.kind.endswith("count") and question.asked:
                centered = object_patches(scenes[b], tables[b], question.asked) & (tables[b][:, 5] > 0)
                counted.append(row_index)
                centers.append(mark(b, centered, chosen))
                centers[-1][0] = True
            if question.options:
                places = [(base + ends[last], base + ends[letter]) for last, letter in option_ends(question)]
                letters += places
                # The letters of options are other tokens than those that answer with them.
                meanings += [[place, first_token(c)] for (_, place), c in zip(places, "ABCD", strict=False)]
                lettered += [[place, first_token(c)] for (place, _), c in zip(places, "ABCD", strict=False)]
                chosen_options.append([row_index, places["ABCD".index(question.answer)][0]])
            meanings += [[base + ends[end], first_token(english)] for end, english in words_of(question)]
            start += len(text.tail_ids(question.text, question.answer, question.picture)[0])
    none = np.zeros((0, length), dtype=bool)
    batch.names = torch.tensor(names, dtype=torch.long)
    batch.named, batch.whole = (torch.from_numpy(np.stack(marks) if marks else none) for marks in (named, whole))
    batch.pairs = torch.tensor(pairs).view(-1, 3)
    batch.sides = torch.tensor(sides).view(-1, 2)
    batch.letters = torch.tensor(letters).view(-1, 2)
    batch.lettered = torch.tensor(lettered).view(-1, 2)
    batch.chosen = torch.tensor(chosen_options).view(-1, 2)
    batch.meanings = torch.tensor(meanings).view(-1, 2)
    if counted:
        batch.counted = torch.tensor(counted), torch.from_numpy(np.stack(centers))
    return batch


def forward(
    decoder,
    batch: Pack,
    pictures: torch.Tensor,
    watch: tuple[int, ...] | None = None,
    weight: float = 0.0,
    options: tuple[int, int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss over answer tokens, and per question whether all of its answer tokens are right (bool).

    `watch`: layers whose attention is guided with `weight` (`looking_loss`): in the first, names look at the
    objects they name; in the second too, and the place of the answer looks at the objects asked about; in the third,
    it looks back at both names (`comparing_loss`). Behind the fourth, it must say on which side the first object is.
    `options`: behind the first of these layers Chinese words mean English ones and letters the tokens that answer
    with them, in the second options look at their
    letters and behind it they know them, in the third the answering place looks at the right option.

    Args:
        decoder: LlamaForCausalLM.
        pictures: [B, 576, D] visual embeddings (rows that the batch does not use may hold anything).
    """
    watched: dict[int, dict] = {}
    outputs: dict[int, torch.Tensor] = {}
    layers = decoder.model.layers
    handles = [
        layers[i].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: watched.update({i: kwargs}), with_kwargs=True
        )
        for i in {*(watch or ())[:3], *(options or ())[1:]}
    ]
    handles += [
        layers[i].register_forward_hook(
            lambda module, args, output, i=i: outputs.update({i: output[0] if isinstance(output, tuple) else output})
        )
        for i in {*(watch or ())[3:], *(options or ())[:2]}
    ]
    hidden = run(decoder, batch, pictures)
    for handle in handles:
        handle.remove()
    return losses(decoder, batch, hidden, watched, outputs, watch, weight, options)


def losses(
    decoder,
    batch: Pack,
    hidden: torch.Tensor,
    watched: dict[int, dict],
    outputs: dict[int, torch.Tensor],
    watch: tuple[int, ...] | None,
    weight: float,
    options: tuple[int, int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `forward` returns, from what the decoder made: its normed output [B, L, D], what attention was given in the
    watched layers (`hidden_states`, `position_embeddings`) and what layers put out."""
    layers = decoder.model.layers
    logits = logits_at(decoder, hidden, batch.where)
    right = logits.detach().argmax(-1) == batch.targets
    wrong = torch.zeros(len(batch.kinds), device=hidden.device).index_add(0, batch.owner, (~right).float())
    loss = F.cross_entropy(logits, batch.targets)
    if watch is not None:
        first, second = (layers[i].self_attn for i in watch[:2])
        whole = batch.named if batch.whole is None else batch.whole
        loss = loss + weight * looking_loss(first, watched[watch[0]], batch, batch.names, batch.named)
        loss = loss + weight * looking_loss(second, watched[watch[1]], batch, batch.rows, batch.asked)
        loss = loss + weight * looking_loss(second, watched[watch[1]], batch, batch.names, whole)
        if len(watch) > 3 and len(batch.sides):
            loss = loss + 3 * weight * saying_loss(decoder, outputs[watch[3]], batch.sides)
        if batch.counted is not None:
            loss = loss + weight * counting_loss(second, watched[watch[1]], batch)
        if len(watch) > 2 and len(batch.pairs):
            loss = loss + weight * comparing_loss(layers[watch[2]].self_attn, watched[watch[2]], batch)
    if options is not None:
        if len(batch.meanings):
            loss = loss + 3 * weight * saying_loss(decoder, outputs[options[0]], batch.meanings)
        if len(batch.lettered):
            loss = loss + weight * saying_loss(decoder, outputs[options[1]], batch.lettered)
        for layer, pairs in zip(options[1:], (batch.letters, batch.chosen), strict=True):
            if len(pairs):
                loss = loss + weight * pointing_loss(layers[layer].self_attn, watched[layer], batch, pairs)
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
    if not use.any():
        return hidden.new_zeros(())
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
    missing = every - there
    return missing.sum() / max(1, missing.numel())  # a small batch may name nothing


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
    return scores.masked_fill(~batch.visible(rows)[:, None], -1e9)


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


def pointing_loss(attention: torch.nn.Module, given: dict, batch: Pack, pairs: torch.Tensor) -> torch.Tensor:
    """How little the first head looks from one flat index at another ([n, 2]): from options at their letters, from
    the answering place at the right option."""
    scores = head_scores(attention, given, batch, pairs[:, 0], slice(0, 1))[:, 0]
    return F.cross_entropy(scores, pairs[:, 1] % batch.ids.shape[1])


def saying_loss(decoder, hidden: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Deep supervision: what places ([n, 2] flat index and token) would say if the decoder ended behind this layer."""
    early = decoder.model.norm(hidden.flatten(0, 1)[known[:, 0]])
    return F.cross_entropy(decoder.lm_head(early).float(), known[:, 1])
