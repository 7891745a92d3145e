"""LLaVA question files: JSON lines of `question_id`, `text` and, optionally, `image` or `images`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llava.jsonfiles import iter_jsonl, require_keys
from llava.utils import UserError

Item = TypeVar("Item")


class HasImages(Protocol):
    """Something asked about images, by their names."""

    @property
    def images(self) -> tuple[str, ...]: ...


Asked = TypeVar("Asked", bound=HasImages)


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    index: position among the questions of the file, from 0; source: "file:line" for messages; id: as in the
    file (int or str, not unique in TextVQA and MME); text: before any template; images: paths relative to the
    image folder, in the order of their places in the text (one name or None will do as well); fields: further
    keys that go into the answer; problem: why the question cannot be asked, if its reader knows.
    """

    index: int
    source: str
    id: Any
    text: str
    images: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    problem: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        images = (self.images,) if isinstance(self.images, str) else tuple(self.images or ())
        object.__setattr__(self, "images", images)

    @property
    def image(self) -> str | None:
        """The first image; None for a question without."""
        return self.images[0] if self.images else None

    @property
    def key(self) -> tuple[str, str]:
        """What an answer is recognized by: ids alone are shared by several questions of an image."""
        return str(self.id), self.text


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file.

    Raises:
        UserError: a line is bad (names file and line), or the file holds no question.
    """
    records = iter_jsonl(path, "question file")
    questions = [_question(record, index, f"{path}:{number}") for index, (number, record) in enumerate(records)]
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions


def _question(record: dict[str, Any], index: int, source: str) -> Question:
    require_keys(record, ("question_id", "text"), source)
    identity, text, images = record["question_id"], record["text"], image_names(record, source)
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise UserError(f"{source}: question_id must be a number or a string, found {identity!r}")
    if not isinstance(text, str):
        raise UserError(f"{source}: text must be a string, found {type(text).__name__}")
    require_encodable(source, str(identity), text, *images)
    return Question(index, source, identity, text, images)


def image_names(record: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """The images of a record: `images`, a list, or `image`, one name or a list; none if neither is there.

    Raises:
        UserError: something else than names; the message begins with `source`.
    """
    key = "images" if record.get("images") is not None else "image"
    value = record.get(key)
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) and key == "image" else value
    if not isinstance(names, list):
        wanted = "a string or a list of strings" if key == "image" else "a list of strings"
        raise UserError(f"{source}: {key} must be {wanted}, found {type(value).__name__}")
    for name in names:
        if not isinstance(name, str) or not name:
            raise UserError(f"{source}: {key} must hold the names of image files, found {name!r}")
    return tuple(names)


def require_encodable(source: str, *texts: str) -> None:
    """Raises a `UserError` for half a surrogate pair: JSON can spell it, but no file and no tokenizer takes it."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{source}: holds characters that are not valid Unicode") from None


def chunk(items: Sequence[Item], num_chunks: int, chunk_idx: int) -> Sequence[Item]:
    """Part `chunk_idx` (from 0) of `num_chunks` contiguous parts, cut as upstream does.

    All parts but the last have ceil(n / num_chunks) items; late parts may be empty.
    """
    if num_chunks < 1:
        raise UserError(f"--num-chunks must be at least 1, got {num_chunks}")
    if not 0 <= chunk_idx < num_chunks:
        raise UserError(f"--chunk-idx must be from 0 to {num_chunks - 1}, got {chunk_idx}")
    size = math.ceil(len(items) / num_chunks)
    return items[chunk_idx * size : (chunk_idx + 1) * size]


def most_images(questions: Iterable[Question]) -> int:
    """The largest number of images that a question has."""
    return max((len(question.images) for question in questions), default=0)


def spread(questions: Sequence[Asked], limit: int | None) -> list[Asked]:
    """About `limit` questions (all for None), spread evenly over the file, images kept whole.

    Consecutive questions about one image stay together: MME scores images by both of their questions, and the
    categories of POPE follow one another in the file, so its first questions would be one category only.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    groups: list[list[Asked]] = []
    for question in questions:
        if groups and question.images and groups[-1][0].images == question.images:
            groups[-1].append(question)
        else:
            groups.append([question])
    wanted = max(1, round(limit * len(groups) / len(questions)))
    chosen = [groups[i * len(groups) // wanted] for i in range(wanted)]
    return [question for group in chosen for question in group]
