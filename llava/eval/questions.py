"""LLaVA question files: reading, validating, cutting into chunks.

Knows the JSON-lines format (`question_id`, `text`, optional `image`); opens no image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llava.eval.jsonio import iter_jsonl, require_keys
from llava.utils import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    index: position among the questions of the file, from 0; source: "file:line" for messages; id: as in the
    file (int or str, not unique in TextVQA and MME); text: before any template; image: path relative to the
    image folder, None for a question without image; fields: further keys that go into the answer.
    """

    index: int
    source: str
    id: Any
    text: str
    image: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> tuple[str, str]:
        """What an answer is recognized by: ids alone are shared by several questions of an image."""
        return str(self.id), self.text


class Selected(Sequence):
    """Some items of a sequence, by position; copies nothing."""

    def __init__(self, items: Sequence[Item], positions: Sequence[int]) -> None:
        self._items, self._positions = items, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selected(self._items, self._positions[index])
        return self._items[int(self._positions[index])]

    def __iter__(self) -> Iterator[Any]:
        for position in self._positions:
            yield self._items[int(position)]


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file; `UserError` names file and line of the first bad one."""
    questions = []
    for number, record in iter_jsonl(path, "question file"):
        source = f"{path}:{number}"
        require_keys(record, ("question_id", "text"), source)
        identity, text, image = record["question_id"], record["text"], record.get("image")
        if isinstance(identity, bool) or not isinstance(identity, int | str):
            raise UserError(f"{source}: question_id must be a number or a string, found {identity!r}")
        if not isinstance(text, str):
            raise UserError(f"{source}: text must be a string, found {type(text).__name__}")
        if image is not None and not isinstance(image, str):
            raise UserError(f"{source}: image must be a string, found {type(image).__name__}")
        _require_encodable(source, str(identity), text, image or "")
        questions.append(Question(len(questions), source, identity, text, image or None))
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions


def _require_encodable(source: str, *texts: str) -> None:
    # JSON can spell half a surrogate pair, which no file and no tokenizer takes.
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
