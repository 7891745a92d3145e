"""Reduced images: from the crops of a prompt row to the tokens that reach the projector, in the order of the prompt.

Stands between the tower and the projector when the attached method works there. The choice is the method's (see
`llava.pruning.reduction`); here are arrangements of crops, budgets of rows, and the places of newlines.

Shapes: P features per crop, K visual tokens left of an image, N tokens with newlines, C tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.model.assemble import NEWLINE, Arrangement
from llava.pruning.engine.protocol import Method
from llava.pruning.reduction import Crop, ReducedCrop, reduce_crops, row_budget, runs


@dataclass(frozen=True)
class Place:
    """Where an image that was reduced stood.

    Attributes:
        origins_K: for every visual token its index among the image's visual tokens before, -1 for merged ones.
        places_N: for every token, newlines included, its index among the image's tokens before.
        visual_tokens: visual tokens before.
        length: tokens before, newlines included.
    """

    origins_K: Tensor
    places_N: Tensor
    visual_tokens: int
    length: int


@dataclass(frozen=True)
class ReducedImage:
    """Features `[K, C]` before the projector, which of the N tokens are newlines, and where all of them stood."""

    features_KC: Tensor
    is_newline: list[bool] | None
    place: Place

    def tokens(self, projected_KC: Tensor, newline: Tensor | None) -> Tensor:
        """The projected features with newlines in their places, `[N, C]`."""
        if self.is_newline is None:
            return projected_KC
        tokens = projected_KC.new_empty(len(self.is_newline), projected_KC.shape[1])
        tokens[torch.tensor(self.is_newline)] = newline.to(projected_KC)
        tokens[~torch.tensor(self.is_newline)] = projected_KC
        return tokens

    def spans(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Intervals of visual tokens and of newlines."""
        kinds = [False] * len(self.features_KC) if self.is_newline is None else self.is_newline
        return tuple(runs(kinds, False)), tuple(runs(kinds, True))


def crop_targets(method: Method, arrangements: Sequence[Arrangement], images_per_row: Iterable[int]) -> list[list[int]]:
    """Budget of every crop of every image: a row's budget is spread over all crops of its images."""
    sizes = [_crop_sizes(arrangement) for arrangement in arrangements]
    targets: list[list[int]] = []
    for images in images_per_row:
        row = sizes[len(targets) : len(targets) + images]
        shares = iter(row_budget(method, row))
        targets += [[next(shares) for _ in image] for image in row]
    return targets


def _crop_sizes(arrangement: Arrangement) -> list[int]:
    return [arrangement.crops.count(crop) for crop in dict.fromkeys(arrangement.crops)]


def reduce_images(
    method: Method,
    features: Sequence[Tensor],
    facts: Sequence[Mapping[str, Tensor]],
    cls_tokens: Sequence[Tensor] | None,
    arrangements: Sequence[Arrangement],
    targets: Sequence[Sequence[int]],
    rows: Sequence[int],
    project: Callable[[Tensor], Tensor] | None,
    texts: Sequence[Tensor] | None,
    padding: Sequence[Tensor | None],
) -> list[ReducedImage]:
    """Let the method reduce all crops of a batch and put the images together.

    Args:
        method: what reduces.
        features: per image `[crops, P, C]`.
        facts: per image and name, in the order of the image's visual tokens.
        cls_tokens: per image `[crops, C]`, if there are any.
        arrangements: per image.
        targets: per image, tokens of each crop, see `crop_targets`.
        rows: per image the prompt that it belongs to.
        project: the projector, for methods that look behind it; None: these are projected features.
        texts: per prompt the embeddings of its text; None: nobody asks.
        padding: per image which visual tokens lie outside of the picture, bool on the features' device, or None.
    """
    crops: list[Crop] = []
    flat_targets: list[int] = []
    for i, arrangement in enumerate(arrangements):
        values = arrangement.gather(features[i])
        patches = arrangement.source_N[arrangement.source_N != NEWLINE] % arrangement.patches
        for crop in dict.fromkeys(arrangement.crops):
            own = _members(arrangement, crop)
            index = own.to(values.device, non_blocking=True)  # a plain copy to a GPU would wait for the tower
            crops.append(
                Crop(
                    values[index],
                    {name: fact[index] for name, fact in facts[i].items()},
                    patches[own].to(values.device, non_blocking=True),
                    arrangement.patches,
                    None if cls_tokens is None else cls_tokens[i][crop],
                    rows[i],
                    None if (outside := padding[i]) is None else outside[index],
                )
            )
        flat_targets += targets[i]
    reduced = iter(reduce_crops(method, crops, flat_targets, project, texts))
    return [
        put_together(arrangement, [next(reduced) for _ in own])
        for arrangement, own in zip(arrangements, targets, strict=True)
    ]


def put_together(arrangement: Arrangement, crops: Sequence[ReducedCrop]) -> ReducedImage:
    """One image of its reduced crops: tokens at the places of their patches, what stands behind at the end."""
    device = crops[0].tokens_KC.device
    is_patch = arrangement.source_N != NEWLINE
    places = is_patch.nonzero().flatten().to(device, non_blocking=True)
    newlines = (~is_patch).nonzero().flatten().to(device, non_blocking=True)
    end = int(is_patch.nonzero()[-1]) + 1
    keys, tokens, origins, sources = [newlines.double()], [], [newlines.new_full(newlines.shape, -2)], [newlines]
    for crop, part in zip(dict.fromkeys(arrangement.crops), crops, strict=True):
        index = _members(arrangement, crop).to(device, non_blocking=True)
        keys.append(part.order(places[index], end))
        tokens.append(part.tokens_KC)
        origins.append(torch.where(part.origin_K < 0, -1, index[part.origin_K.clamp_min(0)]))
        sources.append(places[index][part.source_K])
    order = torch.cat(keys).argsort(stable=True)
    origin = torch.cat(origins)[order]
    # Without newlines nothing here waits for the device.
    is_newline = (origin == -2).tolist() if len(newlines) else None
    visual = order[origin != -2] if len(newlines) else order
    return ReducedImage(
        torch.cat(tokens)[visual - len(newlines)],
        is_newline,
        Place(
            origin[origin != -2] if len(newlines) else origin,
            torch.cat(sources)[order],
            len(arrangement.crops),
            len(arrangement.source_N),
        ),
    )


def _members(arrangement: Arrangement, crop: int) -> Tensor:
    """Which of the image's visual tokens are of this crop."""
    return (torch.tensor(arrangement.crops) == crop).nonzero().flatten()
