"""Families by the class of a model."""

from __future__ import annotations

from torch import nn

from llava import compat
from llava.families.base import Family
from llava.families.idefics3 import Idefics3, SmolVLM
from llava.families.internvl import InternVL
from llava.families.llava import Llava
from llava.families.llava_next import LlavaNext
from llava.families.llava_onevision import LlavaOnevision
from llava.families.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from llava.families.reader import FamilyReader
from llava.families.refused import Gemma3, PaliGemma
from llava.families.video_llava import VideoLlava

_FAMILIES: tuple[Family, ...] = (
    Gemma3(),
    Idefics3(),
    InternVL(),
    Llava(),
    LlavaNext(),
    LlavaOnevision(),
    PaliGemma(),
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    SmolVLM(),
    VideoLlava(),
)


def register_family(family: Family) -> None:
    """Add a family, in front of those that are known: classes that it names are its own from now on."""
    global _FAMILIES
    _FAMILIES = (family, *_FAMILIES)


def known_families() -> list[Family]:
    """All families by name, those that are refused included."""
    return sorted(_FAMILIES, key=lambda family: family.name)


def list_families() -> list[str]:
    """Names of the families that can be pruned, sorted."""
    return sorted(family.name for family in _FAMILIES if family.refused is None)


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, by the class whose forward it has; None if it is not known (a bare decoder, a class that
    tells the run itself where its visual tokens are).
    """
    kinds = type(compat.unwrapped(model)).__mro__
    owner = next((kind.__name__ for kind in kinds if "forward" in vars(kind)), "")
    return next((family for family in _FAMILIES if owner in family.classes), None)


def reader_of(model: nn.Module) -> FamilyReader | None:
    """What reads the model's prompts for a pruning run; None for models of no known family."""
    family = family_of(model)
    return None if family is None else FamilyReader(family, compat.unwrapped(model))
