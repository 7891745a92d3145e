"""Compositions: several methods one after another, ``visionzip+autoprune`` or ``divprune+autoprune``.

Each part keeps its own options, budget and memory; the later ones see what the earlier ones left. Position mode and cap
are those of the whole: the last part's, unless given. The budget that the trace speaks of is the last part's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.pruning.method import PruningMethod
from llava.pruning.types import BEFORE_DECODER, OptionError, Rows
from llava.pruning.vision import VisionFact


@dataclass(frozen=True, kw_only=True)
class Composition(PruningMethod):
    """Methods that act one after another; :class:`CompositionSpec` reads it from names and options."""

    members: tuple[PruningMethod, ...] = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        return "+".join(member.name for member in self.members)

    def __post_init__(self) -> None:
        super().__post_init__()
        for place, member in enumerate(self.members):
            if (member.reduces_vision or member.merges_in_tower) and place:
                raise OptionError(f"{self.name}: {member.name} works in front of the decoder and must come first")
            if member.visual_token_num is not None and not (member.reduces_vision or member.merges_in_tower):
                raise OptionError(f"{self.name}: visual_token_num goes to the whole, not to {member.name}")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "members": tuple(member.settings() for member in self.members)}

    @property
    def parts(self) -> tuple[PruningMethod, ...]:
        return self.members

    @property
    def needs_cls(self) -> bool:  # type: ignore[override]
        return any(member.needs_cls for member in self.members)

    @property
    def reduces_vision(self) -> bool:  # type: ignore[override]
        return self.members[0].reduces_vision

    @property
    def merges_in_tower(self) -> bool:  # type: ignore[override]
        return self.members[0].merges_in_tower

    def without_patches(self) -> Composition:
        if self.visual_token_num is not None:
            super().without_patches()  # says that the cap goes by patches
        return replace(self, members=tuple(member.without_patches() for member in self.members))

    def aim_of(self, count: int) -> int | None:
        return self.members[-1].aim_of(count)

    @property
    def budget_kind(self) -> str:
        return self.members[-1].budget_kind

    @property
    def counts_alike(self) -> bool:
        return all(member.counts_alike for member in self.members)

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        """All stages; at one layer a single method may look at attention, which is that of the tokens before it."""
        stages: dict[int, Rows] = {}
        for member in self.members:
            for layer, rows in member.stages(num_layers).items():
                if layer in stages and layer != BEFORE_DECODER:
                    raise OptionError(
                        f"{self.name}: two methods select after layer {layer}; give one of them other layers"
                    )
                stages[layer] = rows
        return stages

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        decisions = [member.decision_layer(32) for member in self.members]  # the depth does not matter
        return all(m.capturable for m in self.members) and sum(layer is not None for layer in decisions) <= 1

    def decision_layer(self, num_layers: int) -> int | None:
        return next((layer for m in self.members if (layer := m.decision_layer(num_layers)) is not None), None)

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        facts: dict[str, VisionFact] = {}
        for member in self.members:
            for name, fact in member.vision_facts(tower_layers).items():
                if facts.setdefault(name, fact) != fact:
                    raise OptionError(f"{self.name}: two methods mean different things by the vision fact '{name}'")
        return facts


@dataclass(frozen=True)
class CompositionSpec:
    """Which methods a composition is made of; used like the class of a method.

    Attributes:
        name: as it was given, ``first+second``.
        kinds: the classes of the methods.
    """

    name: str
    kinds: tuple[type[PruningMethod], ...]

    @classmethod
    def of(cls, name: str, kinds: Sequence[type[PruningMethod]]) -> CompositionSpec:
        """Check that the methods can be composed.

        Raises:
            OptionError: a method twice, or ``dense`` among them.
        """
        names = [kind.name for kind in kinds]
        if len(set(names)) < len(names):
            raise OptionError(f"{name}: a method may take part once")
        if "dense" in names:
            raise OptionError(f"{name}: dense prunes nothing and cannot be combined")
        return cls(name, tuple(kinds))

    @property
    def __name__(self) -> str:
        return "".join(kind.__name__ for kind in self.kinds)

    def __call__(self, **options: Any) -> Composition:
        return self.from_options(options)

    def options(self) -> dict[str, Any]:
        """Options of the whole, and of the parts as ``name.option``; plain names go to the last part."""
        return self.kinds[-1].options() | {
            f"{kind.name}.{option}": value
            for kind in self.kinds
            for option, value in kind.options().items()
            if option not in ("visual_token_num", "positions")
        }

    def from_options(self, options: Mapping[str, Any]) -> Composition:
        """Build all parts. A plain option goes to the last part, ``budget`` and ``view_budget`` to all without one.

        Raises:
            OptionError: unknown option, or a part but the last whose budget is not given.
        """
        known = self.options()
        own: list[dict[str, Any]] = [{} for _ in self.kinds]
        for key, value in options.items():
            if key not in known:
                raise OptionError(f"method '{self.name}' has no option '{key}'; valid options: {', '.join(known)}")
            name, dot, option = key.partition(".")
            place = [kind.name for kind in self.kinds].index(name) if dot else -1
            own[place][option if dot else key] = value
        cap = own[-1].pop("visual_token_num", None)
        for kind, values in zip(self.kinds[:-1], own, strict=False):
            free = kind.options().get("target_tokens") is None
            if not free and "target_tokens" not in values and "target_ratio" not in values:
                ways = " or ".join(f"{kind.name}.{option}=..." for option in ("target_tokens", "target_ratio"))
                raise OptionError(f"{self.name}: give the budget of {kind.name} too, as {ways}")
            for option in ("budget", "view_budget"):
                if option in own[-1]:
                    values.setdefault(option, own[-1][option])
        members = tuple(kind.from_options(values) for kind, values in zip(self.kinds, own, strict=True))
        cap = PruningMethod.from_options({"visual_token_num": cap}).visual_token_num
        if members[0].reduces_vision or members[0].merges_in_tower:
            members = (replace(members[0], visual_token_num=cap), *members[1:])
        last = members[-1]
        return Composition(
            members=members,
            target_tokens=last.target_tokens,
            target_ratio=last.target_ratio,
            positions=last.positions,
            budget=last.budget,
            visual_token_num=cap,
        )
