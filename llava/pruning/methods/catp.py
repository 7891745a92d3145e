"""CATP, "Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning" (AAAI 2026,
arXiv 2508.07871), for prompts of several images: demonstrations, and a query at the end.

In two stages. Among the input embeddings, of each image by itself and greedily: the chosen tokens shall cover all of
the image's (facility location, a token is covered as well as by the most similar chosen one) and be like the text that
belongs to the image, the mean of its embeddings (weight ``alignment``); cosines are moved to 0..1. In decoder layer K
then the tokens of the demonstrations compete, all together: their score is the growth of the attention of the prompt's
last token from layer K - 1 to K (mean over heads, not below 0) plus ``relevance`` times the cosine of their state and
the mean state of the query, picture and text. In layer K + 1 those tokens of the query's image stay that are most like
the mean state of what is left of the demonstrations.

Budget: the paper gives a share R of the tokens to drop, half of it in each stage: 1 - R/2 of them enter the decoder and
1 - R leave layer K + 1. ``target_tokens`` is the *processed* mean, for which R is solved; ``drop`` gives R instead. So
budgets below about half of what the first K + 1 layers of the decoder take cannot be met.

No code is public; the paper's text is what this is built from. It leaves open, and here it is: layers count from 0 (6
in the decoders of 28 and 32 layers, 10 of 40, other depths in proportion to 6 of 32); the state *at* a layer is the one
that leaves it; the text of an image is what stands between it and the next (images side by side share the one behind
them); the demonstrations' mean is that of their texts and their tokens that are left; survivors are renumbered. Beyond
the paper: a prompt of a single image has no demonstrations, so its own tokens are chosen in layer K by the score of
demonstrations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from llava.pruning.budget import nearest_plan
from llava.pruning.coverage import coverage_order
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod
from llava.pruning.selection import on_device, top_k
from llava.pruning.types import BEFORE_DECODER, Rows, Selection

_LAYER, _DEPTH = 6, 32
_PUBLISHED = {28: 6, 32: 6, 40: 10}


@dataclass(frozen=True)
class Plan:
    """Tokens of one prompt: of each image behind the first stage, in all behind layer K and behind layer K + 1."""

    images: tuple[int, ...]
    behind: int
    left: int

    @classmethod
    def of(cls, sizes: Sequence[int], drop: float) -> Plan:
        """For images of these sizes and a share ``drop`` of their tokens; of each image at least one token stays."""
        images = tuple(max(int(size * (1 - drop / 2)), min(size, 1)) for size in sizes)
        demonstrations = min(max(int(sum(sizes[:-1]) * (1 - drop)), len(sizes) > 1), sum(images[:-1]))
        query = min(max(int(sizes[-1] * (1 - drop)), 1), images[-1]) if sizes else 0
        if len(sizes) < 2:
            return cls(images, query, query)
        return cls(images, demonstrations + images[-1], demonstrations + query)

    def entering(self, num_layers: int, layer: int) -> list[int]:
        """Tokens that each decoder layer works on."""
        return ([sum(self.images)] * (layer + 1) + [self.behind] + [self.left] * num_layers)[:num_layers]


@lru_cache(maxsize=1024)
def planned(sizes: tuple[int, ...], num_layers: int, layer: int, target: int) -> Plan:
    """The plan whose mean over the layers comes closest to ``target``; the last stage takes up the rounding."""
    share = nearest_plan(
        lambda left: Plan.of(sizes, 1 - left).entering(num_layers, layer), sum(sizes), target, "nominal"
    )
    plan, layers = Plan.of(sizes, 1 - share), num_layers - layer - 2
    if len(sizes) < 2 or layers < 1:
        return plan
    missing = round((target * num_layers - sum(plan.entering(num_layers, layer))) / layers)
    demonstrations = plan.behind - plan.images[-1]
    return replace(plan, left=min(max(plan.left + missing, demonstrations + 1), plan.behind))


@dataclass(frozen=True, kw_only=True)
class CATP(DecoderMethod):
    """Coverage and alignment per image, then the demonstrations by the query and the query by them.

    Attributes:
        drop: share of the tokens to drop; replaces ``target_tokens``.
        layer: layer K; None: by the depth.
        alignment: weight of the likeness to the image's text (lambda 1).
        relevance: weight of the likeness to the query (lambda 2).
    """

    target_tokens: int | None = 64
    positions: str = "compact"
    drop: float | None = None
    layer: int | None = None
    alignment: float = 0.7
    relevance: float = 0.6

    name: ClassVar[str] = "catp"
    published_budget: ClassVar[str] = "processed"
    instead_of_target: ClassVar[str | None] = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("drop", self.drop is None or 0 <= self.drop < 1, "must lie in 0..1, 1 excluded")
        self.require("layer", self.layer is None or self.layer >= 1, "must be at least 1")
        for option in ("alignment", "relevance"):
            self.require(option, getattr(self, option) >= 0, "must not be negative")

    def _layer(self, num_layers: int) -> int:
        if self.layer is None:
            scaled = _PUBLISHED.get(num_layers, round(_LAYER * num_layers / _DEPTH))
            return max(min(scaled, num_layers - 2), 1)
        self.require("layer", self.layer < num_layers, f"must be below the decoder's {num_layers} layers")
        return self.layer

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        layer = self._layer(num_layers)
        stages = {BEFORE_DECODER: Rows.NONE, layer - 1: Rows.LAST, layer: Rows.LAST, layer + 1: Rows.NONE}
        return {index: rows for index, rows in stages.items() if index < num_layers}

    def select(self, view: LayerView, memory: SimpleNamespace) -> Selection | None:
        layer = self._layer(view.num_layers)
        if view.layer == BEFORE_DECODER:
            return self._of_each_image(view, memory, layer)
        if view.layer == layer - 1:
            memory.carried["attention"] = view.relevance_BV
            return None
        # Which image each token is of, counted from the last one, the query's: 1. In the padding 0.
        is_query = memory.carried["image"].to(view.device) == 1
        first_B1 = view.slots_BV.masked_fill(~is_query, torch.iinfo(torch.long).max).amin(1, keepdim=True)
        if view.layer == layer:
            growth = (view.relevance_BV - memory.carried["attention"].to(view.device)).clamp_min(0)
            query = view.mean_between(first_B1, None)
            score = growth + self.relevance * cosine_similarity(view.hidden_BVC.float(), query, dim=2)
            stays, plans = is_query & memory.several.to(view.device), [plan.behind for plan in memory.plans]
        else:
            context = view.mean_between(view.slots_BV[:, :1], first_B1)
            score = cosine_similarity(view.hidden_BVC.float(), context, dim=2)
            stays, plans = ~is_query, [plan.left for plan in memory.plans]
        keep = tuple(map(min, plans, view.counts))
        if keep == view.counts:
            return None
        return Selection(top_k(score.masked_fill(stays, torch.inf), view.counts, keep), keep)

    def _of_each_image(self, view: LayerView, memory: SimpleNamespace, layer: int) -> Selection | None:
        """The first stage; the host knows how many tokens each image has, unless something was dropped before."""
        rows = image_members(view)
        sizes = [tuple(map(len, images)) for images in rows]
        memory.plans = [
            Plan.of(own, self.drop)
            if self.drop is not None
            else planned(own, view.num_layers, layer, self.target_of(had))
            for own, had in zip(sizes, view.prompt_counts, strict=True)
        ]
        width = max(view.counts)
        numbers = [[len(own) - image for image, size in enumerate(own) for _ in range(size)] for own in sizes]
        memory.carried["image"] = on_device([row + [0] * (width - len(row)) for row in numbers], view.device)
        memory.several = on_device([[len(own) > 1] for own in sizes], view.device)
        keep = tuple(sum(plan.images) for plan in memory.plans)
        if keep == view.counts:
            return None
        text_BIC = text_of_images(view, rows)
        chosen = torch.zeros(len(rows), width, device=view.device)
        # Images of one size with one budget are looked at together.
        stacks: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row, plan in enumerate(memory.plans):
            for image, (size, own) in enumerate(zip(sizes[row], plan.images, strict=True)):
                stacks.setdefault((size, own), []).append((row, image))
        for (_, own), members in stacks.items():
            row_M1 = on_device([[row] for row, _ in members], view.device)
            index_MS = on_device([rows[row][image] for row, image in members], view.device)
            unit = normalize(view.hidden_BVC[row_M1, index_MS].float(), dim=2)
            text = normalize(torch.stack([text_BIC[row, image] for row, image in members]), dim=1)
            likeness = (unit @ unit.transpose(1, 2) + 1) / 2
            aligned = ((unit @ text[:, :, None])[:, :, 0] + 1) / 2
            order = coverage_order(likeness, own, bonus_NP=self.alignment * aligned)
            chosen[row_M1, index_MS.gather(1, order)] = 1
        return Selection(top_k(chosen, view.counts, keep), keep)


def image_members(view: LayerView) -> list[list[list[int]]]:
    """Per row and image the indices of its visual tokens; images of which nothing is left are left out."""
    rows = []
    dropped = view.counts != view.prompt_counts and view.layout is not None
    origins = view.origins_BV.tolist() if dropped else None
    for row, (images, count) in enumerate(zip(view.images, view.counts, strict=True)):
        number_of = [number for number, image in enumerate(images) for _ in image]
        members: dict[int, list[int]] = {}
        number = 0
        for token in range(count):
            patch = token if origins is None else origins[row][token]
            number = number_of[patch] if patch >= 0 else number  # what is merged stands behind its image
            members.setdefault(number, []).append(token)
        rows.append(list(members.values()))
    return rows


def text_of_images(view: LayerView, rows: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Mean embedding of the text between each image and the next, float32 ``[B, I, C]``; where there is none, of the
    text behind the next image.
    """
    most, device = max(map(len, rows)), view.device

    def slots(pick: int) -> Tensor:
        index = [[image[pick] for image in images] + [0] * (most - len(images)) for images in rows]
        return view.slots_BV.gather(1, on_device(index, device))

    begin_BI, end = slots(-1) + 1, torch.full((len(rows), 1), torch.iinfo(torch.long).max, device=device)
    next_BI = torch.cat((slots(0)[:, 1:], end), dim=1)
    last = on_device([[number == len(images) - 1 for number in range(most)] for images in rows], device)
    next_BI = torch.where(last, end, next_BI)
    text_BIC = view.mean_between(begin_BI, next_BI)
    parts = list(text_BIC.unbind(1))
    for image in range(most - 2, -1, -1):
        empty = ((next_BI <= begin_BI) & ~last)[:, image, None]
        parts[image] = torch.where(empty, parts[image + 1], parts[image])
    return torch.stack(parts, 1)
