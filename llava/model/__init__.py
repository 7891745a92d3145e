"""LLaVA on transformers' modules: loading, vision features, prompts with images, generation."""

from __future__ import annotations

import importlib

_PLACES = {
    "LlavaConfig": "llava.model.configuration",
    "LlavaLlamaForCausalLM": "llava.model.llava_llama",
    "LlavaMistralForCausalLM": "llava.model.llava_mistral",
    "load_pretrained_model": "llava.model.builder",
}
__all__ = list(_PLACES)


def __getattr__(name: str):
    # Lazy, so that importing one submodule does not load all of transformers' generation code.
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'llava.model' has no attribute {name!r}")
