"""The cap on visual tokens per image (``visual_token_num``), applied before any method selects.

Shapes: B batch rows, V visual tokens (padded), G crops of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava.pruning.budget import crop_quotas
from llava.pruning.engine.view import LayerView
from llava.pruning.selection import descending_order, on_device
from llava.pruning.types import Selection


def cap_by_cls(view: LayerView, cap: int) -> Selection | None:
    """Of every crop its quota of visual tokens with the highest CLS attention; None where nothing exceeds the cap.

    CLS attention is a distribution within one crop, so its values are not compared across crops. (The published code
    ranks within crops too, with the cap as the number per crop, and fails for several crops unless all are kept.)
    """
    rows = [_row_groups(images, count, cap) for images, count in zip(view.images, view.counts, strict=True)]
    keep = tuple(sum(quotas) for _, _, quotas in rows)
    if keep == view.counts:
        return None
    width, device = max(view.counts), view.device
    most = max(len(quotas) for _, _, quotas in rows)
    # One group more than any row has: it takes the padding, and keeps nothing.
    group_BV = on_device([groups + [most] * (width - len(groups)) for groups, _, _ in rows], device)
    starts_BG, quotas_BG = (
        on_device([row[part] + [0] * (most + 1 - len(row[part])) for row in rows], device) for part in (1, 2)
    )
    order_BV = descending_order(view.cls_attention_BV, view.counts)
    # A stable sort by crop leaves the tokens of each crop in falling order of attention.
    order_BV = order_BV.gather(1, group_BV.gather(1, order_BV).argsort(dim=1, stable=True))
    sorted_BV = group_BV.gather(1, order_BV)
    rank_BV = torch.arange(width, device=device) - starts_BG.gather(1, sorted_BV)
    kept_BV = torch.where(rank_BV < quotas_BG.gather(1, sorted_BV), order_BV, width)
    return Selection(kept_BV.sort(dim=1).values[:, : max(keep)], keep)


def _row_groups(images: Sequence[Sequence[int]], count: int, cap: int) -> tuple[list[int], list[int], list[int]]:
    """Of one row: the group (image and crop) of each token, where each group starts once sorted, and its quota."""
    groups: list[int] = []
    quotas: list[int] = []
    sizes: list[int] = []
    for labels in images:
        # The engine leaves out a patch that ends its prompt, see Sequences.start.
        labels = labels[: count - len(groups)]
        first = len(sizes)
        in_order = {crop: first + number for number, crop in enumerate(sorted(set(labels)))}
        own = [0] * len(in_order)
        for crop in labels:
            groups.append(in_order[crop])
            own[in_order[crop] - first] += 1
        sizes += own
        quotas += crop_quotas(own, cap)
    starts = [sum(sizes[:group]) for group in range(len(sizes))]
    return groups, starts, quotas
