"""LLaVA with a Mistral decoder (LLaVA-1.6-mistral-7b)."""

from __future__ import annotations

from llava.model.llava_llama import LlavaLlamaForCausalLM


class LlavaMistralForCausalLM(LlavaLlamaForCausalLM):
    """The same model around transformers' `MistralModel`: `config.text_config` decides which decoder is built.

    Everything that `LlavaLlamaForCausalLM` says holds; the class exists because LLaVA's callers name it.
    """


__all__ = ["LlavaMistralForCausalLM"]
