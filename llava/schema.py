"""What a value from a file must look like, said once where the file is read.

    QUESTION = Fields({"question_id": ID, "text": TEXT, "image?": optional(TEXT)})
    check(record, QUESTION, "questions.jsonl:7")

raises `UserError("questions.jsonl:7: text must be a string, found null")`. Keys that a shape does not name may hold
anything. A shape is an object with `problem(value)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llava.utils import UserError, kind_of

Problem = tuple[str, str]
"""Where inside the value (".answers[2]"; empty for the value itself), and what is wrong there."""
_SHOWN = 40  # characters of a value in a message
LARGEST = 2**63 - 1
"""Whole numbers beyond it fit no integer type of the libraries behind us."""
_MOST = 1e100  # sums and products of a few such numbers are still finite; NaN and infinity are beyond it


def check(value: Any, shape: Any, where: str) -> Any:
    """Returns `value`; raises `UserError`, beginning with `where`, if it has not this shape."""
    problem = shape.problem(value)
    if problem is None:
        return value
    path, complaint = problem
    path = re.sub(r"^\[(\d+)\]", r"entry \1", path.removeprefix("."))
    if path:
        path += " " if complaint.startswith("must") else ": "
    raise UserError(f"{where}: {path}{complaint}")


@dataclass(frozen=True)
class Kind:
    """A single value. name: with its article, for messages; accepts: whether a value is one."""

    name: str
    accepts: Callable[[Any], bool]

    def problem(self, value: Any) -> Problem | None:
        return None if self.accepts(value) else ("", f"must be {self.name}, found {kind_of(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


TEXT = Kind("a string", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number", _is_whole)
NUMBER = Kind("a number of at most 100 digits", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
ID = Kind("a number or a string", lambda value: isinstance(value, str | int | float) and not isinstance(value, bool))
SCALAR = Kind("a number, a string or null", lambda value: value is None or isinstance(value, str | int | float))
ANYTHING = Kind("anything", lambda value: True)


def at_least(least: float, kind: Kind = WHOLE) -> Kind:
    """A number that is not below `least`."""
    return Kind(f"{kind.name} of at least {least}", lambda value: kind.accepts(value) and value >= least)


def between(least: float, most: float, kind: Kind = NUMBER) -> Kind:
    """A number from `least` to `most`, both included."""
    return Kind(f"{kind.name} from {least} to {most}", lambda value: kind.accepts(value) and least <= value <= most)


def above(bound: float, kind: Kind = NUMBER) -> Kind:
    """A number that is greater than `bound`."""
    return Kind(f"{kind.name} above {bound}", lambda value: kind.accepts(value) and value > bound)


def one_of(*values: Any) -> Kind:
    """One of a few constants."""
    listed = ", ".join(map(repr, values))
    return Kind(f"one of {listed}", lambda value: any(type(value) is type(v) and value == v for v in values))


@dataclass(frozen=True)
class _Optional:
    shape: Any

    def problem(self, value: Any) -> Problem | None:
        return None if value is None else self.shape.problem(value)


def optional(shape: Any) -> _Optional:
    """Null, or what `shape` says."""
    return _Optional(shape)


@dataclass(frozen=True)
class ListOf:
    """A list of values of one shape, with a number of entries."""

    shape: Any
    least: int = 0
    most: int | None = None

    def problem(self, value: Any) -> Problem | None:
        if not isinstance(value, list):
            return "", f"must be a list, found {kind_of(value)}"
        if len(value) < self.least or (self.most is not None and len(value) > self.most):
            exact = self.least == self.most
            return "", f"must have {self.least}{'' if exact else ' or more'} entries, found {len(value)}"
        for index, item in enumerate(value):
            problem = self.shape.problem(item)
            if problem is not None:
                return f"[{index}]{problem[0]}", problem[1]
        return None


@dataclass(frozen=True)
class MapOf:
    """An object whose keys are ids or names, with values of one shape."""

    shape: Any
    least: int = 0

    def problem(self, value: Any) -> Problem | None:
        if not isinstance(value, dict):
            return "", f"must be an object, found {kind_of(value)}"
        if len(value) < self.least:
            return "", f"must have {self.least} or more entries, found {len(value)}"
        for key, item in value.items():
            problem = self.shape.problem(item)
            if problem is not None:
                return f".{ascii(key)[1:-1][:_SHOWN]}{problem[0]}", problem[1]
        return None


class Fields:
    """An object with named keys; a name that ends in `?` may be missing."""

    def __init__(self, shapes: Mapping[str, Any]) -> None:
        self._shapes = [(name.removesuffix("?"), shape, not name.endswith("?")) for name, shape in shapes.items()]

    def problem(self, value: Any) -> Problem | None:
        if not isinstance(value, dict):
            return "", f"must be an object, found {kind_of(value)}"
        for key, shape, needed in self._shapes:
            if key not in value:
                if needed:
                    return "", f"key {key!r} is missing"
                continue
            problem = shape.problem(value[key])
            if problem is not None:
                return f".{key}{problem[0]}", problem[1]
        return None
