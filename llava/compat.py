"""The only file that touches names of transformers (and accelerate) that have changed between releases.

Written for transformers 5.17 to 5.x. The engine asks for masks, caches and the decoder through these functions.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

__all__ = [
    "AttentionWatch",
    "BaseModelOutputWithPast",
    "Decoder",
    "TowerWatch",
    "answer_length",
    "cache_layers",
    "cached_keys",
    "cached_length",
    "causal_mask",
    "check_cache",
    "execution_device",
    "fill_cache",
    "find_decoder",
    "forked_cache",
    "new_cache",
    "has_axes",
    "keys_values",
    "one_token_masks",
    "rotary_is_static",
    "rotary_tables",
    "visible_tokens",
    "with_keys_values",
]


class Decoder(Protocol):
    """What the engine uses of a Llama-like decoder; a module, whose attributes torch types as `Tensor | Module`."""

    config: Any
    layers: Sequence[Any]
    norm: Callable[[Tensor], Tensor]
    rotary_emb: Any
    embed_tokens: Callable[[Tensor], Tensor]
    training: bool
    forward: Callable[..., Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, (distributed) data parallelism and PEFT's adapters; itself if it is in none."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):  # transformers' models have the first
            model = cast(Any, model).get_base_model()
        else:
            return model


def find_decoder(model: nn.Module) -> Decoder:
    """The module that holds the decoder layers of ``model`` (itself, if it is one).

    Raises:
        TypeError: there is no Llama-like decoder inside.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    missing = [name for name in ("layers", "norm", "rotary_emb", "embed_tokens") if not hasattr(decoder, name)]
    if missing:
        raise TypeError(f"{type(model).__name__} has no Llama-like decoder: {type(decoder).__name__} lacks {missing}")
    return cast(Decoder, decoder)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: its weights' device, or the one accelerate moves them to when they are offloaded."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(module.parameters()).device


def causal_mask(
    config, hidden: Tensor, padding_mask: Tensor | None, cache: Cache | None = None, layer: int | None = None
) -> Tensor | None:
    """Causal mask in the form that the attention implementation of ``config`` expects; None where it needs none.

    Args:
        config: configuration of the decoder.
        hidden: ``[B, Q, C]``, for shape, dtype and device.
        padding_mask: bool ``[B, K]`` over all keys, True for real tokens; None if no row is padded.
        cache: keys already there; None for a prefill.
        layer: which cache layer sizes the mask. Layers of a pruned cache differ in length, and without this argument
            transformers sizes every mask by layer 0.
    """
    # Position ids are left out on purpose: gaps in them would be read as several packed sequences.
    mask = create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=padding_mask,
        past_key_values=cache,
        position_ids=None,
        layer_idx=layer,
        # To see whether nothing is padded it would read the mask back, in every layer. Our masks always hide something.
        allow_is_causal_skip=padding_mask is None,
    )
    return cast("Tensor | None", mask)


