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
    """The class of a method, of a composition ``first+second``, or of a schedule ``2:fastv:0.5;16:random:0.5``.

    Raises:
        OptionError: unknown name; the message lists the valid ones.
    """
    if ":" in name:
        from llava.pruning.methods.schedule import schedule

        return schedule(name)
    if "+" in name:
        from llava.pruning.methods.composition import compose

        return compose(name, tuple(get_method(part.strip()) for part in name.split("+")))
    if name not in _METHODS:
        raise OptionError(f"unknown pruning method '{name}'; available: {', '.join(list_methods())}")
    return getattr(importlib.import_module(f"llava.pruning.methods.{name}"), _METHODS[name])
