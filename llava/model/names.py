"""Names of tensors: from the original layout of LLaVA and from llava-hf's to those of the model here."""

from __future__ import annotations

import re


def _projector_name(found: re.Match[str]) -> str:
    return f"model.multi_modal_projector.linear_{int(found.group(1)) // 2 + 1}."


def _adapter_name(found: re.Match[str]) -> str:
    return f"model.image_adapter.linear_{int(found.group(1)) // 2 + 1}."


# Original and llava-hf names -> names of transformers' LlavaForConditionalGeneration; the first match is
# used.
NAME_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # original LLaVA
        # "mlpNx_gelu" is a sequence with activations at the odd places; "linear" is one layer.
        (r"^(?:model\.)?mm_projector\.(\d{0,3}[02468])\.", _projector_name),
        # Senna: a sequence of linear layers and activations along the tokens
        (r"^(?:model\.)?img_adapter\.adapter\.(\d{0,3}[02468])\.", _adapter_name),
        (r"^(?:model\.)?mm_projector\.(?=weight$|bias$)", "model.multi_modal_projector.linear_1."),
        (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
        # llava-hf as it lies on disk
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^image_newline$", "model.image_newline"),
        # already transformers' own
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    )
)
# Tensors that old checkpoints store and that are computed.
IGNORED_NAMES = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
# What a full CLIP checkpoint holds beside its vision tower.
CLIP_TEXT_NAMES = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)")


def translate_name(name: str) -> str | None:
    """The model's name for a checkpoint tensor; None for tensors that are left out on purpose."""
    if IGNORED_NAMES.search(name):
        return None
    for pattern, replacement in NAME_RULES:
        new_name, found = pattern.subn(replacement, name)
        if found:
            return new_name
    return name


# The model's names -> those of llava-hf's published files; `translate_name` is the way back.
LLAVA_HF_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)


def llava_hf_name(name: str) -> str:
    """What llava-hf calls a tensor of the model."""
    for own, theirs in LLAVA_HF_PREFIXES:
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    raise ValueError(f"{name!r} is no tensor of LLaVA")


def translate_tower_name(name: str) -> str | None:
    """The model's name for a tensor of a separate CLIP checkpoint; None for its text half and computed
    buffers.
    """
    if CLIP_TEXT_NAMES.search(name) or IGNORED_NAMES.search(name):
        return None
    return "model.vision_tower." + name.removeprefix("vision_model.")
