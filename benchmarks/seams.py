"""Where a prefill is cut into parts, from outside: functions that are replaced for a while.

Few seams, all at names that others rely on too: the submodules of transformers' decoder layers, transformers' mask
factory, and of ours `PruningMethod.select`, `Sequences.apply` and `PruningRun.selection_timer`. Whatever lies between
them is `other`. A seam that is gone, or that a prefill does not reach, is an error and never a part of 0 ms.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.parts import replaced
from llava import compat
from llava.pruning.engine.run import PruningRun
from llava.pruning.engine.sequence import Sequences
from llava.pruning.method import PruningMethod

ATTENTION, MLP, LAYER = "attention", "mlp", "norms and residuals"
MASKS, SCORES, CHOICE, MOVING, OTHER = "masks and rotary", "scores", "choice", "moving tokens", "other"
PARTS = (ATTENTION, MLP, LAYER, MASKS, SCORES, CHOICE, MOVING, OTHER)


@dataclass(frozen=True)
class Seam:
    """A function found as `owner.name`, the part that its time belongs to, and whether it returns a context manager
    whose block is meant, not the call itself.
    """

    part: str
    owner: Any
    name: str
    block: bool = False

    def function(self) -> Callable[..., Any]:
        """What stands there now; `RuntimeError` if nothing does."""
        found = getattr(self.owner, self.name, None)
        if not callable(found):
            owner = getattr(self.owner, "__name__", type(self.owner).__name__)
            raise RuntimeError(
                f"{owner}.{self.name} is gone, so the part '{self.part}' cannot be told from the rest of the prefill: "
                "adapt benchmarks/seams.py"
            )
        return found


def dense_seams(model: nn.Module) -> list[Seam]:
    """Those of transformers' decoder. A layer without its attention and MLP is its norms and residual additions."""
    decoder = model.model
    own = [
        seam
        for layer in decoder.layers
        for seam in (
            Seam(LAYER, layer, "forward"),
            Seam(ATTENTION, layer.self_attn, "forward"),
            Seam(MLP, layer.mlp, "forward"),
        )
    ]
    # Rotary tables come from a module, masks from a function that transformers' forward and ours find by its name.
    modules = (sys.modules[type(decoder).__module__], compat)
    masks = [Seam(MASKS, module, "create_causal_mask") for module in modules]
    return [*own, Seam(MASKS, decoder.rotary_emb, "forward"), *masks]


def pruned_seams(model: nn.Module, method: PruningMethod) -> list[Seam]:
    """Those of transformers' decoder and of the engine. The run's timer goes around all that is selection: without the
    choice and the move in it, attention rows are what remains.
    """
    chooses = [Seam(CHOICE, part, "select") for part in method.parts]
    moves = Seam(MOVING, Sequences, "apply")
    return [*dense_seams(model), Seam(SCORES, PruningRun, "selection_timer", block=True), *chooses, moves]


@contextmanager
def cut(seams: Sequence[Seam], part: Callable[[str], AbstractContextManager]) -> Iterator[Counter[str]]:
    """Runs every seam inside `part(its part)` while it lasts; yields the calls by part.

    Raises:
        RuntimeError: a seam is gone; at the end, if nothing else went wrong: a layer, its attention or its MLP was
            passed by, or another part was never reached.
    """
    calls: Counter[str] = Counter()
    seen = Counter(seam.part for seam in seams)
    with ExitStack() as stack:
        for seam in seams:
            around = _around_block if seam.block else _around_call
            stack.enter_context(replaced(seam.owner, seam.name, around(seam, part, calls)))
        yield calls
    for name, number in seen.items():
        expected = number if name in (LAYER, ATTENTION, MLP) else 1
        if calls[name] < expected:
            raise RuntimeError(
                f"the part '{name}' was reached {calls[name]} times in a prefill, at least {expected} were expected: "
                "the work is done in another way than benchmarks/seams.py knows"
            )


def _around_call(seam: Seam, part: Callable[[str], AbstractContextManager], calls: Counter[str]) -> Callable[..., Any]:
    function = seam.function()

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[seam.part] += 1
        with part(seam.part):
            return function(*args, **kwargs)

    return wrapped


def _around_block(seam: Seam, part: Callable[[str], AbstractContextManager], calls: Counter[str]) -> Callable[..., Any]:
    function = seam.function()

    @contextmanager
    def wrapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
        calls[seam.part] += 1
        with part(seam.part), function(*args, **kwargs) as value:
            yield value

    return wrapped
