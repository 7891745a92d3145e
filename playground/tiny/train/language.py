"""Stage `language`: the decoder learns to answer about symbolic pictures, before any pixel is involved.

A visual token of an object is the sum of the word embeddings of its color, shape and word and of embeddings of its
place; curriculum on the number of objects; six layers first, then twelve (inserted layers start as the identity).
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from playground.tiny.train import guidance, packing, text
from playground.tiny.train.common import Log, autocast, save_state, train_rng
from playground.tiny.world import scenes
from playground.tiny.world.questions import KINDS, sample_questions

WIDTH = 128


def build_decoder(layers: int) -> LlamaForCausalLM:
    """A Llama decoder with random weights: width 128, four heads; word embeddings also serve the output for now."""
    config = LlamaConfig(
        vocab_size=text.VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=344,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    decoder = LlamaForCausalLM(config)
    for name, weight in decoder.named_parameters():
        if weight.dim() == 2:
            out = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.06 / (2 * layers) ** 0.5 if out else 0.06)
    for layer in decoder.model.layers[:3]:
        # Equal query and key projections: tokens attend to tokens of like content from the start, which is
        # half of binding ("star" finds the patches that contain a star).
        nn.init.normal_(layer.self_attn.q_proj.weight, std=0.1)
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    return decoder


def grow(decoder: LlamaForCausalLM) -> LlamaForCausalLM:
    """Twice the depth: an identity layer (zeroed output projections) behind every layer."""
    layers = len(decoder.model.layers)
    deep = build_decoder(2 * layers)
    state = {k: v for k, v in decoder.state_dict().items() if ".layers." not in k}
    deep.load_state_dict(state, strict=False)
    for i, layer in enumerate(decoder.model.layers):
        deep.model.layers[2 * i].load_state_dict(layer.state_dict())
        new = deep.model.layers[2 * i + 1]
        for weight in (new.self_attn.o_proj.weight, new.mlp.down_proj.weight):
            nn.init.zeros_(weight)
        for weight in (new.self_attn.q_proj.weight, new.self_attn.k_proj.weight):
            nn.init.normal_(weight, std=0.06)
    return deep


class Symbols(nn.Module):
    """Embeddings of symbolic visual tokens: [576, 6] attributes -> [576, 128]."""

    def __init__(self) -> None:
        super().__init__()
        single = lambda word: text.tokenizer()(word).input_ids[1:]  # noqa: E731
        ids = [[single(w) for w in words] for words in (scenes.COLORS, scenes.SHAPES, scenes.WORDS)]
        if any(len(i) != 1 for group in ids for i in group):
            raise AssertionError("every color, shape and word must be one token")
        for name, group in zip(("color", "shape", "word"), ids, strict=True):
            self.register_buffer(name, torch.tensor([0] + [i[0] for i in group]), persistent=False)
        self.row, self.col, self.center, self.ground = (nn.Embedding(n, WIDTH) for n in (7, 7, 2, 1))
        for table in (self.row, self.col, self.center, self.ground):
            nn.init.normal_(table.weight, std=0.06)

    @torch.no_grad()
    def tie(self, words: nn.Embedding) -> None:
        """Places start as directions between words (left to right, top to bottom), quoted words as plain ones."""
        place = lambda word: words.weight[text.tokenizer()(word).input_ids[1]]  # noqa: E731
        steps = torch.linspace(-1, 1, 7)[:, None]
        self.col.weight += steps * (place("right") - place("left"))
        self.row.weight += steps * (place("bottom") - place("top") + place("below") - place("above")) / 2**0.5
        for word in scenes.WORDS:
            (quoted,) = text.tokenizer().convert_tokens_to_ids([word])
            if quoted == text.tokenizer().unk_token_id:
                raise AssertionError(f"{word} in quotes must be one token")
            words.weight[quoted] = place(word)

    def forward(self, table: torch.Tensor, words: nn.Embedding) -> torch.Tensor:
        on = (table[..., 0] > 0)[..., None]
        named = (
            words(self.color[table[..., 0]])
            + words(self.shape[table[..., 1]])
            + words(self.word[table[..., 2]]) * (table[..., 2] > 0)[..., None]
        )
        placed = named + self.row(table[..., 3]) + self.col(table[..., 4]) + self.center(table[..., 5])
        return torch.where(on, placed, self.ground.weight[0])


def make_optimizers(decoder: nn.Module, others: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder layers, AdamW for everything else."""
    matrices = [p for n, p in decoder.named_parameters() if p.dim() == 2 and ".layers." in n]
    rest = [p for n, p in decoder.named_parameters() if not (p.dim() == 2 and ".layers." in n)] + others
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


