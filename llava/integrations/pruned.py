"""A method on a model that another program loads and asks: its options, where it may work, what it measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava.eval.answering.sums import TokenTotals, token_counts
from llava.utils import UserError

if TYPE_CHECKING:
    from llava.pruning.method import PruningMethod

# Arguments that are meant for the method; everything else is the other program's.
_OPTIONS = ("target_tokens", "target_ratio", "visual_token_num", "budget", "positions")
DEFAULT_METHOD = "autoprune"


def take_method(arguments: dict[str, Any]) -> PruningMethod:
    """The method that `arguments` describe, which lose what described it.

    `method` (default `autoprune`), options that all methods have by their own names, and the others in `method_args`,
    as `x0=14.9;k0=0.4`.

    Raises:
        UserError: the method or an option is not known, or has a value of the wrong kind.
    """
    from llava.pruning import build_method

    name = str(arguments.pop("method", DEFAULT_METHOD))
    options = {key: arguments.pop(key) for key in _OPTIONS if key in arguments}
    for part in str(arguments.pop("method_args", "")).split(";"):
        key, equals, value = part.partition("=")
        if part.strip() and not equals:
            raise UserError(f"method_args: {part.strip()!r} is not key=value; several are separated by ;")
        if part.strip():
            options[key.strip()] = value.strip()
    return build_method(name, options)


def check_prunable(model: nn.Module, what: str) -> None:
    """`UserError` if nothing would be pruned in this model. what: where it comes from, for the message."""
    from llava.families import family_of, list_families

    family = family_of(model)
    if family is not None and family.refused is not None:
        raise UserError(f"{what}: {type(model).__name__} cannot be pruned: {family.refused}")
    if family is None and not hasattr(model, "prepare_multimodal_inputs"):
        known = ", ".join(list_families())
        raise UserError(f"{what}: {type(model).__name__} is of no family that can be pruned (llava's own, {known})")


class Tally:
    """Sums over the traces of many prompts, which are not kept."""

    def __init__(self) -> None:
        self.asked, self.totals = 0, TokenTotals()

    @property
    def samples(self) -> int:
        """How many prompts had a picture."""
        return self.totals.with_image

    def take(self, run: Any) -> None:
        """Counts the traces of a run and clears them."""
        self.asked += len(run.traces)
        for trace in run.traces:
            self.totals.add(token_counts(trace))
        run.traces.clear()
        run.prefill_seconds.clear()

    def means(self) -> dict[str, float]:
        """Means per prompt with a picture, and FLOPs of all prompts relative to dense; empty without a picture."""
        means = self.totals.means()
        if means is None:
            return {}
        tokens = {"visual_tokens": means["visual"], **{f"tokens_{k}": means[k] for k in ("nominal", "processed")}}
        return {**tokens, "flops_ratio": self.totals.flops_ratio() or 1.0}


@contextmanager
def attached(method: PruningMethod, model: Any, tally: Tally) -> Iterator[None]:
    """Prunes inside `model` while the context lasts, and counts into `tally`.

    Two things that other programs rely on hold here too: where they swallow an error of `generate` and go on with an
    empty answer, it is raised in the end; and the logits of a forward with labels have their full length, zeros where
    tokens were dropped, so that whoever cuts the answer's logits out by its place finds them.
    """
    failures: list[BaseException] = []

    def watched(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if failures:
                raise failures[0]
            try:
                return own(*args, **kwargs)
            except Exception as error:
                failures.append(error)
                raise
            finally:
                tally.take(run)

        return generate

    def after_forward(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("labels") is not None:
            dropped = [trace.visual_tokens - trace.tokens_out[-1] for trace in run.traces]
            output.logits = full_length(output.logits, dropped)
            tally.take(run)

    with method.attach(model) as run:
        run.samples_seen = tally.asked  # methods that draw at random draw by the number of the prompt
        hook = model.register_forward_hook(after_forward, with_kwargs=True)
        of_the_run = vars(model).get("generate")  # a family's reader has its own while it is attached
        model.generate = watched(model.generate)
        try:
            yield
        finally:
            hook.remove()
            del model.generate
            if of_the_run is not None:
                model.generate = of_the_run
    if failures:
        raise failures[0]


def full_length(logits_BTV: Tensor, dropped: list[int]) -> Tensor:
    """Logits with a zero row for each token that was dropped, in front; text behind the picture keeps its place.

    dropped: per row; rows that lost less than others are padded on the left already.
    """
    missing = max(dropped, default=0)
    if missing == 0:
        return logits_BTV
    batch, _, vocabulary = logits_BTV.shape
    return torch.cat((logits_BTV.new_zeros(batch, missing, vocabulary), logits_BTV), dim=1)
