"""The forms in which callers may pass images and their sizes, brought to one: a list with an entry per image.

What the entries mean together (crops, padding, placeholders) is checked where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llava.utils import UserError

Images = Tensor | Sequence[Tensor]


def split_images(images: Images | None) -> list[Tensor]:
    """One tensor per image: `[3, S, S]`, or `[crops, 3, S, S]` for an image cut into crops.

    Accepts a list of such tensors, a stack `[n, 3, S, S]` or `[n, crops, 3, S, S]`, or one image `[3, S, S]`.
    """
    if images is None:
        return []
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4, 5):
            raise UserError(f"images must have 3 to 5 dimensions, got shape {tuple(images.shape)}")
        return [images] if images.ndim == 3 else list(images)
    for image in images:
        if not isinstance(image, Tensor) or image.ndim not in (3, 4):
            found = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f"images must be tensors [3, S, S] or [crops, 3, S, S], found {found}: "
                "use llava.mm_utils.process_images first"
            )
    return list(images)


def size_list(image_sizes: Any) -> list[tuple[int, int]] | None:
    """Original sizes as `(width, height)` pairs, from a list of pairs, a tensor `[n, 2]`, or one pair."""
    if image_sizes is None:
        return None
    if isinstance(image_sizes, Tensor):
        image_sizes = image_sizes.tolist()
    sizes = list(image_sizes)
    if len(sizes) == 2 and all(isinstance(x, int) for x in sizes):
        sizes = [sizes]  # a single (width, height)
    return [(int(w), int(h)) for w, h in sizes]
