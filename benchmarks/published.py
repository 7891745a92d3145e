"""AutoPrune the way the published code computes it: the same choices, with full attention maps. For comparison only.

Like the published code, and unlike `llava.pruning`:
- Every layer computes its attention explicitly, ``softmax(Q K^T / sqrt(D) + causal) V``, and keeps the map
  ``[1, H, N, N]`` until its pruning is decided; fused kernels are never used, whatever the model is set to. The softmax
  is in the type of the model, float16 or bfloat16 included.
- The causal mask is built in every layer, and position ids are cut and rotary tables picked by them in every layer.
- Scores and mutual information are slices of the map. Text rows are an index, from a similarity of text and visual
  embeddings that in effect rejects nothing.
- Counts live on the device, tokens are chosen by boolean masks: the host reads the device back in every layer.
- Recycled tokens are clustered by a ``[M, M, C]`` tensor of differences. The last layer prunes too.

What is not known of it is done in the plain way: keys and values of grouped-query attention are repeated, mutual
information is over all heads at once, one read for each count. Three things make it cheaper than the published code or
equal: tensors that it builds and does not use are left out, so is the random noise on the densities (with it the
choices would differ from run to run), and the search for the scale of the curve is the one of `llava.pruning`. Two are
not in the type of the model: mutual information is summed in float32, and CLS attention is given in it. Equal scores
are ordered by index.

In float32 the tokens that stay are those of `AutoPrune`, up to scores that differ by rounding alone; in half precision
the rounded map can shift both scores and the schedule.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.geometry import RandomPrompt
from llava import compat
from llava.pruning import AutoPrune, mutual_information
from llava.pruning.engine.recorder import decoder_shape
from llava.pruning.engine.trace import Trace
from llava.pruning.method import PruningMethod
from llava.pruning.methods.autoprune.curve import coarse_token_count, dynamic_slope, fit_to_budget, retention_curve
from llava.pruning.recycling import prune_step
from llava.utils import UserError

NAME = "autoprune published"


@dataclass(frozen=True)
class Published:
    """A setting of the benchmarks: this method, computed as the published code does."""

    method: AutoPrune


def add_published_argument(parser: argparse.ArgumentParser) -> None:
    """`--published`."""
    parser.add_argument(
        "--published", action="store_true",
        help="also measure autoprune as the published code computes it (full attention maps, batch size 1)",
    )  # fmt: skip


def with_published(settings: Mapping[tuple[str, int], Any], batch_sizes: Sequence[int]) -> dict[tuple[str, int], Any]:
    """The settings, each of autoprune followed by its published twin; `UserError` where there can be none."""
    if not any(name == AutoPrune.name for name, _ in settings):
        raise UserError(f"--published: needs {AutoPrune.name} among --methods")
    if set(batch_sizes) != {1}:
        raise UserError("--published: the published code takes one sample at a time; use --batch-sizes 1")
    both: dict[tuple[str, int], Any] = {}
    for (name, budget), method in settings.items():
        both[name, budget] = method
        if name == AutoPrune.name:
            both[NAME, budget] = Published(method)
    return both


def run_published(model: nn.Module, method: PruningMethod, prompt: RandomPrompt) -> tuple[Any, list[Trace]]:
    """One prefill of the decoder: its output (final hidden states and a filled cache) and the trace.

    Raises:
        UserError: another method than AutoPrune, options that the published code does not have, more than one sample,
            or anything but one image with text behind it.
    """
    _check(method, prompt)
    output, record = _prefill(model.model, method, prompt)
    return output, [_trace(model.model, method, prompt, record)]


def published_prefill(model: nn.Module, method: PruningMethod, prompt: RandomPrompt) -> Callable[[], Any]:
    """The prefill alone, for timing; raises like :func:`run_published`."""
    _check(method, prompt)
    return lambda: _prefill(model.model, method, prompt)[0]


def _check(method: PruningMethod, prompt: RandomPrompt) -> None:
    if not isinstance(method, AutoPrune):
        raise UserError(f"the published code is that of {AutoPrune.name}, not of {method.name}")
    options = {name: getattr(method, name) for name in ("target_tokens", "x0", "k0", "gamma")}
    if method != AutoPrune(**options):
        raise UserError(f"the published code has no other options than {', '.join(options)}; got {method}")
    if len(prompt.embeds_BNC) != 1:
        raise UserError(f"the published code takes one sample at a time, got {len(prompt.embeds_BNC)}")
    spans = prompt.layout.spans[0]
    if len(spans) != 1 or spans[0][1] >= prompt.tokens:
        raise UserError("the published code needs one block of visual tokens with text behind it")


@dataclass
class _Record:
    """What a prefill decided; nothing here is read from the device while it runs.

    Attributes:
        bits: mutual information of layers 0 and 1, summed over the heads.
        slope: of the curve; None until it is known.
        kept: per layer a mask ``[V]`` of the visual tokens that stay; None where all do.
        merged: per layer the merged tokens behind them.
        merge_flops: multiply-adds of clustering and merging.
    """

    bits: list[Tensor] = field(default_factory=list)
    slope: float | None = None
    kept: list[Tensor | None] = field(default_factory=list)
    merged: list[int] = field(default_factory=list)
    merge_flops: int = 0


def _prefill(decoder: nn.Module, method: AutoPrune, prompt: RandomPrompt) -> tuple[Any, _Record]:
    hidden = prompt.embeds_BNC
    ((start, end),) = prompt.layout.spans[0]
    visual = end - start
    coarse = coarse_token_count(visual, method.target_tokens, method.coarse_factor)
    positions = torch.arange(prompt.tokens, device=hidden.device)[None]
    tables = decoder.rotary_emb(hidden, positions)
    text = _text_rows(hidden[0, start:end], hidden[0, end:])
    cache, record = compat.new_cache(), _Record()
    for index, layer in enumerate(decoder.layers):
        hidden, attention = _run_layer(layer, index, hidden, positions, tables, cache)
        end = start + visual
        rows = attention[:, :, end + text, start:end]
        if index < 2:
            record.bits.append(mutual_information(rows, method.eps).sum())
        relevance = rows.mean(1).mean(1)[0]

        if index == 0:
            information = record.bits[0] / len(text)
            scores = method.text_weight * information * relevance + method.cls_weight * prompt.cls_BV[0]
            keep, recycled, merged = coarse, 0, 0
        else:
            if index == 1:
                record.slope = dynamic_slope(record.bits[1].item(), method.k0, method.gamma)
                curve = retention_curve(len(decoder.layers), record.slope, method.x0, method.amplitude)
                shares = fit_to_budget(curve, coarse, method.target_tokens, method.recycle_fraction)
                shares = torch.tensor(shares, dtype=torch.float32, device=hidden.device)
            scores = relevance
            keep = math.ceil(((coarse - 1) * shares[index - 1]).item())
            step = prune_step(visual, keep, method.recycle_fraction)
            keep, recycled, merged = step.keep, step.recycled, step.merged

        record.merged.append(merged)
        if keep == visual and index > 0:
            record.kept.append(None)
            continue
        order = scores.sort(descending=True, stable=True).indices
        kept = torch.zeros(visual, dtype=torch.bool, device=hidden.device)
        kept[order[:keep]] = True
        tokens = hidden[:, start:end]
        parts = [hidden[:, :start], tokens[:, kept]]
        if merged:
            parts.append(_merge(tokens[0, order[keep : keep + recycled]], merged)[None])
            record.merge_flops += (recycled + merged) * recycled * hidden.shape[2]
        hidden = torch.cat((*parts, hidden[:, end:]), dim=1)
        visual = kept.sum().item() + merged
        positions = positions[:, : hidden.shape[1]]
        record.kept.append(kept)
    return compat.BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden), past_key_values=cache), record


def _text_rows(visual_VC: Tensor, text_TC: Tensor) -> Tensor:
    """Indices of the text tokens that rate visual tokens: all of them, but the published code asks the device."""
    received = torch.softmax(visual_VC @ text_TC.T, dim=1).mean(0)
    return torch.where(received > -1)[0]


def _run_layer(
    layer: nn.Module, index: int, hidden: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor], cache: Any
) -> tuple[Tensor, Tensor]:
    """A decoder layer: hidden states ``[1, N, C]`` and its attention map ``[1, H, N, N]``."""
    attended, attention = _explicit_attention(
        layer.self_attn, index, layer.input_layernorm(hidden), positions, tables, cache
    )
    hidden = hidden + attended
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), attention


def _explicit_attention(
    module: nn.Module, index: int, hidden: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor], cache: Any
) -> tuple[Tensor, Tensor]:
    tokens = hidden.shape[1]
    heads = (1, tokens, -1, module.head_dim)
    queries, keys, values = (
        project(hidden).view(heads).transpose(1, 2) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    cos, sin = (table[0][positions][:, None] for table in tables)
    queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
    keys, values = cache.update(keys, values, index)
    if module.num_key_value_groups > 1:
        keys, values = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (keys, values))
    causal = torch.full((tokens, tokens), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu_(1)
    attention = torch.matmul(queries, keys.transpose(2, 3)) * module.scaling
    attention += causal
    attention = torch.softmax(attention, dim=-1)
    output = torch.matmul(attention, values).transpose(1, 2).reshape(1, tokens, -1)
    return module.o_proj(output), attention


def _rotate(states_BHND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's rotary embedding, tables ``[1, 1, N, D]``."""
    first, second = states_BHND.chunk(2, dim=-1)
    return states_BHND * cos + torch.cat((-second, first), dim=-1) * sin


