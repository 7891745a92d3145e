"""Pruned variants of VLMEvalKit's models in its own table of models.

    from llava.integrations.vlmevalkit import register
    register(method="autoprune", target_tokens=64)      # adds llava_v1.5_7b-autoprune-64, Qwen2.5-VL-7B-...-64, ...

Nothing of VLMEvalKit is changed; its `run.py` must run in the same process afterwards, which `python -m
llava.integrations.vlmevalkit` does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llava.integrations.pruned import Tally, attached, check_prunable, take_method
from llava.utils import UserError

if TYPE_CHECKING:
    from llava.pruning.method import PruningMethod

# Classes of VLMEvalKit that run a model of this package or of transformers in this process, as `self.model`.
CLASSES = ("LLaVA", "LLaVA_Next", "LLaVA_OneVision_HF", "Qwen2VLChat", "Qwen3VLChat", "SmolVLM", "SmolVLM2")

_running: list[Any] = []


def register(models: Iterable[str] | None = None, **arguments: Any) -> list[str]:
    """Adds `NAME-METHOD-BUDGET` for models of VLMEvalKit's table; returns the names that were added.

    Args:
        models: their names; None: all whose class is one of `CLASSES`.
        arguments: `method` (default `autoprune`), its options, and `method_args` as `k=v;k=v`.

    Raises:
        UserError: VLMEvalKit is not there, has no such model, or the arguments describe no method.
    """
    table = _table()
    method = take_method(arguments)
    if arguments:
        raise UserError(f"{', '.join(arguments)}: no option of all methods; others go into method_args='k=v;k=v'")
    wanted = list(models) if models is not None else [name for name, made in table.items() if _class(made) is not None]
    added = {}
    for name in wanted:
        if name not in table:
            raise UserError(f"VLMEvalKit has no model {name!r}")
        if (kind := _class(table[name])) is None:
            raise UserError(f"{name}: its class is none of {', '.join(CLASSES)}")
        factory = table[name]
        added[f"{name}-{label(method)}"] = functools.partial(
            pruned_class(kind, method), *factory.args, **factory.keywords
        )
    table.update(added)
    return list(added)


def label(method: PruningMethod) -> str:
    """How a method is named in the table: `autoprune-64`, `autoprune-r0.11`, `dense`."""
    if method.target_ratio is not None:
        return f"{method.name}-r{method.target_ratio}"
    return method.name if method.target_tokens is None else f"{method.name}-{method.target_tokens}"


def pruned_class(kind: type, method: PruningMethod) -> type:
    """A subclass that answers with the method attached to its `model`, and has a `tally` of what was measured."""

    class Pruned(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if getattr(self, "model", None) is None:
                raise UserError(f"{kind.__name__} runs its model in another program (vLLM, LMDeploy), not in this one")
            check_prunable(self.model, kind.__name__)
            self.tally = Tally()
            _running.append(self)

        def generate_inner(self, *args: Any, **kwargs: Any) -> Any:
            with attached(method, self.model, self.tally):
                return super().generate_inner(*args, **kwargs)

        def measured(self) -> Mapping[str, Any]:
            """The method, its options and the means over the prompts so far."""
            return {"method": method.name, "options": method.settings(), **self.tally.means()}

    if hasattr(kind, "chat_inner"):  # VLMEvalKit looks whether there is one

        def chat_inner(self: Any, *args: Any, **kwargs: Any) -> Any:
            with attached(method, self.model, self.tally):
                return super(Pruned, self).chat_inner(*args, **kwargs)

        Pruned.chat_inner = chat_inner  # type: ignore[attr-defined]
    Pruned.__name__ = Pruned.__qualname__ = kind.__name__  # VLMEvalKit looks at names of classes
    return Pruned


def report() -> str:
    """One line per model that was asked in this process: what was measured."""
    lines = []
    for model in _running:
        measured = dict(model.measured())
        if "tokens_nominal" in measured:
            means = ", ".join(f"{name} {measured[name]:.4g}" for name in model.tally.means())
            lines.append(
                f"{measured['method']} {measured['options']}: {means} (means over {model.tally.samples} prompts)"
            )
    return "\n".join(lines)


def _table() -> dict[str, Any]:
    try:
        from vlmeval.config import supported_VLM
    except ImportError as error:
        raise UserError(f"VLMEvalKit cannot be imported: {error}") from error
    return supported_VLM


def _class(factory: Any) -> type | None:
    kind = getattr(factory, "func", None)
    known = isinstance(kind, type) and kind.__name__ in CLASSES and kind.__module__.startswith("vlmeval.")
    return kind if known else None
