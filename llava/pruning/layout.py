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
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self) -> None:
        for row, spans in enumerate(self.spans):
            previous_end = 0
            for start, end in spans:
                if start < previous_end or end <= start:
                    raise ValueError(
                        f"row {row}: visual span ({start}, {end}) is empty, negative, unsorted or overlaps its neighbor"
                    )
                previous_end = end

    @classmethod
    def from_spans(cls, rows: Iterable[Iterable[Sequence[int]]]) -> VisualLayout:
        """Build a layout from one iterable of ``(start, end)`` pairs per batch row.

        Raises:
            ValueError: a span is empty, negative, out of order or overlaps another one.
        """
        return cls(tuple(tuple((int(start), int(end)) for start, end in row) for row in rows))

    @property
    def batch_size(self) -> int:
        return len(self.spans)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of visual tokens per row."""
        return tuple(sum(end - start for start, end in spans) for spans in self.spans)

    def expand(self, repeats: int) -> VisualLayout:
        """Repeat every row ``repeats`` times in place, as beam search and several return sequences do."""
        return VisualLayout(tuple(spans for spans in self.spans for _ in range(repeats)))
