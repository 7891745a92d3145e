"""Where the visual tokens of each sample are.

The layout is the only thing the engine knows about the prompt. It counts positions in the sequence handed to the
decoder, left padding included, and says nothing about images, tiles or templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class VisualLayout:
    """Spans of visual tokens, one tuple of half-open ``(start, end)`` intervals per batch row.

    Spans are sorted, do not overlap and are not empty. A row without spans is a text-only prompt.

    Attributes:
        spans: the intervals.
        lengths: real tokens per row, where known; without them they are read from the attention mask, for which the
            host has to wait for the device.
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None and len(self.lengths) != len(self.spans):
            raise ValueError(f"{len(self.spans)} rows of spans but {len(self.lengths)} lengths")
        for row, spans in enumerate(self.spans):
            previous_end = 0
            for start, end in spans:
                if start < previous_end or end <= start:
                    raise ValueError(
                        f"row {row}: visual span ({start}, {end}) is empty, negative, unsorted or overlaps its neighbor"
                    )
                previous_end = end

    @classmethod
    def from_spans(cls, rows: Iterable[Iterable[Sequence[int]]], lengths: Iterable[int] | None = None) -> VisualLayout:
        """Build a layout from one iterable of ``(start, end)`` pairs per batch row.

        Raises:
            ValueError: a span is empty, negative, out of order or overlaps another one.
        """
        spans = tuple(tuple((int(start), int(end)) for start, end in row) for row in rows)
        return cls(spans, None if lengths is None else tuple(lengths))

    @property
    def batch_size(self) -> int:
        return len(self.spans)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of visual tokens per row."""
        return tuple(sum(end - start for start, end in spans) for spans in self.spans)

    def expand(self, repeats: int) -> VisualLayout:
        """Repeat every row ``repeats`` times in place, as beam search and several return sequences do."""
        lengths = None if self.lengths is None else tuple(n for n in self.lengths for _ in range(repeats))
        return VisualLayout(tuple(spans for spans in self.spans for _ in range(repeats)), lengths)
