"""Pruning methods by name. A method's file is imported when the method is first asked for.

Other packages add methods with an entry point of the group ``autoprune.methods``: its name is the method's, its object
the class. Names of methods that are here stay theirs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from llava.pruning.method import PruningMethod
from llava.pruning.types import OptionError

_METHODS = {
    "adaptinfer": "AdaptInfer",
    "agilepruner": "AgilePruner",
    "autoprune": "AutoPrune",
    "autoprune_plus": "AutoPrunePlus",
    "catp": "CATP",
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
    "vflowopt": "VFlowOpt",
    "vscan": "VScan",
    "vispruner": "VisPruner",
    "visionzip": "VisionZip",
    "zooprune": "ZOOPrune",
}


GROUP = "autoprune.methods"


def list_methods() -> list[str]:
    """Names of all methods, sorted; those of other packages that are installed included."""
    return sorted({*_METHODS, *(point.name for point in entry_points(group=GROUP))})


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
    if name in _METHODS:
        kind: type[PruningMethod] = getattr(importlib.import_module(f"llava.pruning.methods.{name}"), _METHODS[name])
        return kind
    offered = list(entry_points(group=GROUP, name=name))
    if not offered:
        raise OptionError(f"unknown pruning method '{name}'; available: {', '.join(list_methods())}")
    return _from_elsewhere(name, offered)


def _from_elsewhere(name: str, offered: list[EntryPoint]) -> type[PruningMethod]:
    """A method of another package; :class:`OptionError` that names the package for whatever is wrong with it."""
    packages = sorted({getattr(point.dist, "name", None) or point.value for point in offered})
    if len({point.value for point in offered}) > 1:
        raise OptionError(f"method '{name}' is offered by {' and '.join(packages)}: uninstall all but one of them")
    try:
        kind = offered[0].load()
    except Exception as error:
        raise OptionError(
            f"method '{name}' of package {packages[0]} cannot be loaded from '{offered[0].value}': "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, PruningMethod) and getattr(kind, "name", None) == name):
        raise OptionError(
            f"method '{name}' of package {packages[0]}: '{offered[0].value}' must be a class of PruningMethod whose "
            f"name is '{name}'"
        )
    return kind
