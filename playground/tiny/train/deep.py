"""Stage `deep`: a decoder of 32 layers, grown from the shipped one of 12, learns both kinds of scenes.

The layers it has are spread over the depth and layers that change nothing are put between them, so that the deep
decoder starts with exactly the answers of the shallow one. Text looks at the picture in the middle layers: names find
what they name in layer 10, the answering place finds what is asked about in layer 14, and compares in layer 18.

Runs on a GPU with the layers compiled, or on the CPU; everything it needs to go on is written every few minutes.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from playground.tiny.train import crowd, guidance, packing
from playground.tiny.train.common import Log, follow, save_state
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.language import build_decoder
from playground.tiny.train.muon import BatchedMuon
from playground.tiny.train.sight import adam, on_object, seeing_losses
from playground.tiny.train.vision import HEADS, attention_loss, normalize, run_tower

LAYERS = 32
PLACES = (0, 5, 10, 12, 14, 16, 18, 20, 22, 25, 28, 31)
"""Where the layers of the shallow decoder go."""
WATCH, OPTIONS = (10, 14, 18, 22), (5, 18, 25)
"""Guided layers (`guidance.forward`): the places of layers 2, 4, 6, 8 and 1, 6, 9, which are guided in the shallow
decoder."""
STATE, WEIGHTS = "deep.pt", "deep_weights.pt"


def deepen(decoder: LlamaForCausalLM, layers: int = LAYERS, places: tuple[int, ...] = PLACES) -> LlamaForCausalLM:
    """The same function with more layers: new ones between the old add nothing, because what they put out is zero."""
    deep = build_decoder(layers)
    deep.load_state_dict({k: v for k, v in decoder.state_dict().items() if ".layers." not in k}, strict=False)
    for layer in deep.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            nn.init.zeros_(weight)
    for place, layer in zip(places, decoder.model.layers, strict=True):
        deep.model.layers[place].load_state_dict(layer.state_dict())
    return deep


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def layer_forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """One Llama layer on rows whose questions begin at one place.

    Args:
        x: residual stream [B, L, D]; weights: of both norms and of q, k, v, o, gate, up, down; cos, sin: [B, L, d].
        bias: what the last T places may look at, 0 or very negative, [B, 1, T, L]; the places before are causal.
    """
    before, after, *matrices = weights
    kind = bias.dtype
    q, k, v, o, gate, up, down = (w.to(kind) for w in matrices)
    batch, length, width = x.shape
    prefix = length - bias.shape[2]
    split = (batch, length, width // cos.shape[-1], cos.shape[-1])
    h = _normed(x, before, epsilon).to(kind)
    cos, sin = cos[:, None], sin[:, None]
    query = guidance.rotate(F.linear(h, q).view(split).transpose(1, 2).float(), cos, sin).to(kind)
    key = guidance.rotate(F.linear(h, k).view(split).transpose(1, 2).float(), cos, sin).to(kind)
    value = F.linear(h, v).view(split).transpose(1, 2)
    first = F.scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True
    )
    last = F.scaled_dot_product_attention(query[:, :, prefix:], key, value, attn_mask=bias.expand(-1, split[2], -1, -1))
    x = x + F.linear(torch.cat([first, last], 2).transpose(1, 2).reshape(batch, length, width), o).float()
    h = _normed(x, after, epsilon).to(kind)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down).float()


def layer_weights(layer: nn.Module) -> list[torch.Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    modules = (layer.input_layernorm, layer.post_attention_layernorm)
    modules += (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    modules += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return [module.weight for module in modules]


class Runner:
    """The decoder's forward pass for training, by one function per layer that can be compiled once for all of them."""

    def __init__(self, kind: torch.dtype, compiled: bool) -> None:
        self.kind = kind
        self.layer = torch.compile(layer_forward, dynamic=False) if compiled else layer_forward

    def __call__(
        self, decoder: LlamaForCausalLM, batch: packing.Pack, pictures: torch.Tensor, weight: float = 0.1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and right answers, as `guidance.forward` with WATCH and OPTIONS."""
        epsilon = decoder.config.rms_norm_eps
        x = packing.embed(decoder, batch, pictures).float()
        cos, sin = decoder.model.rotary_emb(x, batch.positions)
        length = x.shape[1]
        tails = torch.arange(length * len(x), device=x.device).view(len(x), length)[:, batch.prefix :].reshape(-1)
        seen = batch.visible(tails).view(len(x), 1, -1, length)
        bias = torch.zeros(seen.shape, dtype=self.kind, device=x.device).masked_fill(~seen, -1e9)
        watched: dict[int, dict] = {}
        outputs: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(decoder.model.layers):
            if i in (*WATCH[:3], *OPTIONS[1:]):
                normed = _normed(x, layer.input_layernorm.weight, epsilon)
                watched[i] = {"hidden_states": normed, "position_embeddings": (cos, sin)}
            x = self.layer(x, layer_weights(layer), cos, sin, bias, epsilon)
            if i in (WATCH[3], *OPTIONS[:2]):
                outputs[i] = x
        hidden = _normed(x, decoder.model.norm.weight, epsilon)
        return guidance.losses(decoder, batch, hidden, watched, outputs, WATCH, weight, OPTIONS)


def make_optimizers(model: TinyLlava) -> list:
    """Muon for the matrices of the layers, AdamW for what else the decoder has, the projector, tower with heads."""
    named = list(model.decoder.named_parameters())
    inner = lambda name, p: p.dim() == 2 and ".layers." in name  # noqa: E731
    return [
        BatchedMuon([p for n, p in named if inner(n, p)]),
        torch.optim.AdamW([p for n, p in named if not inner(n, p)], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.AdamW(model.projector.parameters(), lr=1e-3, betas=(0.9, 0.98)),
        adam([*model.tower.parameters(), *model.heads.parameters()], 1e-3),
    ]


def rates(progress: float, since: int, rate: float, seeing: float) -> list[float]:
    """Factors on the learning rates of the four optimizers: warm-up of 100 steps, then a straight line to almost zero;
    the tower comes to rest when `seeing` of the time is over."""
    decoder = rate * min(1.0, (since + 1) / 100) * max(0.02, 1 - progress)
    return [decoder] * 3 + [min(1.0, (since + 1) / 100) * max(0.0, 1 - progress / seeing)]


def save(path: Path, model: TinyLlava, optimizers: list, **values: object) -> None:
    save_state(path, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], layers=LAYERS, **values)


def start(shallow: TinyLlava, sight: dict | None) -> TinyLlava:
    """The deep model that a run begins with; `sight`: what stage `sight` left."""
    model = TinyLlava(LAYERS)
    model.decoder = deepen(shallow.decoder)
    model.tower.load_state_dict(shallow.tower.state_dict())
    model.projector.load_state_dict(shallow.projector.state_dict())
    if sight is not None:
        model.tower.load_state_dict(sight["tower"])
        model.heads.load_state_dict(sight["heads"])
    return model


def train_deep(
    model: TinyLlava,
    folder: Path,
    minutes: float,
    batch: int = 4,
    rate: float = 0.5,
    device: str = "cpu",
    workers: int = 0,
    compiled: bool = False,
    stop_after: float = 1e9,
    seeing: float = 0.5,
    run: int = 0,
    precise: bool = False,
) -> None:
    """Train for `minutes` in all, however many runs they are spread over; `folder/deep.pt` has all that a run needs to
    go on, `folder/deep_weights.pt` the weights alone in fp16, and both are written every two minutes.

    Args:
        stop_after: seconds after which this run ends; the next goes on from there.
        seeing: share of the time during which the tower learns too (by the losses of the heads only).
        run: number of the run; chooses the random stream.
        precise: fp32 instead of bf16.
    """
    torch.manual_seed(90 + run)
    path, log, batches = folder / STATE, Log("deep", folder), crowd.feed(batch, run, workers)
    model.to(device).train()
    optimizers = make_optimizers(model)
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    spent, step = 0.0, 0
    if path.is_file():
        state = torch.load(path, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        spent, step = state["spent"], state["step"]
    kind = torch.float32 if precise else torch.bfloat16
    runner = Runner(kind, compiled)
    scores: dict[str, float] = {}
    began, since, saved_at, mean = time.time(), 0, time.time(), 0.0

    def keep() -> None:
        seconds = spent + time.time() - began
        save(path, model, optimizers, spent=seconds, step=step)
        half = {name: value.half().cpu() for name, value in model.state_dict().items()}
        save_state(folder / WEIGHTS, model=half, layers=LAYERS)

    said = (1, 5, 10, 20)
    while (progress := (spent + time.time() - began) / (60 * minutes)) < 1 and time.time() - began < stop_after:
        pixels, labels, data = next(batches)
        data = data.to(device)
        for optimizer, peak, factor in zip(optimizers, peaks, rates(progress, since, rate, seeing), strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        with torch.autocast(device, dtype=torch.bfloat16, enabled=not precise):
            sees = progress < seeing
            with torch.set_grad_enabled(sees):
                features, attention, _ = run_tower(model.tower, normalize(pixels.to(device)))
                shown = dict(zip(HEADS, labels.to(device).long().unbind(1), strict=True))
                saying = since + 1 in said or (since + 1) % 50 == 0
                dense, seen = seeing_losses(model.heads, features, shown, saying)
                dense = dense + 0.3 * attention_loss(attention, on_object(shown))
            loss, right = runner(model.decoder, data, model.projector(features.detach()))
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + dense if sees else loss).backward()
        nn.utils.clip_grad_norm_([*model.decoder.parameters(), *model.projector.parameters()], 1.0)
        if sees:
            nn.utils.clip_grad_norm_([*model.tower.parameters(), *model.heads.parameters()], 1.0)
        for optimizer in optimizers if sees else optimizers[:3]:
            optimizer.step()
        step, since = step + 1, since + 1
        if since % 5 == 1:
            follow(scores, data.kinds, right.tolist())
            mean = right.float().mean().item() if since == 1 else 0.9 * mean + 0.1 * right.float().mean().item()
        if saying:
            log.write(
                step=step,
                seconds=round(spent + time.time() - began),
                here=round(time.time() - began, 1),
                loss=round(loss.item(), 4),
                right=round(mean, 3),
                **{"see_" + k: round(v.item(), 3) for k, v in seen.items()},
                **{k: round(v, 2) for k, v in sorted(scores.items())},
            )
        if time.time() - saved_at > 120:
            keep()
            saved_at = time.time()
    keep()
