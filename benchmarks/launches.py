"""How often the host asks the device for something: operators that compute, copies from the host, waits.

It needs no GPU: what a prefill asks for does not depend on where it runs, a few kernels' choice aside. What is not an
operator of torch is not seen: Triton kernels, compiled code, replayed CUDA graphs; there the kernels that the profiler
saw count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OUTSIDE = "other"
# They only reserve memory; neither their schemas nor their tags say so.
_ALLOCATIONS = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::empty_permuted", "aten::new_empty",
    "aten::new_empty_strided",
}  # fmt: skip
_COPIES = ("aten::_to_copy", "aten::copy_")
_TO_HOST = "aten::_local_scalar_dense"  # what `item`, `bool`, `int` and `float` of a tensor come down to
# On a CPU these make no operator, on another device they are copies.
_FROM_LISTS = (torch.tensor, torch.as_tensor, torch.from_numpy)
_TO_LISTS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)


class LaunchCounter:
    """Context manager that counts, by part (see :meth:`part`), what is asked of a device.

    Attributes:
        launches: (part, operator) -> calls that compute on the device, each at least one kernel there. No launch:
            views, other shapes or strides of the same memory, reserved memory, results without elements, copies
            between host and device.
        uploads: part -> copies from the host to the device. While counting on a CPU: tensors made from lists, which
            would be copied elsewhere.
        waits: part -> times the host waits for a value of the device: `item`, `tolist`, truth values, shapes that
            depend on values. While counting on a CPU a `.to("cpu")` cannot be told from a step that stays where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launches: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._open = [OUTSIDE]
        self._modes = ExitStack()

    def __enter__(self) -> LaunchCounter:
        self._modes.enter_context(_Calls(self))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._modes.close()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts a block under a name; of nested blocks the inner one counts."""
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()

    def launches_of(self, part: str | None = None) -> int:
        """Launches of one part, or of all."""
        return sum(count for (name, _), count in self.launches.items() if part in (None, name))

    def operator(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Takes in one call that has been carried out."""
        part, name = self._open[-1], func._schema.name
        if name == _TO_HOST:
            self.waits[part] += args[0].device.type == self.device.type
            return
        if name in _COPIES:
            source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], result)
            if "cpu" in (source.device.type, target.device.type) and source.device != target.device:
                (self.waits if target.device.type == "cpu" else self.uploads)[part] += 1
                return
        if _shape_depends_on_values(func, args):
            self.waits[part] += 1
        if self._computes(func, args, kwargs, result):
            self.launches[part, name] += 1

    def padded_rows(self, rows: int) -> None:
        """Takes in a `pad_sequence`: one fill, one copy per row."""
        self.launches[self._open[-1], "aten::full"] += 1
        self.launches[self._open[-1], "aten::copy_"] += rows

    def call(self, func: Any, args: tuple, result: Any) -> None:
        """Takes in one call from Python, which operators may or may not have come of."""
        if self.device.type != "cpu":
            return  # the copies are operators there
        if func in _FROM_LISTS and not isinstance(args[0] if args else None, Tensor) and result.numel():
            self.uploads[self._open[-1]] += 1
        elif func in _TO_LISTS:
            self.waits[self._open[-1]] += 1

    def _computes(self, func: Any, args: tuple, kwargs: dict, result: Any) -> bool:
        schema = func._schema
        if schema.name in _ALLOCATIONS or torch.Tag.inplace_view in func.tags:
            return False
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if schema.is_mutable:
            changed = results or given[:1]
        elif results:
            memory = {tensor.untyped_storage()._cdata for tensor in given}
            changed = [tensor for tensor in results if tensor.untyped_storage()._cdata not in memory]
        else:
            # A question about values (`equal`); questions about shapes are answered by the host.
            changed = given[:1] if torch.Tag.data_dependent_output in func.tags else []
        return any(tensor.numel() and tensor.device.type == self.device.type for tensor in changed)


def _shape_depends_on_values(func: Any, args: tuple) -> bool:
    """Whether the host has to look at the device's values to go on."""
    name = func._schema.name
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masks and (name == "aten::index" or args[2].numel() > 1)  # one value: a masked fill
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class _Operators(TorchDispatchMode):
    def __init__(self, counter: LaunchCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.pad_sequence.default:
            # Made of others too, but of more of them when it is watched.
            self.counter.padded_rows(len(args[0]))
            return func(*args, **kwargs)
        # Under inference mode operators that are made of others (`linear`, `reshape`) arrive in one piece.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.counter.operator(func, args, kwargs, result)
        return result


class _Calls(TorchFunctionMode):
    def __init__(self, counter: LaunchCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counter.call(func, args, result)
        return result
