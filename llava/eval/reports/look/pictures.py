"""Pictures inside the page: each once, scaled so that all of them together stay below a number of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Hashable
from typing import Any

from PIL import Image, features

SIDES = (448, 384, 336, 288, 240, 192, 144, 96, 64)
"""Longest sides in pixels that are tried, from the largest."""
_QUALITY = 72


def encode(image: Image.Image, side: int) -> bytes:
    """The picture with a longest side of at most `side`, as WebP or, where this Pillow has none, JPEG."""
    scale = side / max(image.size)
    if scale < 1:
        size = tuple(max(round(length * scale), 1) for length in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, _format(), quality=_QUALITY)
    return stream.getvalue()


def _format() -> str:
    return "WEBP" if features.check("webp") else "JPEG"


def data_uri(data: bytes) -> str:
    """Encoded bytes as a page can hold them."""
    return f"data:image/{_format().lower()};base64,{base64.b64encode(data).decode('ascii')}"


class Pictures:
    """Collects pictures by a key; the loader of one is called when it is first met, and may raise `SampleError`.

    Only scaled copies are kept, so that thousands of photographs do not fill the memory.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._numbers: dict[Hashable, int | None] = {}
        self._kept: list[tuple[bytes, tuple[int, int]]] = []
        self._side = 0
        self.problems: list[str] = []

    def add(self, key: Hashable, load: Callable[[], Image.Image]) -> int | None:
        """The number of a picture; None if it cannot be read, which is noted in `problems`."""
        from llava.eval.answering.adapter import SampleError

        if key not in self._numbers:
            try:
                image = load()
            except SampleError as error:
                self._numbers[key] = None
                self.problems.append(str(error))
                return None
            self._numbers[key] = len(self._kept)
            self._kept.append((encode(image, SIDES[self._side]), image.size))
            self._shrink()
        return self._numbers[key]

    def _shrink(self) -> None:
        while self._bytes() > self.most_bytes and self._side + 1 < len(SIDES):
            self._side += 1
            for number, (data, size) in enumerate(self._kept):
                with Image.open(io.BytesIO(data)) as image:
                    if max(image.size) > SIDES[self._side]:
                        self._kept[number] = encode(image.convert("RGB"), SIDES[self._side]), size

    def _bytes(self) -> int:
        return sum(len(data) * 4 // 3 + 80 for data, _ in self._kept)

    def as_json(self) -> list[dict[str, Any]]:
        """What the page gets: the data and the size of the original, by number."""
        return [{"d": data_uri(data), "w": width, "h": height} for data, (width, height) in self._kept]
