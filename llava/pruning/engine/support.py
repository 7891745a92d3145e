"""What the owned decoder loop can run: which decoders, positions, masks and arguments. Everything else is refused here.

The loop replaces transformers' own for a prefill that drops tokens: embeddings, layers one after another with one
causal mask and one pair of rotary tables, final norm. A decoder that does more between its layers would be run wrongly
without a word, so decoders are named, and every name stands in the test that compares the loop with the stock forward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from llava import compat
from llava.pruning.types import Rows, UnsupportedError

CHECKED_DECODERS = {
    "ApertusModel",
    "ArceeModel",
    "Cohere2Model",
    "CohereModel",
    "Ernie4_5Model",
    "Exaone4Model",
    "Gemma2Model",
    "GemmaModel",
    "Glm4Model",
    "GlmModel",
    "HeliumModel",
    "HunYuanDenseV1Model",
    "LlamaModel",
    "MinistralModel",
    "MistralModel",
    "NemotronModel",
    "Olmo2Model",
    "OlmoModel",
    "Phi3Model",
    "Qwen2Model",
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
    "Qwen3Model",
    "Qwen3VLTextModel",
    "SeedOssModel",
    "SmolLM3Model",
    "StableLmModel",
    "Starcoder2Model",
}
"""Classes whose forward is what the loop does. ``tests/pruning/test_decoders.py`` runs with every name here."""

NEXT_LAYER_DECODERS = {
    "ArceeModel",
    "GemmaModel",
    "LlamaModel",
    "MinistralModel",
    "MistralModel",
    "Qwen2Model",
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
    "Qwen3Model",
    "Qwen3VLTextModel",
    "SeedOssModel",
    "Starcoder2Model",
}
"""Those whose next layer can be asked for attention before it has run (``Rows.NEXT_LAST``, ``Rows.NEXT_TEXT``):
separate projections of queries and keys, perhaps a norm per head, rotary embedding of the whole head in halves.
"""

# `cache_position` says again what the length of the cache says; `logits_to_keep` is the head's, which cuts what the
# decoder returns (LLaVA-OneVision hands it down all the same).
_KNOWN = ("output_hidden_states", "output_attentions", "return_dict", "cache_position", "logits_to_keep")


def check_decoder(decoder: nn.Module, rows: Collection[Rows]) -> None:
    """Refuse decoders that the owned loop would run differently from transformers.

    Args:
        decoder: the module that holds the layers.
        rows: attention rows that the method asks for anywhere.

    Raises:
        UnsupportedError: the message names what is not supported.
    """
    config, name = decoder.config, _forward_owner(decoder)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    window = getattr(config, "sliding_window", None)
    # Without types of layers the window holds in every layer, unless a switch beside it is off.
    if not getattr(config, "layer_types", None) and window is not None and getattr(config, "use_sliding_window", True):
        kinds = ["sliding_attention"]
    reason = None
    if compat.has_axes(decoder) and name not in CHECKED_DECODERS:
        reason = "positions of several axes (M-RoPE)"
    elif any(isinstance(value, Mapping) for value in rope.values()):
        reason = "a rotary table per type of layer"
    elif kinds:
        reason = f"layers of type {', '.join(kinds)}"
        if "sliding_attention" in kinds:
            reason += f" (sliding_window={window}; set it to None in the config if no prompt and answer is longer)"
    elif getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        reason = "attention that is not causal"
    elif name not in CHECKED_DECODERS:
        reason = (
            "a decoder whose forward was never compared with the pruned one; if it only runs its layers one after "
            "another, add its name to llava.pruning.engine.support.CHECKED_DECODERS"
        )
    elif getattr(config, "attn_logit_softcapping", None) and set(rows) - {Rows.NONE}:
        reason = "scores of a decoder that caps its attention logits (attn_logit_softcapping)"
    elif {Rows.NEXT_LAST, Rows.NEXT_TEXT} & set(rows) and name not in NEXT_LAYER_DECODERS:
        reason = "scores of the layer that comes next (this method asks for them)"
    if reason is not None:
        raise UnsupportedError(f"{name} cannot be pruned: no support for {reason}")


def _forward_owner(decoder: nn.Module) -> str:
    """The class whose forward the decoder has: a subclass that does not change it is as good as its base."""
    return next(kind.__name__ for kind in type(decoder).__mro__ if "forward" in vars(kind))


def check_arguments(config: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that the owned loop would have to swallow.

    Raises:
        UnsupportedError: ``output_attentions``, or an argument whose effect is not known here.
    """
    attentions = kwargs.get("output_attentions")
    if attentions or (attentions is None and getattr(config, "output_attentions", False)):
        raise UnsupportedError(
            "output_attentions is not available with pruning: no full attention map is ever computed; the traces "
            "say which tokens survive"
        )
    states = kwargs.get("output_hidden_states")
    if states is not None and not isinstance(states, bool):
        raise UnsupportedError(f"output_hidden_states must be True or False with pruning, got {states!r}")
    unknown = sorted(name for name, value in kwargs.items() if name not in _KNOWN and not _is_off(name, value))
    if unknown:
        raise UnsupportedError(f"{', '.join(unknown)}: not supported by a pruned decoder, leave it out")


