"""Pruning methods by name. A method's file is imported when the method is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from llava.pruning.method import PruningMethod
from llava.pruning.types import OptionError

_METHODS = {
    "adaptinfer": "AdaptInfer",
    "agilepruner": "AgilePruner",
    "autoprune": "AutoPrune",
    "cdpruner": "CDPruner",
    "dart": "Dart",
    "dense": "Dense",
    "divprune": "DivPrune",
    "entropyprune": "EntropyPrune",
    "fastervlm": "FasterVLM",
    "fastv": "FastV",
    "flowcut": "FlowCut",
    "gtp_vit": "GTPViT",
    "hiprune": "HiPrune",
    "holov": "HoloV",
    "mmtok": "MMTok",
    "information_horizon": "InformationHorizon",
    "pdrop": "PDrop",
    "prumerge_plus": "PruMergePlus",
    "random": "Random",
    "scope": "Scope",
    "sparsevlm": "SparseVLM",
    "sparsevlm_v2": "SparseVLMPlus",
    "todre": "ToDRE",
    "tome": "ToMe",
    "transprune": "TransPrune",
    "uniform": "Uniform",
    "vscan": "VScan",
    "vispruner": "VisPruner",
    "visionzip": "VisionZip",
    "zooprune": "ZOOPrune",
}


def list_methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_METHODS)


def get_method(spec: str) -> Any:
    """What builds a method: its class; for ``first+second`` and ``2:fastv:0.5;16:random:0.5`` an object that is used
    alike (``name``, ``options()``, ``from_options(...)``, called with options).

    Raises:
        OptionError: unknown name (the message lists the valid ones), or parts that do not go together.
    """
    from llava.pruning.methods.composition import CompositionSpec
    from llava.pruning.methods.schedule import ScheduleSpec

    if ":" in spec:
        return ScheduleSpec.read(spec, _named)
    if "+" in spec:
        return CompositionSpec.of(spec, [_named(part.strip()) for part in spec.split("+")])
    return _named(spec)


def build_method(spec: str, options: Mapping[str, Any] | None = None) -> PruningMethod:
    """A method with its options: a plain one, ``first+second``, or a schedule ``2:fastv:0.5;16:random:0.5``.

    Args:
        spec: what :func:`get_method` takes.
        options: by name; strings (command line) are converted to the type of the option.

    Raises:
        OptionError: unknown name or option, or a value of the wrong kind.
    """
    method: PruningMethod = get_method(spec).from_options(options or {})
    return method


def _named(name: str) -> type[PruningMethod]:
    if name not in _METHODS:
        raise OptionError(f"unknown pruning method '{name}'; available: {', '.join(list_methods())}")
    kind: type[PruningMethod] = getattr(importlib.import_module(f"llava.pruning.methods.{name}"), _METHODS[name])
    return kind
