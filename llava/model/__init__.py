"""LLaVA on transformers' modules: loading, vision features, prompts with images, generation."""

from __future__ import annotations

__all__ = ["LlavaLlamaForCausalLM", "load_pretrained_model"]


def __getattr__(name: str):
    # Lazy, so that importing one submodule does not load all of transformers' generation code.
    if name == "LlavaLlamaForCausalLM":
        from llava.model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    if name == "load_pretrained_model":
        from llava.model.builder import load_pretrained_model

        return load_pretrained_model
    raise AttributeError(f"module 'llava.model' has no attribute {name!r}")