def _merge(tokens_MC: Tensor, clusters: int) -> Tensor:
    """DPC-kNN: ``[clusters, C]`` means, as `llava.pruning.dpc_knn_merge` but in the type of the tokens and by the
    differences of all pairs.
    """
    count, channels = tokens_MC.shape
    distance = (tokens_MC[:, None] - tokens_MC[None]).norm(dim=2) / channels**0.5
    nearest = distance.topk(clusters, dim=1, largest=False).values
    density = torch.exp(-nearest.square().mean(1))
    denser = density[None, :] > density[:, None]
    parent = torch.where(denser, distance, distance.max()).amin(1)
    centers = (density * parent).sort(descending=True, stable=True).indices[:clusters]
    assignment = distance[centers].argmin(0)
    assignment[centers] = torch.arange(clusters, device=tokens_MC.device)
    sizes = tokens_MC.new_zeros(clusters).index_add_(0, assignment, tokens_MC.new_ones(count))
    weights = 1 / (sizes + 1e-6)
    return torch.zeros_like(tokens_MC[:clusters]).index_add_(0, assignment, tokens_MC * weights[assignment][:, None])


@dataclass
class _Trace(Trace):
    """A trace whose survivors come from this loop, not from the engine."""

    origins: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def kept(self) -> list[Tensor]:
        return [origins.cpu() for origins in self.origins]


def _trace(decoder: nn.Module, method: AutoPrune, prompt: RandomPrompt, record: _Record) -> Trace:
    (visual,) = prompt.layout.counts
    current = torch.arange(visual, device=prompt.embeds_BNC.device)
    counts, origins = [visual], []
    for kept, merged in zip(record.kept, record.merged, strict=True):
        if kept is not None:
            current = torch.cat((current[kept], current.new_full((merged,), -1)))
        counts.append(len(current))
        origins.append(current)
    text = prompt.tokens - prompt.layout.text_starts[0]
    information = {f"layer{layer}": bits.item() / (1 if layer else text) for layer, bits in enumerate(record.bits)}
    return _Trace(
        shape=decoder_shape(decoder, prompt.embeds_BNC.element_size()),
        text_tokens=prompt.tokens - visual,
        visual_tokens=visual,
        tokens_in=counts[:-1],
        tokens_out=counts[1:],
        details={"mutual_information": information, "slope": record.slope, "merge_flops": record.merge_flops},
        target_tokens=method.aim_of(visual),
        budget=method.budget_kind,
        origins=origins,
    )