def one_token_masks(config, real: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Masks of one new token per row that looks at all keys but padding; the first columns are masks of fewer keys.

    Args:
        config: configuration of the decoder.
        real: bool ``[.., B, K]``, True for real tokens; something is hidden in every ``[B, K]``.
        dtype: of queries and keys.

    Returns:
        ``[.., B, 1, 1, K]`` of that type, or bool ``[.., B, K]``, as :func:`causal_mask` would make them. None if the
        attention implementation wants something that is not known here.
    """
    interface = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if interface is flash_attention_mask:
        return real
    # sdpa takes bool too, but then makes this of it, in every layer.
    hidden = {sdpa_mask: -torch.inf, eager_mask: torch.finfo(dtype).min}.get(interface)
    if hidden is None or not getattr(config, "is_causal", True):
        return None
    return torch.where(real, torch.zeros((), dtype=dtype, device=real.device), hidden)[..., None, None, :]


def rotary_is_static(rotary: nn.Module) -> bool:
    """Whether the rotary tables of a position are the same however long the sequence is."""
    return getattr(rotary, "rope_type", None) in ("default", "linear", "llama3", "yarn")


def has_axes(decoder: Any) -> bool:
    """Whether the decoder counts positions along several axes (time, height, width: M-RoPE)."""
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    return hasattr(decoder.rotary_emb, "mrope_section") or "mrope_section" in rope


def rotary_tables(decoder: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B, N, D]`` of positions ``[B, N]``, or ``[B, N, axes]`` where they have several axes."""
    if positions.ndim == 3:
        positions = positions.movedim(-1, 0)
    elif has_axes(decoder):
        positions = positions[None].expand(3, -1, -1)
    return cast(tuple[Tensor, Tensor], decoder.rotary_emb(hidden, positions))


def visible_tokens(attention_mask, batch: int, width: int) -> tuple[int, ...]:
    """Real tokens per row of a prefill, of a mask in any form that transformers takes.

    Forms: None, ``[B, N]`` of ones and zeros, ``[B or 1, heads, N, N]`` bool or added to the logits, or a dictionary of
    these by type of layer. A form that is not known here counts all tokens.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("full_attention")
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        last = attention_mask[:, 0, -1, -width:]  # the last token sees all that is real
        attention_mask = (last if last.dtype == torch.bool else last == 0).expand(batch, -1)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return (width,) * batch
    return tuple(attention_mask.bool().sum(1).tolist())


def new_cache() -> DynamicCache:
    """An empty cache whose layers may grow to different lengths."""
    return DynamicCache()


DYNAMIC_CACHES = (None, "dynamic", "dynamic_full")
"""Values of ``cache_implementation`` that give every layer a length of its own."""


def check_cache(cache: Cache) -> None:
    """Refuse caches whose layers cannot hold different lengths.

    Raises:
        ValueError: static, sliding-window or quantized cache.
    """
    layers = getattr(cache, "layers", [])
    if getattr(cache, "offloading", False):
        raise ValueError("a cache that is offloaded cannot be used with pruning; leave cache_implementation unset")
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or [type(cache).__name__]
        raise ValueError(
            f"visual token pruning needs a plain DynamicCache, got {type(cache).__name__} ({', '.join(kinds)}): with "
            "pruning every layer has a cache length of its own; leave cache_implementation unset"
        )


def cache_layers(cache: Cache) -> list[Any]:
    """What a cache holds, layer by layer."""
    return cache.layers


def keys_values(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer of a cache."""
    return layer.keys, layer.values


def with_keys_values(layer: Any, keys: Tensor, values: Tensor) -> Any:
    """A layer of a cache like this one, with other keys and values."""
    later = copy.copy(layer)
    later.keys, later.values = keys, values
    return later


def fill_cache(cache: Cache, layers: list[Any]) -> None:
    """Give an empty cache the layers of another one."""
    cache.layers[:] = layers


def forked_cache(cache: Cache) -> Cache:
    """Another cache with the same keys and values so far; it grows without the first one."""
    later = copy.copy(cache)
    later.layers = [copy.copy(layer) for layer in cache.layers]
    return later


def cached_keys(cache: Cache, layer: int) -> Tensor:
    """Keys of one layer after rotary embedding, ``[B, key heads, N, D]``."""
    keys = cache.layers[layer].keys
    assert keys is not None  # of a layer that has been run
    return keys


def cached_length(cache: Cache | None, layer: int = 0) -> int:
    """Tokens in one cache layer, padding included."""
    # Asked of the layer: the cache itself may answer with the length of the prompt, see `answer_length`.
    layers = getattr(cache, "layers", None)
    if layers is None:
        return 0 if cache is None else cache.get_seq_length(layer)
    return layers[layer].get_seq_length() if layer < len(layers) else 0


def answer_length(cache: Cache, dropped: int) -> None:
    """Let a cache whose first layer lacks ``dropped`` tokens answer with what was read.

    ``generate`` asks it so, without a layer, for how much of a conversation is new, and counts positions from it; masks
    are made by the lengths of layers.
    """
    cache.get_seq_length = partial(_length_read, cache, dropped)  # type: ignore[method-assign]


def _length_read(cache: Cache, dropped: int, layer_idx: int | None = None) -> int:
    return cached_length(cache) + dropped if layer_idx is None else cached_length(cache, layer_idx)


class AttentionWatch:
    """Context in which attention modules show what they attend with, each once: in its next call, a prefill.

    ``see(module, query_BHND, key_BGND, value_BGND)`` gets them after rotary embedding, right in front of the module's
    own attention function, whichever implementation that is. It may return what the last T tokens attend to,
    ``[B, T, H, D]``; the module's own function is then asked for the others only.

    A module looks its attention function up in its own configuration. For one call it has a copy that names ours,
    which gives it the real one back (kernels look at it, too) and goes on with the real function.
    """

    def __init__(self, modules: Iterable[nn.Module], see: Callable[..., Tensor | None]) -> None:
        self.see = see
        self._own = {module: module.config for module in modules}
        self._copies: dict[int, Any] = {}

    def __enter__(self) -> AttentionWatch:
        for module, own in self._own.items():
            if id(own) not in self._copies:
                shown = copy.copy(own)
                shown.__dict__.update(_attn_implementation_internal=_SHOWN, _attention_watch=self)
                self._copies[id(own)] = shown
            module.config = self._copies[id(own)]
        return self

    def __exit__(self, *exc) -> None:
        for module, own in self._own.items():
            module.config = own

    def own_config(self, module: nn.Module):
        """The module's real configuration."""
        return self._own[module]


_SHOWN = "llava_shown_attention"


def _shown_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    watch = module.config._attention_watch
    module.config = watch.own_config(module)
    names = vars(sys.modules[type(module).__module__])
    own = names["ALL_ATTENTION_FUNCTIONS"].get_interface(
        module.config._attn_implementation, names["eager_attention_forward"]
    )
    done = watch.see(module, query, key, value)
    if done is None or not (attention_mask is None or getattr(attention_mask, "ndim", None) == 4):
        return own(module, query, key, value, attention_mask, **kwargs)
    rest = query.shape[2] - done.shape[1]  # causal: what these tokens see ends with the last of them
    query, key, value = (states[:, :, :rest] for states in (query, key, value))
    mask = None if attention_mask is None else attention_mask[..., :rest, :rest]
    output, weights = own(module, query, key, value, mask, **kwargs)
    return torch.cat((output, done), dim=1), weights


AttentionInterface.register(_SHOWN, _shown_attention)


class TowerWatch:
    """Context in which attention modules of a vision tower show what they attend with, in every call.

    ``see(module, query_NHTD, key_NHTD, attention_mask)`` gets queries and keys as the attention function does, behind
    norms and rotary embedding. What the modules compute does not change.
    """

    def __init__(self, modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor, Tensor, Any], None]) -> None:
        self.see = see
        self._own = {module: module.config for module in modules}

    def __enter__(self) -> TowerWatch:
        for module, own in self._own.items():
            shown = copy.copy(own)
            shown.__dict__.update(_attn_implementation_internal=_WATCHED, _tower_watch=self)
            module.config = shown
        return self

    def __exit__(self, *exc: object) -> None:
        for module, own in self._own.items():
            module.config = own  # type: ignore[assignment]

    def own_config(self, module: nn.Module) -> Any:
        """The module's real configuration."""
        return self._own[module]


_WATCHED = "llava_watched_tower"


def _watched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
):
    shown = module.config
    watch = shown._tower_watch
    module.config = watch.own_config(module)
    try:
        names = vars(sys.modules[type(module).__module__])
        own = names["ALL_ATTENTION_FUNCTIONS"].get_interface(
            module.config._attn_implementation, names["eager_attention_forward"]
        )
        watch.see(module, query, key, attention_mask)
        return own(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = shown


AttentionInterface.register(_WATCHED, _watched_attention)
