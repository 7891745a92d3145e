"""The bases of pruning methods: what a method declares, what it is shown, what it returns.

A method is a frozen dataclass of options that derives from one of three bases, by the place where it works:

- :class:`DecoderMethod` selects among the visual tokens between decoder layers (or before the first one);
- :class:`VisionReducer` reduces the patches of a picture in front of the projector;
- :class:`TowerMerger` merges or drops tokens inside the layers of the vision tower.

It never sees a module, a cache, a rotary embedding or a prompt, only tensors.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llava.pruning.budget import BUDGETS, share_of
from llava.pruning.engine.protocol import Replays
from llava.pruning.engine.run import PruningRun
from llava.pruning.engine.view import LayerView
from llava.pruning.types import BEFORE_DECODER, LayerFact, OptionError, OwnDefault, Rows, Selection, UnsupportedError
from llava.pruning.views import JOINT, read_view_budget
from llava.pruning.vision import Reduction, TowerHide, TowerKeep, TowerMerge, TowerView, VisionFact, VisionView

_ANY_DEPTH = 24  # whether there are facts does not depend on the tower
_DEEP = 1000  # layers of a decoder that has every layer that an option names
MethodT = typing.TypeVar("MethodT", bound="PruningMethod")

__all__ = ["DecoderMethod", "LayerView", "PruningMethod", "TowerMerger", "VisionReducer"]


@dataclass(frozen=True, kw_only=True)
class PruningMethod:
    """What all methods have. Fields are the options: Python keyword = ``--method-args`` key.

    Attributes:
        target_tokens: budget, the mean number of visual tokens per decoder layer; None means no budget.
        positions: ``compact`` renumbers the survivors 0, 1, 2, ... in every layer; ``original`` keeps their positions.
        budget: which mean meets the target. ``nominal``: as the method's paper counts it (for most the tokens leaving
            the layers, for some those entering, see the method). ``processed``: the tokens that the layers compute on,
            for every method, so that methods can be compared at equal cost.
        visual_token_num: before anything else keep at most this many visual tokens of each image, those with the
            highest CLS attention; an image of several crops keeps of each crop in proportion to its size.
        target_ratio: the budget as a share of each prompt's visual tokens, above 0 and at most 1, instead of
            ``target_tokens``; rounded down, at least one token.
        view_budget: how the tokens that a selection keeps are shared out among the images of a prompt: ``joint`` (all
            compete with all), ``equal``, or a file with a share per image; see :mod:`llava.pruning.views`.
        pospad: every run of tokens that is dropped in front of the decoder leaves a marker, see
            :mod:`~llava.pruning.pospad`.
    """

    target_tokens: int | None = None
    positions: str = "original"
    visual_token_num: int | None = None
    budget: str = "nominal"
    target_ratio: float | None = None
    view_budget: str | tuple[float, ...] = JOINT
    pospad: bool = False

    name: ClassVar[str]
    needs_cls: ClassVar[bool] = False
    published_budget: ClassVar[str] = "nominal"  # what the paper's budget counts
    instead_of_target: ClassVar[str | None] = None  # an option that replaces `target_tokens` where it is given
    reduces_vision: ClassVar[bool] = False  # whether `reduce` takes part
    reduces_projected: ClassVar[bool] = False  # whether `reduce` works behind the projector
    ranks_in_decoder: ClassVar[bool] = False  # whether `select` looks at vision facts though `reduce` takes part
    merges_in_tower: ClassVar[bool] = False  # whether `merge` takes part
    capturable: ClassVar[bool] = False  # whether selections may be captured in a CUDA graph, see engine/graphs.py
    shares_views: ClassVar[bool] = False  # whether selections can be shared out among images, see `LayerView.best`
    reads_text: ClassVar[bool] = False  # whether `reduce` looks at the text of the prompt

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Where renumbering has no meaning, a method that does it by default goes on without; a wish for it is an error.
        if isinstance(own := vars(cls).get("positions"), str):
            cls.positions = OwnDefault(own)

    def __new__(cls: type[MethodT], *args: Any, **options: Any) -> MethodT:
        # Before the defaults are filled in: the only place that sees which of the two was given.
        if all(options.get(name) is not None for name in ("target_tokens", "target_ratio")):
            raise OptionError("target_tokens and target_ratio are two ways to give the budget: give one of them")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        ratio = self.target_ratio
        if ratio is not None:
            number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
            self.require("target_ratio", number and 0 < ratio <= 1, "must be above 0 and at most 1")
            object.__setattr__(self, "target_tokens", None)  # the default of the class
        for option in ("target_tokens", "visual_token_num"):
            value = getattr(self, option)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{option} must be an integer of at least 1, got {value!r}")
        if self.positions not in ("compact", "original"):
            raise OptionError(f"positions must be 'compact' or 'original', got {self.positions!r}")
        if self.budget not in BUDGETS:
            raise OptionError(f"budget must be 'nominal' or 'processed', got {self.budget!r}")
        object.__setattr__(self, "view_budget", read_view_budget(self.view_budget))
        if self.view_budget != JOINT and not self.shares_views:
            raise OptionError(f"{self.name} cannot share its budget out among images: view_budget must be {JOINT}")
        if self.pospad and self.merges_in_tower:
            raise OptionError(f"pospad needs tokens that are dropped, and {self.name} works inside the vision tower")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            self.require(field.name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")
        # What works in front of the decoder can do with the cap alone.
        free = type(self).target_tokens is None or self.reduces_vision or self.merges_in_tower
        if self.target_tokens is None and ratio is None and self._replacement is None and not free:
            options = " or ".join(filter(None, ("target_tokens", self.instead_of_target)))
            raise OptionError(f"{self.name} needs {options}")

    def require(self, option: str, valid: bool, wish: str) -> None:
        """Raise an :class:`OptionError` that names the option, what is wished of it, and its value."""
        if not valid:
            raise OptionError(f"{option} {wish}, got {getattr(self, option)!r}")

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        """Layers after which the method selects (or ``BEFORE_DECODER``), with the attention rows it needs there."""
        return {}

    def layer_facts(self, num_layers: int) -> Mapping[int, Collection[LayerFact]]:
        """What the layers of :meth:`stages` have to say beside attention rows; nothing else is kept of them."""
        return {}

    def vision_facts(self, tower_layers: int) -> Mapping[str, VisionFact]:
        """What the vision tower has to say about each patch, by names of the method's choice; nothing else is computed.

        ``needs_cls`` is short for the one fact ``cls_attention`` of the layer whose output is used.
        """
        return {}

    def observe(self, view: LayerView, memory: types.SimpleNamespace) -> None:
        """See :meth:`DecoderMethod.observe`."""

    def decide(self, view: LayerView, memory: types.SimpleNamespace) -> Hashable:
        """See :meth:`DecoderMethod.decide`."""
        return None

    def decision_layer(self, num_layers: int) -> int | None:
        """See :meth:`DecoderMethod.decision_layer`."""
        return None

    def passes(self, layer: int, counts: tuple[int, ...], memory: types.SimpleNamespace) -> bool:
        """See :meth:`DecoderMethod.passes`."""
        return False

    def select(self, view: LayerView, memory: types.SimpleNamespace) -> Selection | None:
        """See :meth:`DecoderMethod.select`; asked only after layers in :meth:`stages`."""
        raise NotImplementedError(f"{self.name} selects nothing in the decoder")

    def reduce(self, view: VisionView) -> Reduction:
        """See :meth:`VisionReducer.reduce`; asked only if :attr:`reduces_vision`."""
        raise NotImplementedError(f"{self.name} reduces nothing in front of the projector")

    def merge(self, view: TowerView) -> TowerMerge | TowerKeep | TowerHide | None:
        """See :meth:`TowerMerger.merge`; asked only if :attr:`merges_in_tower`."""
        raise NotImplementedError(f"{self.name} merges nothing in the tower")

    @property
    def budget_kind(self) -> str:
        """Which mean is to meet ``target_tokens``: ``nominal`` or ``processed``."""
        return "processed" if self.budget == "processed" else self.published_budget

    @property
    def counts_alike(self) -> bool:
        """Whether ``budget`` changes nothing: the mean to meet is that of processed tokens anyway, or all tokens are
        dropped in front of the decoder, where the two means are one.
        """
        return self.budget_kind == "processed" or set(self.stages(_DEEP)) <= {BEFORE_DECODER}

    def without_patches(self) -> PruningMethod:
        """The method for visual tokens that are no patches of a picture, but mixtures of all of them.

        Raises:
            UnsupportedError: it looks at patches, and there is nothing to look at.
        """
        looks = self.needs_cls or self.visual_token_num is not None or self.vision_facts(_ANY_DEPTH)
        if looks or self.reduces_vision or self.merges_in_tower:
            raise UnsupportedError(
                f"{self.name} with these options looks at patches of a picture, and the image adapter of this model "
                "mixes them before they are visual tokens: choose a method that goes by attention of the text, by "
                "likeness of tokens or by chance"
            )
        return self

    def target_of(self, count: int) -> int:
        """Budget in tokens for a prompt of ``count`` visual tokens, of a method that cannot be without."""
        if self.target_ratio is not None:
            return share_of(count, self.target_ratio)
        if self.target_tokens is None:
            raise OptionError(f"{self.name} needs target_tokens")
        return self.target_tokens

    def targets(self, view: LayerView) -> tuple[int, ...]:
        """:meth:`target_of` each row: a share counts what the prompt had, whatever was dropped since."""
        return tuple(map(self.target_of, view.prompt_counts))

    def aim_of(self, count: int) -> int | None:
        """The mean that the method tries to meet in a prompt of ``count`` visual tokens; None if it has no budget, or
        if other options decide how much is kept.
        """
        free = self.target_tokens is None and self.target_ratio is None
        return None if free or self._replacement is not None else self.target_of(count)

    def aim_in_front(self, count: int) -> int | None:
        """Tokens that `reduce` or `merge` leaves of a prompt of ``count`` visual tokens: :meth:`aim_of`, but for a
        method that goes on in the decoder.
        """
        return self.aim_of(count)

    @property
    def _replacement(self) -> Any:
        return None if self.instead_of_target is None else getattr(self, self.instead_of_target)

    @property
    def parts(self) -> tuple[PruningMethod, ...]:
        """The methods that act one after another: one, except in a composition."""
        return (self,)

    def attach(self, model: nn.Module, graphs: Replays | None = None) -> PruningRun:
        """Context manager that prunes inside ``model`` and afterwards leaves it as it was; with ``graphs``
        (:class:`~llava.pruning.engine.graphs.PrefillGraphs`) prefills whose like has been seen are replayed.
        """
        return PruningRun(self, model, graphs)

    def settings(self) -> dict[str, Any]:
        """The values of all options, JSON-able: what is recorded of a method."""
        values = dataclasses.asdict(self) | {"positions": str(self.positions)}
        for option, default in (("target_ratio", None), ("view_budget", JOINT), ("pospad", False)):
            if values[option] == default:
                del values[option]  # records from before there was a choice stay equal
        return values

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names with their defaults."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def from_options(cls: type[MethodT], options: Mapping[str, Any]) -> MethodT:
        """Build the method from option values; strings (command line) are converted to the type of the field.

        Raises:
            OptionError: unknown option (the message lists the valid ones), or a value of the wrong kind.
        """
        hints = typing.get_type_hints(cls)
        known = cls.options()
        values = {}
        for key, value in options.items():
            if key not in known:
                raise OptionError(f"method '{cls.name}' has no option '{key}'; valid options: {', '.join(known)}")
            values[key] = _convert(value, hints[key], key) if isinstance(value, str) else value
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class DecoderMethod(PruningMethod):
    """Selects between decoder layers. Give :meth:`stages` and :meth:`select`.

    A method whose counts depend on what it sees gives :meth:`observe`, :meth:`decide` and :meth:`decision_layer` too:
    so the rest needs no host, and can be captured in CUDA graphs (``capturable``).
    """

    rows: ClassVar[Rows] = Rows.NONE  # attention rows that `choose` looks at
    reads_keys: ClassVar[bool] = False  # whether `choose` looks at the keys of the layer
    facts: ClassVar[frozenset[LayerFact]] = frozenset()  # facts of the layer that `choose` looks at

    def observe(self, view: LayerView, memory: types.SimpleNamespace) -> None:
        """Compute, on the device, what :meth:`decide` will read; after every layer in :meth:`stages`."""

    def decide(self, view: LayerView, memory: types.SimpleNamespace) -> Hashable:
        """Read what was observed (the host waits for the device here and nowhere else) and remember how many tokens
        all layers keep.

        Called between :meth:`observe` and :meth:`select`. Returns what all counts from here on depend on: where it is
        equal, and the prompts have equal shapes, so are the counts.
        """
        return None

    def passes(self, layer: int, counts: tuple[int, ...], memory: types.SimpleNamespace) -> bool:
        """Whether nothing will be dropped after a layer that is in :meth:`stages`, known before it runs: then no
        attention rows are computed, and it is not asked. ``counts`` are the visual tokens per row.
        """
        return False

    def decision_layer(self, num_layers: int) -> int | None:
        """The layer behind which :meth:`decide` reads the device; None if all counts are known from the start."""
        return None

    def select(self, view: LayerView, memory: types.SimpleNamespace) -> Selection | None:
        """Choose among ``view``'s visual tokens; None leaves them all.

        ``memory`` is new in every prefill and lives until its end: whatever the method has to remember from one layer
        to the next. What it leaves there under ``report`` (name -> one value per row) goes into the trace. What it
        leaves under ``carried`` (name -> ``[B, V]``) is remembered per visual token: it follows every selection, also
        those of other methods, and is 0 for merged tokens.
        """
        raise NotImplementedError

    def choose(self, view: LayerView, keep: tuple[int, ...]) -> Selection:
        """Keep that many tokens per row, whatever the layer: what makes a method usable in a schedule (optional)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class VisionReducer(PruningMethod):
    """Reduces crops in front of the projector. Give :meth:`reduce`, and :meth:`vision_facts` for what it looks at."""

    reduces_vision: ClassVar[bool] = True

    def reduce(self, view: VisionView) -> Reduction:
        """Reduce crops to ``view.target`` tokens each."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TowerMerger(PruningMethod):
    """Merges or drops tokens inside the layers of the vision tower, between attention and MLP. Give :meth:`merge`."""

    merges_in_tower: ClassVar[bool] = True

    def merge(self, view: TowerView) -> TowerMerge | TowerKeep | TowerHide | None:
        """Which tokens of this layer become one, which stay, or which are hidden from attention; None changes nothing.

        After a merge in the last layer it is asked again, with the merged tokens, until it returns None.
        """
        raise NotImplementedError


def _convert(text: str, hint: Any, option: str) -> Any:
    kinds: Sequence[type] = typing.get_args(hint) or (hint,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    wanted = " or ".join(kind.__name__ for kind in kinds if kind is not types.NoneType)
    raise OptionError(f"option '{option}' must be of type {wanted}, got '{text}'")
