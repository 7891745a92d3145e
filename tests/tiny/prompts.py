"""Prompts as other programs write them."""

from __future__ import annotations


def of_vlmevalkit(question: str) -> str:
    """What VLMEvalKit's class for LLaVA asks: another system text, blanks around the picture and at the end."""
    system = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    )
    return f"{system}USER:  <image> {question} ASSISTANT: "
