"""From the crops of a batch of images to visual tokens for the decoder: tower, reduction, projector, arrangement.

Computes exactly what an attached pruning method declares, and lets it reduce the tokens where it works in front of the
decoder.

Shapes: P features per crop, N tokens of an image (newlines included), V visual tokens of an image, C widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.assemble import NEWLINE, Arrangement
from llava.model.multimodal import VisualTokens
from llava.model.projector import Adapted, projector_dtype
from llava.model.reduction import ReducedImage, crop_targets, put_together, reduce_images
from llava.model.tower_merging import TowerMerger
from llava.model.vision import VisionTower, encode_crops
from llava.pruning.reduction import ReducedCrop, unreduced
from llava.pruning.vision import CLS_ATTENTION, TowerValue, VisionFact
from llava.utils import UserError


def _no_padding(image: int) -> None:
    return None


def encode_images(
    tower: VisionTower,
    projector: nn.Module | Adapted,
    newline: Tensor | None,
    stacks: Sequence[Tensor],
    arrangements: Sequence[Arrangement],
    masks: Sequence[Tensor | None],
    images_per_row: Sequence[int],
    with_cls_attention: bool,
    run: Any | None,
    texts: Sequence[Tensor] | None = None,
    padding: Callable[[int], Tensor | None] = _no_padding,
) -> list[VisualTokens]:
    """Visual tokens of every image.

    Args:
        tower: the vision tower.
        projector: maps features to the decoder's width.
        newline: the `image_newline` token `[C]`, if the checkpoint has one.
        stacks: per image `[crops, 3, S, S]`, on the tower's device.
        arrangements: per image, how its crops become one sequence.
        masks: per image True for visual tokens that are padding (a CLS entry in front is left alone), or None.
        images_per_row: images of each prompt; they share a budget.
        with_cls_attention: compute the CLS attention even if the method does not ask for it.
        run: the attached pruning run, if any.
        texts: embeddings of each prompt's text, for methods that look at it.
        padding: of an image, which share of each of its visual tokens is padding (a CLS entry in front is left out);
            None: of none.
    """
    facts = {} if run is None else run.vision_facts(len(tower.vision_tower.encoder.layers))
    if with_cls_attention:
        facts.setdefault(CLS_ATTENTION, VisionFact(TowerValue.CLS_ATTENTION))
    # Known of the picture; the tower has nothing to say about it.
    of_picture = [name for name, fact in facts.items() if fact.value is TowerValue.PADDING]
    facts = {name: fact for name, fact in facts.items() if name not in of_picture}
    timer: Callable[[], AbstractContextManager] = nullcontext
    if run is not None:
        timer = run.selection_timer
    encode = partial(
        encode_crops,
        tower.vision_tower,
        select_layer=tower.select_layer,
        select_feature=tower.select_feature,
        timer=timer,
    )
    if run is not None and run.method.merges_in_tower:
        if facts or of_picture:
            # The tokens of a merging tower are no patches any more: what is said of patches needs a pass without it.
            names = ", ".join([*facts, *of_picture])
            raise UserError(
                f"--method {run.method.name}: tokens merged inside the vision tower have no {names}; "
                "combine it with methods that need none, without --visual-token-num"
            )
        images = _merge_inside(encode, run.method.parts[0], stacks, arrangements, images_per_row, timer)
        return _projected(images, [{}] * len(images), projector, newline)
    counts = [len(stack) for stack in stacks]
    encoded = encode(torch.cat(list(stacks)), facts=facts)  # all crops of the batch go through the tower together
    arranged = []
    for i, arrangement in enumerate(arrangements):
        first = sum(counts[:i])
        own = {name: arrangement.gather(said[first : first + counts[i]]) for name, said in encoded.facts.items()}
        if masks[i] is not None:
            own = {n: _masked(v, masks[i]) if facts[n].value.is_attention else v for n, v in own.items()}
        for name in of_picture:
            own[name] = _padding_of(arrangement, padding(i), encoded.features_NPC.device)
        arranged.append(own)
    features = encoded.features_NPC
    if run is not None and run.reduces_vision:
        method, project = run.method.parts[0], partial(_project, projector)
        behind = method.reduces_projected
        if behind:
            features = project(features)
        with timer():
            images = reduce_images(
                method,
                features.split(counts),
                arranged,
                None if behind or encoded.cls_NC is None else encoded.cls_NC.split(counts),
                arrangements,
                crop_targets(method, arrangements, images_per_row),
                [row for row, images in enumerate(images_per_row) for _ in range(images)],
                None if behind else project,
                texts,
                [
                    None if mask is None else _hidden(mask, len(arrangement.crops), features.device)
                    for mask, arrangement in zip(masks, arrangements, strict=True)
                ],
            )
        return _projected(images, arranged, None if behind else projector, newline)
    projected = _project(projector, features).split(counts)
    return [
        VisualTokens(
            arrangement.tokens(crops, newline),
            own.pop(CLS_ATTENTION, None),
            arrangement.spans,
            arrangement.newlines,
            arrangement.crops,
            facts=own,
        )
        for crops, own, arrangement in zip(projected, arranged, arrangements, strict=True)
    ]


def _project(projector: nn.Module | Adapted, features_NPC: Tensor) -> Tensor:
    return projector(features_NPC.to(projector_dtype(projector, features_NPC.dtype)))


def _projected(
    images: Sequence[ReducedImage],
    facts: Sequence[Mapping[str, Tensor]],
    projector: nn.Module | Adapted | None,
    newline: Tensor | None,
) -> list[VisualTokens]:
    """Only what is left goes through the projector, in one piece; None: it has done so."""
    features = torch.cat([image.features_KC for image in images])
    parts = features if projector is None else _project(projector, features[None])[0]
    tokens = []
    for image, own, projected in zip(images, facts, parts.split([len(i.features_KC) for i in images]), strict=True):
        spans, newlines = image.spans()
        features = image.tokens(projected, newline)
        rest = {name: fact for name, fact in own.items() if name != CLS_ATTENTION}
        tokens.append(VisualTokens(features, own.get(CLS_ATTENTION), spans, newlines, facts=rest, place=image.place))
    return tokens


def _merge_inside(
    encode: Callable,
    method: Any,
    stacks: Sequence[Tensor],
    arrangements: Sequence[Arrangement],
    images_per_row: Sequence[int],
    timer: Callable[[], AbstractContextManager],
) -> list[ReducedImage]:
    targets = crop_targets(method, arrangements, images_per_row)
    crops = torch.cat(list(stacks))
    flat = [target for image in targets for target in image]
    reduced: list[ReducedCrop | None] = [None] * len(flat)
    for target in sorted(set(flat) - {0}):  # crops with one budget go through the tower together
        members = [i for i, own in enumerate(flat) if own == target]
        merger = TowerMerger(method, target, timer)
        encoded = encode(crops[members], merger=merger)
        features, origin, place = merger.in_raster(encoded.features_NPC)
        for row, i in enumerate(members):
            nowhere = torch.zeros_like(origin[row], dtype=torch.bool)
            reduced[i] = ReducedCrop(features[row], origin[row], place[row], nowhere)
    # A budget below the number of crops leaves nothing of some of them.
    some = next(crop for crop in reduced if crop is not None)
    whole = [unreduced(some.tokens_KC[:0]) if crop is None else crop for crop in reduced]
    return [
        put_together(arrangement, [whole.pop(0) for _ in own])
        for arrangement, own in zip(arrangements, targets, strict=True)
    ]


def _padding_of(arrangement: Arrangement, share: Tensor | None, device: torch.device) -> Tensor:
    """Share of padding of each visual token, float32; a CLS entry in front has none."""
    count = int((arrangement.source_N != NEWLINE).sum())
    if share is None:
        return torch.zeros(count, device=device)
    own = torch.as_tensor(share).float().flatten()
    extra = count - len(own)
    if extra not in (0, 1):
        raise UserError(f"an image mask has {len(own)} entries for {count} visual tokens")
    return torch.cat((own.new_zeros(extra), own)).to(device, non_blocking=True)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """`scores` `[V]` with 0 where `mask` (raster order) is True; a CLS entry in front is left alone."""
    return scores.masked_fill(_hidden(mask, len(scores), scores.device), 0.0)


def _hidden(mask: Tensor, tokens: int, device: torch.device) -> Tensor:
    """`mask` as bool `[tokens]`, False for a CLS entry in front.

    Raises:
        UserError: the mask is of another number of tokens.
    """
    # A plain copy to a GPU would wait for the tower.
    hidden = torch.as_tensor(mask).to(device, non_blocking=True).bool().flatten()
    extra = tokens - len(hidden)
    if extra not in (0, 1):
        raise UserError(f"an image mask has {len(hidden)} entries for {tokens} visual tokens")
    return torch.nn.functional.pad(hidden, (extra, 0))