def _is_off(name: str, value: Any) -> bool:
    return value is None or (value is False and name.startswith("output_"))


_STATIC = "transformers makes masks of other forms for a static cache: leave cache_implementation unset"


def check_generation(given: Mapping[str, Any], configs: Iterable[Any]) -> None:
    """Refuse what `generate` is asked for before anything is computed. given: its keyword arguments; configs: objects
    that may be generation configurations, the first one that has an option decides.

    Raises:
        UnsupportedError: chunked prefill, or a cache whose layers cannot have different lengths.
        ValueError: such a cache itself.
    """

    def option(name: str) -> Any:
        own = (getattr(config, name, None) for config in configs)
        return given[name] if given.get(name) is not None else next((value for value in own if value is not None), None)

    if option("prefill_chunk_size"):
        raise UnsupportedError("prefill_chunk_size: a prompt that comes in chunks cannot be pruned")
    implementation = option("cache_implementation")
    if implementation not in compat.DYNAMIC_CACHES:
        raise UnsupportedError(
            f"cache_implementation={implementation!r} cannot be used with pruning: layers keep different numbers of "
            "tokens, which needs the plain dynamic cache; leave it unset"
        )
    if given.get("past_key_values") is not None:
        compat.check_cache(given["past_key_values"])


def check_prompt_form(attention_mask: Any, position_ids: Any, batch: int, width: int, axes: bool = False) -> None:
    """Refuse masks and positions of a prefill that are not one number per token, or one per axis (``axes``).

    Raises:
        UnsupportedError: the message says which form was given.
    """
    if isinstance(attention_mask, Mapping):
        raise UnsupportedError(
            f"attention_mask is a dictionary ({', '.join(map(str, attention_mask))}): pruning needs the padding mask "
            f"[batch, {width}]; {_STATIC}"
        )
    for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if value is None:
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if axes and name == "position_ids" and shape in ((3, batch, width), (4, batch, width)):
            continue  # 4: text positions in front, which only packed prompts need
        rows = (batch,) if name == "attention_mask" else (1, batch)
        if not isinstance(value, Tensor) or value.ndim != 2 or shape[1] != width or shape[0] not in rows:
            raise UnsupportedError(
                f"{name} must be [{batch}, {width}] for a prefill that is pruned, got {shape}"
                + (" (this decoder's positions have one axis)" if name == "position_ids" else f"; {_STATIC}")
            )


def check_step_form(attention_mask: Any, position_ids: Any, batch: int, new_tokens: int, axes: bool = False) -> None:
    """The same for new tokens on a pruned cache, whose mask and positions follow from the prefill.

    Raises:
        UnsupportedError: they have a form that could say something else.
    """
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        raise UnsupportedError(f"attention_mask must be [{batch}, tokens so far] or None on a pruned cache")
    if position_ids is not None and (
        not isinstance(position_ids, Tensor)
        or position_ids.ndim not in (2, 2 + axes)
        or position_ids.shape[-1] != new_tokens
    ):
        raise UnsupportedError(f"position_ids must be [{batch}, {new_tokens}] or None on a pruned cache")
