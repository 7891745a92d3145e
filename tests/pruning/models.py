"""Tiny random decoders and a slow oracle for the engine tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava.pruning import VisualLayout


def random_llama(attention: str = "sdpa", layers: int = 6, kv_heads: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """Random Llama with peaked attention: default initialization would make all scores nearly equal."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=97,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(18)
            elif "norm" not in name:
                weight.mul_(3)
    return model


class Batch:
    """Samples of different make-up, alone and together: text, spans of visual tokens, left padding."""

    # (prefix, visual, text between, visual, ..., text) lengths; visual ones at odd places
    SAMPLES = ((4, 48, 7), (2, 30, 3, 20, 9), (6, 40, 12), (0, 25, 4), (11,))

    def __init__(self, model, samples=SAMPLES, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = model.config.hidden_size
        self.embeds, self.spans, self.cls, self.facts = [], [], [], []
        for parts in samples:
            self.embeds.append(torch.randn(sum(parts), width, generator=generator))
            spans, start = [], 0
            for place, length in enumerate(parts):
                if place % 2:
                    spans.append((start, start + length))
                start += length
            self.spans.append(spans)
            count = sum(e - s for s, e in spans)
            self.cls.append(torch.rand(count, generator=generator) / 50)
            # What vision methods ask for, under their names.
            self.facts.append(
                {
                    "keys": torch.randn(count, 8, generator=generator),
                    **{name: torch.rand(count, generator=generator) ** 4 for name in ("cls", "object", "deep")},
                }
            )
        for facts in self.facts:  # drawn last: the rest stays as it was
            facts["local"] = torch.rand(len(facts["cls"]), generator=generator) ** 4
        for facts in self.facts:
            facts["importance"] = torch.rand(len(facts["cls"]), generator=generator) ** 4

    def __len__(self) -> int:
        return len(self.embeds)

    def alone(self, row: int) -> dict:
        return {
            "embeds": self.embeds[row][None],
            "mask": None,
            "layout": VisualLayout.from_spans([self.spans[row]]),
            "cls": [self.cls[row]],
            "facts": _by_name([self.facts[row]]),
        }

    def together(self, rows, tell_lengths: bool = False) -> dict:
        width = max(len(self.embeds[row]) for row in rows)
        embeds = torch.zeros(len(rows), width, self.embeds[0].shape[1])
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        spans = []
        lengths = [len(self.embeds[row]) for row in rows] if tell_lengths else None
        for place, row in enumerate(rows):
            shift = width - len(self.embeds[row])
            embeds[place, shift:] = self.embeds[row]
            mask[place, shift:] = 1
            spans.append([(start + shift, end + shift) for start, end in self.spans[row]])
        return {
            "embeds": embeds,
            "mask": mask,
            "layout": VisualLayout.from_spans(spans, lengths),
            "cls": [self.cls[row] for row in rows],
            "facts": _by_name([self.facts[row] for row in rows]),
        }


def _by_name(rows: list[dict]) -> dict[str, list[torch.Tensor]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def generate(model, method, inputs: dict, new_tokens: int = 6, **kwargs):
    """Run ``method`` on ``inputs``: returns ``(sequences, logits [B, new, vocab], traces)``."""
    with method.attach(model) as run, torch.no_grad():
        run.set_visual(inputs["layout"], inputs["cls"], facts=inputs.get("facts"))
        mask = inputs["mask"]
        if mask is None:
            mask = torch.ones(inputs["embeds"].shape[:2], dtype=torch.long)
        output = model.generate(
            inputs_embeds=inputs["embeds"],
            attention_mask=mask,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            **{"do_sample": False, **kwargs},
        )
    return output.sequences, torch.stack(output.logits, 1), run.traces


@torch.no_grad()
def masked_oracle(
    model, embeds: torch.Tensor, spans, kept, new_tokens: int, before_decoder=None, compact: bool = False
) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding of one sample that keeps every token and masks the dropped ones from their layer on.

    No cache, no gathers: every step recomputes the whole sequence with one mask per layer. Positions are untouched or,
    with ``compact``, count the tokens that are left in the layer.
    ``kept[l]`` are the visual indices that leave layer l; they are what layer l + 1 may see. Layer 0 may see those in
    ``before_decoder``, by default all.
    """
    decoder = model.model
    visual = torch.tensor([slot for start, end in spans for slot in range(start, end)], dtype=torch.long)
    sequence = embeds[None]
    tokens, logits = [], []
    for _ in range(new_tokens):
        length = sequence.shape[1]
        rotary = decoder.rotary_emb(sequence, torch.arange(length)[None])
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        hidden = sequence
        alive = torch.ones(length, dtype=torch.bool)
        if before_decoder is not None:
            alive[visual] = False
            alive[visual[before_decoder]] = True
        for index, layer in enumerate(decoder.layers):
            allowed = causal & alive[None, :]
            # A dropped token may see itself: its output is never used, but it must not become NaN.
            allowed = allowed | torch.eye(length, dtype=torch.bool)
            mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
            if compact:
                rotary = decoder.rotary_emb(sequence, (alive.cumsum(0) - 1).clamp_min(0)[None])
            hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
            alive = torch.ones(length, dtype=torch.bool)
            alive[visual] = False
            alive[visual[kept[index]]] = True
        step = model.lm_head(decoder.norm(hidden)[:, -1])
        logits.append(step[0])
        tokens.append(int(step.argmax()))
        sequence = torch.cat((sequence, decoder.embed_tokens(step.argmax(-1))[:, None]), dim=1)
    return tokens, torch.stack(logits)
