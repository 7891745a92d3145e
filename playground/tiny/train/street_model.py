"""The decoder's forward pass for the stage `drive`, and what guides it; none of the guidance exists at test time.

Visual tokens have to find out which view they belong to from what stands between pictures: a head of the first layer
counts it, one of the second finds the last of it. Behind the third layer a visual token must know what it shows, in
layers 3 to 5 nine heads must look from where an answer is decided at the thing of each fact (at BOS where there is
none), behind them that place must know the facts, and behind layer 8 the plan.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from playground.tiny.train import guidance, text
from playground.tiny.train.language import WIDTH
from playground.tiny.train.street_batches import FACTS, PACES, PATHS, SHOWN, TOPICS, VALUES, Batch
from playground.tiny.world.driving import CAMERAS, COMMANDS, SPEEDS

COUNTS, FINDS = 0, 1
"""Layers whose last head counts what stands between pictures, and finds the last of it."""
VIEWS, SHOWS, KNOWS, PLANS = 1, 2, 5, 8
"""Layers behind which visual tokens know their view and what they show, and the answer's place the facts and the
plan."""
LOOKS = (3, 4, 5)
PER_LAYER = 3


class Heads(nn.Module):
    """Throw-away linear heads on the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.view, self.shown = nn.Linear(WIDTH, len(CAMERAS)), nn.Linear(WIDTH, len(SHOWN))
        self.fact = nn.ModuleDict({name: nn.Linear(WIDTH, len(VALUES[name])) for name in FACTS})
        self.order = nn.ModuleList([nn.Linear(WIDTH, len(names)) for names in (COMMANDS, SPEEDS, TOPICS)])
        self.plan = nn.ModuleList([nn.Linear(WIDTH, len(PACES)), nn.Linear(WIDTH, len(PATHS))])


def normed(x: torch.Tensor, weight: torch.Tensor | float = 1.0, epsilon: float = 1e-5) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


