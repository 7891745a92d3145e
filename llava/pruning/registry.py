"""Pruning methods by name. A method's file is imported when the method is first asked for."""

from __future__ import annotations

import importlib

from llava.pruning.base import OptionError, PruningMethod

_METHODS = {
    "autoprune": "AutoPrune",
    "dense": "Dense",
    "divprune": "DivPrune",
    "fastervlm": "FasterVLM",
    "fastv": "FastV",
    "hiprune": "HiPrune",
    "pdrop": "PDrop",
    "prumerge_plus": "PruMergePlus",
    "random": "Random",
    "sparsevlm": "SparseVLM",
    "tome": "ToMe",
    "uniform": "Uniform",
    "visionzip": "VisionZip",
}


def list_methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str) -> type[PruningMethod]:
    """The class of a method.

    Raises:
        OptionError: unknown name; the message lists the valid ones.
    """
    if name not in _METHODS:
        raise OptionError(f"unknown pruning method '{name}'; available: {', '.join(list_methods())}")
    return getattr(importlib.import_module(f"llava.pruning.methods.{name}"), _METHODS[name])