BINDING = ("color", "shape", "word", "choose_color")
"""The questions that need binding most; trained first, because yes/no questions give little gradient before that."""


def symbolic_batch(
    rng: np.random.Generator, size: int, low: int, high: int, per_scene: int, kinds: tuple[str, ...]
) -> tuple:
    """Packed batch and attributes [B, 576, 6]; positions are compact until all kinds are in."""
    picked, tables, patches, questions, marks = [], [], [], [], []
    while len(tables) < size:
        scene = scenes.sample_scene(rng, low, high, held_out=False)
        asked = sample_questions(scene, rng, per_scene, kinds)
        if not asked:
            continue
        table = packing.attributes(scene)
        picked.append(scene)
        tables.append(table)
        questions.append(asked)
        marks.append([packing.asked_patches(scene, table, question) for question in asked])
        patches.append(packing.choose_patches(table, rng, rng.uniform(0.15, 0.7), int(rng.integers(4, 24))))
    data = packing.pack(patches, questions, (rng.random(size) < 0.5) & (len(kinds) > 4), marks)
    return guidance.guide(data, patches, picked, tables, questions), torch.from_numpy(np.stack(tables))


def train_language(
    folder: Path,
    minutes: float,
    batch: int = 16,
    per_scene: int = 12,
    resume: bool = False,
    rate: float = 1.0,
    grow_at: int = 5,
) -> None:
    """Train the decoder for `minutes`; writes `folder/language.pt` every 100 steps."""
    torch.manual_seed(2)
    high, deep, kinds = 3, False, BINDING
    if resume:
        state = torch.load(folder / "language.pt")
        high, kinds = state["high"], tuple(KINDS) if len(state["kinds"]) > 4 else state["kinds"]
        deep = state["layers"] == 12
        decoder, symbols = build_decoder(state["layers"]), Symbols()
        decoder.load_state_dict(state["decoder"])
        symbols.load_state_dict(state["symbols"])
    else:
        decoder, symbols = build_decoder(6), Symbols()
        symbols.tie(decoder.model.embed_tokens)
    rng, log = train_rng("language", int(time.time()) if resume else 0), Log("language")
    optimizers = make_optimizers(decoder, list(symbols.parameters()))
    peaks = [g["lr"] for o in optimizers for g in o.param_groups]
    scores: dict[str, float] = {}
    mean, start, step, since = 0.0, time.time(), 0, 0

    def save() -> None:
        save_state(
            folder / "language.pt",
            decoder=decoder.state_dict(),
            symbols=symbols.state_dict(),
            high=high,
            kinds=kinds,
            layers=len(decoder.model.layers),
            step=step,
        )

    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        data, tables = symbolic_batch(rng, batch, max(2, high - 3), high, per_scene, kinds)
        scale = rate * min(1.0, (since + 1) / (30 if resume else 100)) * min(1.0, max(0.05, (1 - progress) / 0.3))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        with autocast():
            pictures = symbols(tables, decoder.model.embed_tokens)
            pictures = pictures + 0.02 * torch.randn_like(pictures)
            loss, right = guidance.forward(decoder, data, pictures, (2, 4, 6, 8) if deep else (1, 2, 3, 4), 0.2)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, since = step + 1, since + 1
        by_kind = defaultdict(list)
        for kind, good in zip(data.kinds, right.tolist(), strict=True):
            by_kind[kind].append(good)
        for kind, good in by_kind.items():
            scores[kind] = 0.9 * scores.get(kind, 0.3) + 0.1 * float(np.mean(good))
        mean = 0.95 * mean + 0.05 * right.float().mean().item()
        if mean > 0.8 and len(kinds) == 4:
            kinds, mean = tuple(KINDS), 0.5
        elif mean > 0.82 and high < 6:
            high, mean = high + 1, 0.7
        if high >= grow_at and not deep:
            deep, decoder = True, grow(decoder)
            optimizers = make_optimizers(decoder, list(symbols.parameters()))
            since = 0
        if step % 25 == 0:
            log.write(
                step=step,
                seconds=round(time.time() - start),
                objects=high,
                layers=len(decoder.model.layers),
                loss=round(loss.item(), 4),
                right=round(mean, 3),
                length=data.ids.shape[1],
                **{k: round(v, 2) for k, v in sorted(scores.items())},
            )
        if step % 100 == 0:
            save()
    save()
