"""What an experiment compares: methods and budgets, the ready ablations of AutoPrune, variants from a file.

A variant is a method with options and without a budget; a setting is a variant at a budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.common.arguments import find_method, with_options
from llava.eval.common.budgets import Budget
from llava.eval.common.jsonio import read_json, read_text
from llava.utils import UserError

DENSE = "dense"


@dataclass(frozen=True)
class Variant:
    """A method with options. group: variants that are told apart by one thing, for tables and plots."""

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Setting:
    """A variant at a budget (a float: a share of each prompt's visual tokens; None for dense), and the pruning method
    that it makes. counted: where budgets are counted both ways, the one that is met: `nominal` or `processed`, or
    `both` where they are one; None elsewhere.
    """

    variant: Variant
    budget: Budget | None
    method: Any
    counted: str | None = None

    @property
    def label(self) -> str:
        label = self.variant.label if self.budget is None else f"{self.variant.label} {self.budget}"
        return f"{label} processed" if self.counted == "processed" else label


def _autoprune(group: str, label: str, **options: Any) -> Variant:
    return Variant(label, "autoprune", options, group)


_PARTS = (
    _autoprune("parts", "fixed slope (gamma=0)", gamma=0.0),
    _autoprune("parts", "without recovery", recycle_fraction=0.0),
    _autoprune("parts", "without the layer-0 cut", coarse_cut=False),
    _autoprune("parts", "without CLS term", cls_weight=0.0),
    _autoprune("parts", "without text term", text_weight=0.0),
    _autoprune("parts", "original positions", positions="original"),
    _autoprune("parts", "MI of layer 0", mi_layer=0),
    _autoprune("parts", "relative x0", x0_relative=True),
)
_SWEEPS: dict[str, tuple[float, ...]] = {
    "x0": (2.0, 4.0, 6.0, 8.0, 10.0, 12.0),
    "k0": (0.1, 0.2, 0.8, 1.6),
    "gamma": (0.05, 0.1, 0.4, 0.8),
}
PUBLISHED = "autoprune"
ABLATIONS: dict[str, tuple[Variant, ...]] = {
    "parts": _PARTS,
    **{
        option: tuple(_autoprune(option, f"{option}={value:g}", **{option: value}) for value in values)
        for option, values in _SWEEPS.items()
    },
}
"""Group -> variants. Everything that a variant does not name is as published."""


def ablation_variants(groups: Sequence[str]) -> list[Variant]:
    """AutoPrune as published, then the variants of the groups (all if there are none)."""
    unknown = [group for group in groups if group not in ABLATIONS]
    if unknown:
        raise UserError(f"--ablations: unknown group {unknown[0]!r}; there are: {', '.join(ABLATIONS)}")
    chosen = groups or tuple(ABLATIONS)
    return [Variant(PUBLISHED, "autoprune"), *(variant for group in chosen for variant in ABLATIONS[group])]


def read_variants(path: str) -> list[Variant]:
    """Variants of a JSON or YAML file: a list of `label`, `method` and perhaps `options` and `group`."""
    content = read_json(path, "variants file") if Path(path).suffix == ".json" else _read_yaml(path)
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: needs a list of variants, each with 'label' and 'method'")
    variants = []
    for number, entry in enumerate(content, start=1):
        where = f"{path}: variant {number}"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("label", "method")):
            raise UserError(f"{where} needs 'label' and 'method', both texts")
        options = entry.get("options") or {}
        if not isinstance(options, dict):
            raise UserError(f"{where}: 'options' must map names to values")
        unknown = sorted(map(str, set(entry) - {"label", "method", "options", "group"}))
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; known: label, method, options, group")
        variants.append(Variant(entry["label"], entry["method"], options, str(entry.get("group", ""))))
    return variants


def _read_yaml(path: str) -> Any:
    text = read_text(path, "variants file")
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path}: YAML needs the package PyYAML (pip install PyYAML); JSON needs none") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # a day 32, 5,000 digits, nesting
        raise UserError(f"{path}: malformed YAML ({' '.join(str(error).split())})") from None


def make_settings(
    variants: Iterable[Variant], budgets: Sequence[Budget], accounting: str = "nominal", flag: str = "--methods"
) -> list[Setting]:
    """Dense first, then every variant at every budget.

    accounting: `processed` makes all methods meet the budget as a mean of processed tokens, where they can; `both`
    makes two settings of a variant where that is another mean than the paper's. flag: the option that named the
    methods, for messages.
    """
    processed = {"budget": "processed"}
    settings = [Setting(Variant(DENSE, DENSE), None, find_method(DENSE, flag).from_options({}))]
    for variant in variants:
        if variant.method == DENSE:
            continue
        for budget in budgets:
            options = {k: v for k, v in variant.options.items() if k not in ("target_tokens", "target_ratio")}
            options["target_ratio" if isinstance(budget, float) else "target_tokens"] = budget
            if accounting == "processed":
                options |= processed
            kind = find_method(variant.method, flag)
            method = with_options(kind, options, variant.label)
            if accounting != "both" or method.counts_alike:
                settings.append(Setting(variant, budget, method, "both" if accounting == "both" else None))
            else:
                settings.append(Setting(variant, budget, method, "nominal"))
                method = with_options(kind, options | processed, variant.label)
                settings.append(Setting(variant, budget, method, "processed"))
    labels = [setting.label for setting in settings]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"{twice!r} is asked for twice: give every variant and budget once")
    return settings
