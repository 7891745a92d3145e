"""The model that lmms-eval runs: one of its own, with a method attached while it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string

from llava.integrations.pruned import Tally, attached, check_prunable, take_method
from llava.utils import UserError

if TYPE_CHECKING:
    from llava.pruning.method import PruningMethod


class Pruned(lmms):
    """A model of lmms-eval under a method. Whatever is not said here is the base's: device, batches, tokenizer, ...

    Attributes:
        base: the model of lmms-eval.
        method: may be exchanged between evaluations.
        is_simple: whether the base takes lmms-eval's simple prompts or messages for a chat template.
        tally: what was measured since the last `begin`.
        stays: lmms-eval may not give the model away after an evaluation.
    """

    is_simple: bool = True
    stays = False

    def __init__(self, base: Any, method: PruningMethod) -> None:
        check_prunable(base.model, f"base {type(base).__name__}")
        super().__init__()
        self.base = base
        self.is_simple = base.is_simple
        self.method = method
        self.tally = Tally()
        # One dictionary for both: lmms-eval fills ours, the base reads its own.
        self.task_dict = base.task_dict
        self._rank, self._world_size = base.rank, base.world_size

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Pruned:
        """From `--model_args`: `base=NAME`, what describes the method, and the arguments of the base."""
        arguments = simple_parse_args_string(arg_string)
        name = arguments.pop("base", None)
        if name is None:
            raise UserError("--model_args: base=NAME is missing: the name of a model of lmms-eval, such as llava_hf")
        method = take_method(arguments)
        more = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(get_model(str(name), force_simple=cls.is_simple)(**arguments, **more), method)

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not there yet
            raise AttributeError(name)
        return getattr(self.base, name)

    def begin(self, method: PruningMethod) -> None:
        """Exchange the method and measure anew."""
        self.method, self.tally = method, Tally()

    def measured(self) -> Mapping[str, Any]:
        """The method, its options and the means over the prompts since `begin`."""
        return {"method": self.method.name, "options": self.method.settings(), **self.tally.means()}

    def generate_until(self, requests: list[Any]) -> list[Any]:
        return self._answer("generate_until", requests)

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        return self._answer("generate_until_multi_round", requests)

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return self._answer("loglikelihood", requests)

    def _answer(self, how: str, requests: list[Any]) -> list[Any]:
        with attached(self.method, self.base.model, self.tally):
            answers = getattr(self.base, how)(requests)
        # lmms-eval puts means of what is logged here under "throughput" of its results.
        means = {f"pruned_{name}": value for name, value in self.tally.means().items()}
        if means:
            told = {"pruned_method": self.method.name, "pruned_options": str(self.method.settings())}
            log_metrics(0.0, 0, 0.0, {**means, **told})
        return answers

    def set_cache_hook(self, cache_hook: Any) -> None:
        super().set_cache_hook(cache_hook)
        self.base.set_cache_hook(cache_hook)

    def clean(self) -> None:
        if not self.stays:
            self.base.clean()


class PrunedChat(Pruned):
    """The same where lmms-eval does not insist on simple prompts: the chat wrapper of the base, if it has one."""

    is_simple = False
