"""Carries out what methods do before the decoder: stacks crops of equal size, asks the method, puts the rows together.

The model calls :func:`reduce_crops` in front of its projector. Where nobody did (a bare decoder), the run calls
:func:`reduce_prompt` on the input embeddings.

Shapes: P patches of a crop, K tokens left, C channels, B rows, N tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llava.pruning.budget import crop_quotas
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.protocol import Method
from llava.pruning.pospad import crop_markers
from llava.pruning.selection import on_device
from llava.pruning.vision import ReducedRow, VisionView, unit_rows


@dataclass(frozen=True)
class Crop:
    """One crop to reduce.

    Attributes:
        tokens_PC: features of the patches that are part of the prompt.
        facts: by name, ``[P, ...]``.
        patches_P: their indices in the raster of the crop; None: all patches, in order.
        patches: number of patches of the whole crop.
        cls_C: the CLS token, if any.
        prompt: number of the prompt that it is of.
        padding_P: which of them lie outside of the picture; None: none is known to.
    """

    tokens_PC: Tensor
    facts: Mapping[str, Tensor]
    patches_P: Tensor | None = None
    patches: int | None = None
    cls_C: Tensor | None = None
    prompt: int = 0
    padding_P: Tensor | None = None


@dataclass(frozen=True)
class ReducedCrop:
    """What is left of a crop: tokens, their origin (-1: merged) and source, which of them stand behind the rest, and
    what gives the share of each patch in each token, ``[K, P]`` (None: all of the source).
    """

    tokens_KC: Tensor
    origin_K: Tensor
    source_K: Tensor
    behind_K: Tensor
    weights: Callable[[], Tensor] | None = None

    def with_markers(self, tokens_PC: Tensor) -> ReducedCrop:
        """And a marker in the place of every run of patches that are gone; see :mod:`llava.pruning.pospad`."""
        markers_MC, places_M, shares_MP = crop_markers(tokens_PC, self.origin_K)

        def weights() -> Tensor:
            own = unit_rows(self.source_K, len(tokens_PC)) if self.weights is None else self.weights()
            return torch.cat((own, shares_MP))

        return ReducedCrop(
            torch.cat((self.tokens_KC, markers_MC)),
            torch.cat((self.origin_K, torch.full_like(places_M, -1))),
            torch.cat((self.source_K, places_M)),
            torch.cat((self.behind_K, torch.zeros_like(places_M, dtype=torch.bool))),
            weights,
        )

    def order(self, place_P: Tensor, end: int) -> Tensor:
        """Sort keys, float64, if patch i stands at ``place_P[i]`` and the last patch of the image at ``end - 1``.

        What stands behind gets fractions between ``end - 1`` and ``end``: the first such token of every crop, then the
        second ones, and so on.
        """
        behind = end - 1 + self.behind_K.cumsum(0, dtype=torch.float64) / (len(self.behind_K) + 1)
        return torch.where(self.behind_K, behind, place_P[self.source_K].double())


def row_budget(method: Method, images: Sequence[Sequence[int]]) -> list[int]:
    """Budget of each crop of a row, in proportion to their patches; the cap (per image) bounds the row's budget.

    Args:
        method: its budget for so many patches (None: it has none) and ``visual_token_num`` count.
        images: patches per crop, for each image of the row.
    """
    counts = [count for image in images for count in image]
    most = sum(min(method.visual_token_num or sum(image), sum(image)) for image in images)
    target = method.aim_in_front(sum(counts))
    return crop_quotas(counts, most if target is None else min(target, most))


def unreduced(tokens_KC: Tensor) -> ReducedCrop:
    """All tokens of a crop, as they are."""
    index = torch.arange(len(tokens_KC), device=tokens_KC.device)
    return ReducedCrop(tokens_KC, index, index, torch.zeros_like(index, dtype=torch.bool))


def reduce_crops(
    method: Method,
    crops: Sequence[Crop],
    targets: Sequence[int],
    project: Callable[[Tensor], Tensor] | None = None,
    texts: Sequence[Tensor] | None = None,
) -> list[ReducedCrop]:
    """Let a method reduce crops to their budgets; crops that need not shrink are left alone.

    Args:
        method: what reduces.
        crops: of all prompts.
        targets: tokens that each crop may keep.
        project: the projector, see :class:`~llava.pruning.vision.VisionView`.
        texts: text of each prompt, see there.
    """
    stacks: dict[tuple[int, int, bool], list[int]] = {}
    results: dict[int, ReducedCrop] = {}
    for i, (crop, target) in enumerate(zip(crops, targets, strict=True)):
        if target >= len(crop.tokens_PC):
            results[i] = unreduced(crop.tokens_PC)
        elif target == 0:
            results[i] = unreduced(crop.tokens_PC[:0])
        else:
            stacks.setdefault((len(crop.tokens_PC), target, crop.cls_C is None), []).append(i)
    for (count, target, without_cls), members in stacks.items():
        chosen = [crops[i] for i in members]
        device = chosen[0].tokens_PC.device
        patches = chosen[0].patches or count
        raster = torch.arange(count, device=device)
        width = math.isqrt(patches)
        view = VisionView(
            torch.stack([crop.tokens_PC for crop in chosen]),
            {name: torch.stack([crop.facts[name] for crop in chosen]) for name in chosen[0].facts},
            target,
            torch.stack([raster if crop.patches_P is None else crop.patches_P for crop in chosen]),
            (width, width) if width * width == patches else (patches, 1),
            None if without_cls else torch.stack([crop.cls_C for crop in chosen if crop.cls_C is not None]),
            project,
            tuple(crop.prompt for crop in chosen),
            texts,
            _padding(chosen),
        )
        reduction = method.reduce(view)
        behind = torch.zeros_like(reduction.origin_NK, dtype=torch.bool)
        if not reduction.in_place:
            behind = reduction.origin_NK < 0
        for place, i in enumerate(members):
            left = ReducedCrop(
                reduction.tokens_NKC[place],
                reduction.origin_NK[place],
                reduction.source_NK[place],
                behind[place],
                None if reduction.weights is None else partial(_row_of, reduction.weights, place),
            )
            results[i] = left.with_markers(crops[i].tokens_PC) if method.pospad else left
    return [results[i] for i in range(len(crops))]


def _padding(crops: Sequence[Crop]) -> Tensor | None:
    if all(crop.padding_P is None for crop in crops):
        return None
    nothing = torch.zeros(len(crops[0].tokens_PC), dtype=torch.bool, device=crops[0].tokens_PC.device)
    return torch.stack([nothing if crop.padding_P is None else crop.padding_P for crop in crops])


def _row_of(weights: Callable[[], Tensor], place: int) -> Tensor:
    return weights()[place]


@dataclass(frozen=True)
class Mixture:
    """Tokens of a row that are made of several: where they stand now, of which tokens of the row before they are made,
    and what gives the share of each of these.
    """

    tokens_K: Tensor
    members_P: Tensor
    weights: Callable[[], Tensor]


@dataclass(frozen=True)
class ReducedPrompt:
    """A prompt whose visual tokens were reduced: embeddings ``[B, N, C]`` padded on the left, layout, rows, and per row
    the tokens that are made of several.
    """

    hidden_BNC: Tensor
    layout: VisualLayout
    lengths: tuple[int, ...]
    rows: list[ReducedRow]
    mixtures: list[list[Mixture]]

    def mix(self, values_BNF: Tensor, lengths: Sequence[int]) -> Tensor:
        """Like :meth:`follow`, but a merged token has the mean of the values of its members."""
        followed, width = self.follow(values_BNF, lengths), values_BNF.shape[1]
        for row, own in enumerate(self.mixtures):
            before = values_BNF[row, width - lengths[row] :]
            after = followed[row, followed.shape[1] - self.lengths[row] :]
            for mixture in own:
                weights = mixture.weights().to(before.device)
                mean = weights @ before[mixture.members_P.to(before.device)].float()
                after[mixture.tokens_K.to(before.device)] = mean.to(after.dtype)
        return followed

    def follow(self, values_BN: Tensor, lengths: Sequence[int]) -> Tensor:
        """What belongs to each token of the prompt before, ``[B, N, ...]``: of the tokens that are left, or of those
        whose place they took. ``lengths`` are those before.
        """
        width = values_BN.shape[1]
        rows = [
            values_BN[row, width - length :][left.positions.to(values_BN.device)]
            for row, (left, length) in enumerate(zip(self.rows, lengths, strict=True))
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")


def reduce_prompt(
    method: Method,
    hidden_BNC: Tensor,
    lengths: Sequence[int],
    layout: VisualLayout,
    facts: Mapping[str, Sequence[Tensor]],
) -> ReducedPrompt:
    """Reduce the visual tokens among the input embeddings, crop by crop.

    Args:
        method: what reduces.
        hidden_BNC: embeddings, left padded.
        lengths: real tokens per row.
        layout: where the visual tokens are, and which of them belong to one crop.
        facts: by name one tensor per row, ``[visual tokens, ...]``.
    """
    width, device = hidden_BNC.shape[1], hidden_BNC.device
    newlines = layout.structure or ((),) * len(lengths)
    embeds, spans, structure, rows, mixtures = [], [], [], [], []
    for row, length in enumerate(lengths):
        # Where this row's visual tokens and newlines stand in the padded sequence.
        start = width - length
        slots = [slot for first, last in layout.spans[row] for slot in range(first, last)]
        between = [slot for first, last in newlines[row] for slot in range(first, last)]
        places_of = on_device(slots, device).long()
        # Cut the visual tokens into crops; a crop's patches need not stand side by side ("anyres").
        crops, places, ends = [], [], []
        first, sizes = 0, []
        for image in layout.image_crops(row):
            end = slots[first + len(image) - 1] + 1
            sizes.append([image.count(crop) for crop in dict.fromkeys(image)])
            for crop in dict.fromkeys(image):
                members = on_device([first + i for i, own in enumerate(image) if own == crop], device)
                place = places_of[members]
                own_facts = {name: values[row].to(device)[members] for name, values in facts.items()}
                crops.append(Crop(hidden_BNC[row, place], own_facts, prompt=row))
                places.append((members, place))
                ends.append(end)
            first += len(image)
        # Let the method reduce them, within the row's budget.
        texts = None
        if method.reads_text:
            taken = {*slots, *between}
            begin = min(layout.text_starts[row], width) if slots else start
            words = (
                range(begin, width) if begin < width else [slot for slot in range(start, width) if slot not in taken]
            )
            texts = [*[hidden_BNC[row, :0]] * row, hidden_BNC[row, on_device(list(words), device).long()]]
        reduced = reduce_crops(method, crops, row_budget(method, sizes), texts=texts)
        # Put the row together again: every token has a key, the slot it stood at or stands behind. Text keeps its own.
        # Origins: -2 no visual token, -1 merged, else the index of the patch.
        visual = set(slots)
        others = on_device([s for s in range(start, width) if s not in visual], device).long()
        keys = [others.double()]
        tokens, origins, positions = [hidden_BNC[row, others]], [torch.full_like(others, -2)], [others - start]
        for left, (members, place), end in zip(reduced, places, ends, strict=True):
            keys.append(left.order(place, end))
            tokens.append(left.tokens_KC)
            origins.append(torch.where(left.origin_K < 0, -1, members[left.origin_K.clamp_min(0)]))
            positions.append(place[left.source_K] - start)
        order = torch.cat(keys).argsort(stable=True)
        origin = torch.cat(origins)[order]
        embeds.append(torch.cat([part.to(hidden_BNC.dtype) for part in tokens])[order])
        position = torch.cat(positions)[order]
        # Which tokens are made of several, by their numbers in the new row.
        number, own, behind = order.argsort(), [], len(others)
        for left, (_, place) in zip(reduced, places, strict=True):
            behind += len(left.tokens_KC)
            if left.weights is not None:
                own.append(Mixture(number[behind - len(left.tokens_KC) : behind], place - start, left.weights))
        mixtures.append(own)
        # Read off the new order which tokens are visual and which are newlines.
        visible = origin > -2
        newline = ~visible & torch.isin(position + start, on_device(between, device).long())
        kinds = (visible.long() + 2 * newline).tolist()
        spans.append(runs(kinds, 1))
        structure.append(runs(kinds, 2))
        rows.append(ReducedRow(origin[visible], len(slots), position))
    # Pad the rows on the left, and move what was counted from a row's own start.
    lengths = tuple(map(len, embeds))
    most = max(lengths)
    hidden = nn.utils.rnn.pad_sequence(embeds, batch_first=True, padding_side="left")
    shifted = [
        [[(a + most - length, b + most - length) for a, b in own] for own, length in zip(part, lengths, strict=True)]
        for part in (spans, structure)
    ]
    return ReducedPrompt(
        hidden,
        VisualLayout.from_spans(shifted[0], lengths, None if layout.structure is None else shifted[1]),
        lengths,
        rows,
        mixtures,
    )


def runs(kinds: Sequence[int], kind: int) -> list[tuple[int, int]]:
    """Half-open intervals of equal ``kind``."""
    found: list[tuple[int, int]] = []
    for i, own in enumerate(kinds):
        if own == kind:
            start = found.pop()[0] if found and found[-1][1] == i else i
            found.append((start, i + 1))
    return found