class Forward:
    """One pass over a batch. Filled in: `logits` of answer tokens [n, V], `losses`, and `scores`, how often the heads
    are right."""

    def __init__(self, decoder: LlamaForCausalLM, heads: Heads, batch: Batch, guided: bool = True) -> None:
        self.decoder, self.heads, self.batch, self.guided = decoder, heads, batch, guided
        self.logits: torch.Tensor | None = None
        self.losses: dict[str, torch.Tensor] = {}
        self.scores: dict[str, float] = {}
        self.size, self.before = batch.ids.shape
        self.asked, self.behind = batch.tails.shape[1:]
        self.split = self.size * self.before

    def __call__(self, visual: torch.Tensor) -> torch.Tensor:
        """visual: [n, D], the visual tokens of the batch in its order. Returns whether each question is right.

        `losses["answer"]` is over answer tokens; the others guide.
        """
        batch, body = self.batch, self.decoder.model
        prefix = body.embed_tokens(batch.ids)
        rows, spots = torch.nonzero(batch.visual >= 0, as_tuple=True)
        prefix = prefix.index_put((rows, spots), visual.to(prefix.dtype))
        tails = body.embed_tokens(batch.tails)
        x = torch.cat([prefix.flatten(0, 1), tails.flatten(0, 2)])
        positions = torch.cat([batch.positions.flatten(), batch.tail_positions.flatten()])
        cos, sin = body.rotary_emb(x[None], positions[None])
        cos, sin = cos[0][:, None], sin[0][:, None]
        mask = self._mask()
        for i, layer in enumerate(body.layers):
            x = x + self._attention(i, layer, normed(x, layer.input_layernorm.weight), cos, sin, mask)
            x = x + layer.mlp(normed(x, layer.post_attention_layernorm.weight))
            self._know(i, x)
        tail = normed(x[self.split :], body.norm.weight)
        self.logits = logits = self.decoder.lm_head(tail[batch.where]).float()
        self.losses["answer"] = F.cross_entropy(logits, batch.targets, reduction="sum") / (3 * len(batch.kinds))
        wrong = torch.zeros(len(batch.kinds), device=x.device)
        return wrong.index_add(0, batch.owner, (logits.detach().argmax(-1) != batch.targets).float()) == 0

    def _mask(self) -> torch.Tensor | None:
        if self.batch.full:
            return None
        order = torch.arange(self.before, device=self.batch.ids.device)
        causal = torch.zeros(self.before, self.before, device=order.device)
        causal = causal.masked_fill(order[None] > order[:, None], -torch.inf)
        mask = causal + self.batch.bias[:, None]
        mask.diagonal(dim1=1, dim2=2).clamp_(min=-1e9)  # rows of padding look at something
        return mask[:, None]

    def _attention(self, number: int, layer: nn.Module, h: torch.Tensor, cos, sin, mask) -> torch.Tensor:
        own, batch = layer.self_attn, self.batch
        width = own.head_dim
        many = own.q_proj.out_features // width
        shaped = (len(h), many, width)
        query = guidance.rotate(own.q_proj(h).view(shaped), cos, sin)
        key = guidance.rotate(own.k_proj(h).view(shaped), cos, sin)
        value = own.v_proj(h).view(shaped)
        front = (self.size, self.before, many, width)
        q, k, v = (t[: self.split].view(front).transpose(1, 2) for t in (query, key, value))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        if self.guided and not batch.full:
            self._find_views(number, q, k, mask, width)
        q_t, k_t, v_t = (
            t[self.split :].view(self.size, self.asked, self.behind, many, width).permute(0, 3, 1, 2, 4)
            for t in (query, key, value)
        )
        scale = width**-0.5
        to_front = (q_t.reshape(self.size, many, -1, width) * scale) @ k.mT + batch.bias[:, None, None]
        order = torch.arange(self.behind, device=h.device)
        among = (q_t * scale) @ k_t.mT
        among = among.masked_fill(order[None] > order[:, None], -torch.inf)
        scores = torch.cat([to_front, among.reshape(*to_front.shape[:3], self.behind)], -1)
        if self.guided and number in LOOKS:
            self._look(number, scores)
        share = scores.softmax(-1)
        told = share[..., : self.before] @ v
        told = told.view(q_t.shape) + share[..., self.before :].reshape(among.shape) @ v_t
        seen = seen.transpose(1, 2).reshape(self.split, -1)
        return own.o_proj(torch.cat([seen, told.permute(0, 2, 3, 1, 4).reshape(len(h) - self.split, -1)]))

    def _find_views(self, number: int, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, width: int) -> None:
        """The last head of two layers: evenly at BOS and all that stands between pictures; at the last of it."""
        if number not in (COUNTS, FINDS):
            return
        batch, order = self.batch, torch.arange(self.before, device=q.device)
        scores = (q[:, -1] * width**-0.5) @ k[:, -1].mT + mask[:, 0]
        gaps = (batch.visual < 0) & (batch.bias == 0) & (order >= len(text.head_ids()))
        anchors = gaps | (order == 0)
        seen = anchors[:, None] & (order[None] <= order[:, None])
        if number == FINDS:
            last = torch.where(seen, order, -1).max(-1).values
            seen = order == last[..., None]
        target = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        rows = (batch.visual >= 0) | gaps if number == COUNTS else batch.visual >= 0
        logs = scores.masked_fill(scores == -torch.inf, -1e9).log_softmax(-1)
        self.losses[f"view{number}"] = -(target * logs).sum(-1)[rows].mean()

    def _look(self, number: int, scores: torch.Tensor) -> None:
        """Three heads of a layer, from where answers are decided, at the things of three facts or at BOS."""
        batch = self.batch
        first = PER_LAYER * LOOKS.index(number)
        street = batch.rows // (self.asked * self.behind)
        rows = scores[street, :PER_LAYER, batch.rows % (self.asked * self.behind)]
        wanted = batch.marks[street, first : first + PER_LAYER]
        there = rows[..., : self.before].masked_fill(~wanted, -1e9).logsumexp(-1)
        self.losses[f"look{number}"] = (rows.logsumexp(-1) - there).mean()

    def _know(self, number: int, x: torch.Tensor) -> None:
        batch, heads = self.batch, self.heads
        if number in (VIEWS, SHOWS):
            visual = (batch.visual >= 0).flatten()
            here = normed(x[: self.split][visual])
            if number == VIEWS:
                self._classify("view", heads.view(here), batch.views.flatten()[visual])
            else:
                weight = torch.ones(len(SHOWN), device=x.device)
                weight[0] = 0.2
                self._classify("shown", heads.shown(here), batch.shown.flatten()[visual], weight)
        if number in (KNOWS, PLANS):
            here = normed(x[self.split :][batch.rows])
            if number == KNOWS:
                for i, name in enumerate(FACTS):
                    self._classify(name, heads.fact[name](here), batch.facts[:, i])
            for name, known, own in (("order", batch.orders, heads.order), ("plan", batch.plans, heads.plan)):
                if (name == "order") == (number == KNOWS) and (known >= 0).any():
                    for i, head in enumerate(own):
                        self._classify(f"{name}{i}", head(here), known[:, i])

    def _classify(self, name: str, logits: torch.Tensor, known: torch.Tensor, weight=None) -> None:
        if (known >= 0).sum() == 0:
            return
        self.losses[name] = F.cross_entropy(logits.float(), known, weight=weight)
        use = known >= 0
        self.scores[name] = (logits.detach().argmax(-1)[use] == known[use]).float().mean().item()


WEIGHTS = {"answer": 1.0, "view": 0.5, "shown": 0.5, "view0": 0.2, "view1": 0.2}


def total(losses: dict[str, torch.Tensor], guide: float) -> torch.Tensor:
    """The sum, the guiding losses with a factor."""
    parts = [losses["answer"]]
    for name, loss in losses.items():
        if name != "answer":
            parts.append(guide * WEIGHTS.get(name, 0.15) * loss)
    return torch.stack(parts).sum()
