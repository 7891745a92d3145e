"""Where the visual tokens of each sample are.

A layout counts positions in the sequence handed to the decoder, left padding included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Spans = tuple[tuple[int, int], ...]
"""Half-open ``(start, end)`` intervals: sorted, not overlapping, not empty."""


@dataclass(frozen=True)
class VisualLayout:
    """Spans of visual tokens, and of the structure tokens between them, per batch row.

    A row without spans is a text-only prompt. Structure tokens (LLaVA-1.6 closes every row of patches with an
    ``image_newline``) belong to an image but show nothing: they are no candidates of any method, stay in every layer,
    and ask no questions, so the text rows begin behind them.

    Attributes:
        spans: visual tokens (patches only).
        lengths: real tokens per row, where known; without them they are read from the attention mask, for which the
            host has to wait for the device.
        structure: structure tokens; None where there are none.
        crops: per row and image the crop that each visual token comes from (0 = the whole image). None: an image is a
            span, or several that only structure tokens separate, and has one crop.
    """

    spans: tuple[Spans, ...]
    lengths: tuple[int, ...] | None = None
    structure: tuple[Spans, ...] | None = None
    crops: tuple[tuple[tuple[int, ...], ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "structure", "crops"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.spans):
                raise ValueError(f"{len(self.spans)} rows of spans but {len(values)} {name}")
        for row, spans in enumerate(self.spans):
            _check_spans(spans, f"row {row}: visual span")
            if self.structure is not None:
                _check_spans(self.structure[row], f"row {row}: structure span")
                _check_spans(sorted((*spans, *self.structure[row])), f"row {row}: visual or structure span")
            if self.crops is not None and sum(map(len, self.crops[row])) != self.counts[row]:
                raise ValueError(
                    f"row {row}: crops of {sum(map(len, self.crops[row]))} tokens for {self.counts[row]} visual tokens"
                )

    @classmethod
    def from_spans(
        cls,
        rows: Iterable[Iterable[Sequence[int]]],
        lengths: Iterable[int] | None = None,
        structure: Iterable[Iterable[Sequence[int]]] | None = None,
        crops: Iterable[Iterable[Iterable[int]]] | None = None,
    ) -> VisualLayout:
        """Build a layout from one iterable of ``(start, end)`` pairs per batch row; see the attributes for the rest.

        Raises:
            ValueError: a span is empty, negative, out of order or overlaps another one, or numbers of rows differ.
        """
        return cls(
            _spans(rows),
            None if lengths is None else tuple(lengths),
            None if structure is None else _spans(structure),
            None if crops is None else tuple(tuple(tuple(image) for image in row) for row in crops),
        )

    @property
    def batch_size(self) -> int:
        return len(self.spans)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of visual tokens per row."""
        return tuple(map(_total, self.spans))

    @property
    def structure_counts(self) -> tuple[int, ...]:
        """Number of structure tokens per row."""
        return tuple(map(_total, self.structure)) if self.structure is not None else (0,) * self.batch_size

    @property
    def text_starts(self) -> tuple[int, ...]:
        """Where the text behind the last image begins, per row; 0 in rows without images."""
        structure = self.structure or ((),) * self.batch_size
        return tuple(
            max(end for part in (spans, between) for _, end in part[-1:]) if spans else 0
            for spans, between in zip(self.spans, structure, strict=True)
        )

    def image_crops(self, row: int) -> tuple[tuple[int, ...], ...]:
        """``crops`` of one row, or what they are by default."""
        if self.crops is not None:
            return self.crops[row]
        closed = {end for _, end in self.structure[row]} if self.structure is not None else set()
        images: list[int] = []
        for start, end in self.spans[row]:
            if start in closed and images:
                images[-1] += end - start
            else:
                images.append(end - start)
        return tuple((0,) * tokens for tokens in images)

    def expand(self, repeats: int) -> VisualLayout:
        """Repeat every row ``repeats`` times in place, as beam search and several return sequences do."""

        def repeated(rows: Iterable[Any] | None) -> Any:
            return None if rows is None else tuple(row for row in rows for _ in range(repeats))

        return replace(
            self,
            spans=repeated(self.spans),
            lengths=repeated(self.lengths),
            structure=repeated(self.structure),
            crops=repeated(self.crops),
        )


def _spans(rows: Iterable[Iterable[Sequence[int]]]) -> tuple[Spans, ...]:
    return tuple(tuple((int(start), int(end)) for start, end in row) for row in rows)


def _total(spans: Spans) -> int:
    return sum(end - start for start, end in spans)


def _check_spans(spans: Iterable[tuple[int, int]], what: str) -> None:
    previous_end = 0
    for start, end in spans:
        if start < previous_end or end <= start:
            raise ValueError(f"{what} ({start}, {end}) is empty, negative, unsorted or overlaps its neighbor")
        previous_end = end
