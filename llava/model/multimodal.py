"""Prompts with images: placeholders out, visual tokens in, rows padded on the left.

Turns token ids with image placeholders plus visual tokens into embeddings, masks, positions and the layout
that says where the visual tokens are.

Shapes: B rows, T ids per row, L tokens per row after splicing, C decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.reduction import Place
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.selection import on_device
from llava.pruning.vision import ReducedRow
from llava.utils import UserError


@dataclass(frozen=True)
class VisualTokens:
    """One image, ready for the decoder.

    Attributes:
        features: `[N, C]`, newline tokens included.
        cls_attention: float32, one value per visual token (newlines have none); None unless pruning needs it.
        spans: where the visual tokens are among the N; None: everywhere.
        newlines: where the newline tokens are.
        crops: the crop that each visual token comes from, 0 = the whole image; None: all from one.
        facts: further values of the vision tower that an attached pruning method declared, `[visual tokens, ...]`.
        place: where the tokens stood, if they were reduced; facts and CLS attention then are of the tokens before.
    """

    features: Tensor
    cls_attention: Tensor | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    newlines: tuple[tuple[int, int], ...] = ()
    crops: tuple[int, ...] | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    place: Place | None = None


@dataclass(frozen=True)
class MultimodalInputs:
    """What the decoder is given for a batch of prompts.

    Attributes:
        inputs_embeds: `[B, L, C]`, rows padded on the left with zeros.
        attention_mask: `[B, L]` int64, 1 = token; None if no row is padded.
        position_ids: `[B, L]`, counted from each row's first token; None if no row is padded.
        layout: per row, spans of visual tokens (patches) and of the newline tokens between them, in the padded
            sequence.
        cls_attention: one float32 vector per row over all its visual tokens (empty without images), or None.
        labels: `[B, L]` with `IGNORE_INDEX` on visual tokens and padding, or None.
        facts: per name one tensor per row, see `VisualTokens`.
        reduced: what each row says about a reduction of its visual tokens; None if there was none.
        lengths: tokens of each row before it was cut to `max_length`.
        max_length: how many tokens a row may have; None: any number.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    layout: VisualLayout
    cls_attention: list[Tensor] | None = None
    labels: Tensor | None = None
    facts: Mapping[str, list[Tensor]] = field(default_factory=dict)
    reduced: list[ReducedRow] | None = None
    lengths: tuple[int, ...] = ()
    max_length: int | None = None

    def tell(self, run: Any, **kwargs: Any) -> None:
        """Tell a pruning run where the visual tokens are and what the vision tower said about them."""
        run.set_visual(self.layout, self.cls_attention, facts=self.facts, reduced=self.reduced, **kwargs)

    def generation_mask(self) -> Tensor:
        """`attention_mask`, or ones `[B, L]` where no row is padded."""
        if self.attention_mask is not None:
            return self.attention_mask
        return torch.ones(self.inputs_embeds.shape[:2], dtype=torch.long, device=self.inputs_embeds.device)


def count_placeholders(input_ids: Tensor, attention_mask: Tensor | None = None) -> list[int]:
    """Image placeholders per row of `input_ids` `[B, T]`, those under padding not counted."""
    found = input_ids == IMAGE_TOKEN_INDEX
    if attention_mask is not None:
        found = found & attention_mask.to(found.device).bool()
    return found.sum(dim=1).tolist()


def text_ids(input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
    """Ids of each row's text behind its last image; of all its text, if it ends in an image. Padding is left out."""
    texts = []
    for row, ids in enumerate(input_ids):
        real = ids if attention_mask is None else ids[attention_mask[row].bool()]
        places = (real == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        behind = real[places[-1] + 1 :] if places else real
        texts.append(behind if len(behind) else real[real != IMAGE_TOKEN_INDEX])
    return texts


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """`[B, L]` positions that start at 0 with each row's first token; padding gets 0."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def check_image_count(placeholders_per_row: Sequence[int], images: int) -> None:
    """Every placeholder of the batch needs one image and the other way round."""
    placeholders = sum(placeholders_per_row)
    if placeholders != images:
        rows = ", ".join(str(n) for n in placeholders_per_row)
        raise UserError(
            f"the prompts have {placeholders} image placeholder(s) (id {IMAGE_TOKEN_INDEX}; per row: {rows}) "
            f"but {images} image(s) were given: pass one image per placeholder, in reading order"
        )


def check_ids(input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Raises a `UserError` for a negative id that is no placeholder; what an attention mask hides does not matter."""
    wrong = (input_ids < 0) & (input_ids != IMAGE_TOKEN_INDEX)
    if attention_mask is not None:
        wrong &= attention_mask.to(wrong.device).bool()
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise UserError(
            f"input_ids have {int(input_ids[row, column])} in row {row}, column {column}: the only negative id is "
            f"{IMAGE_TOKEN_INDEX}, the place of an image; hide padding with attention_mask"
        )


def splice(
    embed: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    visual: Sequence[VisualTokens],
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    max_length: int | None = None,
) -> MultimodalInputs:
    """Replace each placeholder by the tokens of the next image.

    Args:
        embed: token embedding, `[..., T]` ids -> `[..., T, C]`.
        input_ids: `[B, T]` with `IMAGE_TOKEN_INDEX` placeholders; padding may be on either side.
        visual: the images in reading order over the whole batch.
        attention_mask: `[B, T]`, 0 = padding; None = nothing is padded.
        labels: `[B, T]`; visual tokens get `IGNORE_INDEX`.
        max_length: rows are cut to this many tokens *after* splicing, at the end, as LLaVA does with the
            checkpoint's `tokenizer_model_max_length`: a long prompt loses text (even visual tokens), silently.

    Raises:
        UserError: numbers of placeholders and images differ, or an id is negative and no placeholder.
    """
    # Everything below indexes with host integers. Ids on a device are waited for here.
    ids_BT = input_ids.tolist()
    valid_BT = None if attention_mask is None else attention_mask.bool().tolist()
    check_ids(input_ids, attention_mask)
    kept = [[t for t in range(len(ids)) if valid_BT is None or valid_BT[b][t]] for b, ids in enumerate(ids_BT)]
    check_image_count(
        [sum(ids[t] == IMAGE_TOKEN_INDEX for t in keep) for ids, keep in zip(ids_BT, kept, strict=True)], len(visual)
    )
    # Placeholders and padding have no row in the table; what is looked up for them is never used.
    embeds_BTC = embed(input_ids.clamp(min=0))

    images = iter(visual)
    rows: list[Tensor] = []
    places: list[_Places] = []
    row_images: list[list[VisualTokens]] = []
    row_labels: list[Tensor] = []
    for b, (ids_T, keep) in enumerate(zip(ids_BT, kept, strict=True)):
        pieces, label_pieces = [], []
        row_images.append([])
        place = _Places()
        length = start = 0
        for i in [*(i for i, t in enumerate(keep) if ids_T[t] == IMAGE_TOKEN_INDEX), len(keep)]:
            if i > start:
                pieces.append(_at(embeds_BTC[b], keep[start:i]))
                if labels is not None:
                    label_pieces.append(_at(labels[b], keep[start:i]))
                length += i - start
            start = i + 1
            if i == len(keep):
                break
            image = next(images)
            features = image.features.to(device=embeds_BTC.device, dtype=embeds_BTC.dtype)
            pieces.append(features)
            place.add(image, length)
            row_images[-1].append(image)
            if labels is not None:
                label_pieces.append(labels.new_full((len(features),), IGNORE_INDEX))
            length += len(features)
        rows.append(torch.cat(pieces) if pieces else embeds_BTC[b, :0])
        places.append(place)
        row_labels.append(torch.cat(label_pieces) if label_pieces else torch.empty(0, dtype=torch.long))
    lengths = tuple(len(row) for row in rows)
    if max_length is not None:
        rows = [row[:max_length] for row in rows]
        row_labels = [row[:max_length] for row in row_labels]
        places = [place.cut(max_length) for place in places]
    inputs = _pad_left(rows, places, row_labels if labels is not None else None)
    names = dict.fromkeys(name for image in visual for name in image.facts)
    return replace(
        inputs,
        cls_attention=_row_values(row_images, inputs, lambda image: image.cls_attention),
        facts={name: values for name in names if (values := _row_values(row_images, inputs, _fact(name))) is not None},
        reduced=[place.reduced_row(row) for place, row in zip(places, rows, strict=True)]
        if any(image.place is not None for image in visual)
        else None,
        lengths=lengths,
        max_length=max_length,
    )


def _at(values_T: Tensor, places: Sequence[int]) -> Tensor:
    """`values_T` at rising places; a slice where there is no hole, so that no index has to go to the device."""
    if places[-1] - places[0] + 1 == len(places):
        return values_T[places[0] : places[-1] + 1]
    return values_T.index_select(0, on_device(places, values_T.device))


@dataclass
class _Places:
    """Where the images of one row are, before padding."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    newlines: list[tuple[int, int]] = field(default_factory=list)
    crops: list[tuple[int, ...]] = field(default_factory=list)
    images: list[tuple[int, VisualTokens]] = field(default_factory=list)

    def add(self, image: VisualTokens, offset: int) -> None:
        self.images.append((offset, image))
        spans = ((0, len(image.features)),) if image.spans is None else image.spans
        self.spans += moved(spans, offset)
        self.newlines += moved(image.newlines, offset)
        visual = sum(end - start for start, end in spans)
        self.crops.append((0,) * visual if image.crops is None else image.crops)

    def cut(self, length: int) -> _Places:
        """What is left of the places when the row keeps its first `length` tokens."""
        spans, newlines = (
            [(start, min(end, length)) for start, end in part if start < length] for part in (self.spans, self.newlines)
        )
        crops, left = [], sum(end - start for start, end in spans)
        for image in self.crops:
            crops.append(image[:left])
            left -= len(crops[-1])
        return _Places(spans, newlines, [image for image in crops if image], self.images)

    def reduced_row(self, row: Tensor) -> ReducedRow:
        """Origins and positions of a row `[N, C]` with reduced images, as if nothing had been reduced."""
        origins, positions = [], []
        done = visual = before = 0  # tokens of the row; visual tokens and tokens that there would have been
        for offset, image in self.images:
            place = image.place or _in_full(image, row.device)
            positions += [torch.arange(before, before + offset - done, device=row.device)]
            before += offset - done
            origins.append(torch.where(place.origins_K < 0, -1, place.origins_K + visual).to(row.device))
            positions.append(before + place.places_N.to(row.device))
            done, visual, before = offset + len(image.features), visual + place.visual_tokens, before + place.length
        positions.append(torch.arange(before, before + max(len(row) - done, 0), device=row.device))
        kept = sum(end - start for start, end in self.spans)
        return ReducedRow(
            torch.cat([*origins, torch.zeros(0, dtype=torch.long, device=row.device)])[:kept],
            visual,
            torch.cat(positions)[: len(row)],
        )


def _fact(name: str) -> Callable[[VisualTokens], Tensor | None]:
    return lambda image: image.facts[name]


def _in_full(image: VisualTokens, device: torch.device) -> Place:
    count = sum(end - start for start, end in image.spans or ((0, len(image.features)),))
    everything = torch.arange(len(image.features), device=device)
    return Place(torch.arange(count, device=device), everything, count, len(everything))


def _pad_left(
    rows: list[Tensor],
    places: list[_Places],
    row_labels: list[Tensor] | None,
) -> MultimodalInputs:
    length = max(len(row) for row in rows)
    pads = [length - len(row) for row in rows]
    device = rows[0].device
    mask = positions = None
    if not any(pads):
        embeds = rows[0][None] if len(rows) == 1 else torch.stack(rows)
    else:
        embeds = rows[0].new_zeros((len(rows), length, rows[0].shape[-1]))
        for b, row in enumerate(rows):
            embeds[b, pads[b] :] = row
        pad_B = on_device(pads, device)
        mask = (torch.arange(length, device=device)[None, :] >= pad_B[:, None]).long()
        positions = positions_from_mask(mask)
    layout = VisualLayout.from_spans(
        [moved(place.spans, pad) for place, pad in zip(places, pads, strict=True)],
        lengths=[len(row) for row in rows],
        structure=[moved(place.newlines, pad) for place, pad in zip(places, pads, strict=True)],
        crops=[place.crops for place in places],
    )
    labels = None
    if row_labels is not None:
        labels = row_labels[0].new_full((len(rows), length), IGNORE_INDEX)
        for b, row in enumerate(row_labels):
            labels[b, pads[b] :] = row
    return MultimodalInputs(embeds, mask, positions, layout, labels=labels)


def moved(spans: Iterable[tuple[int, int]], offset: int) -> list[tuple[int, int]]:
    """The same spans `offset` tokens further."""
    return [(start + offset, end + offset) for start, end in spans]


def _row_values(
    row_images: list[list[VisualTokens]], inputs: MultimodalInputs, value: Callable[[VisualTokens], Tensor | None]
) -> list[Tensor] | None:
    """A value per visual token, the images of each row one behind the other; None where an image has none."""
    values = [[value(image) for image in images] for images in row_images]
    if any(one is None for row in values for one in row):
        return None
    device = inputs.inputs_embeds.device
    example = next((one for row in values for one in row), torch.zeros(0))
    return [
        # Truncation can cut visual tokens at the end of a row; their values go with them. Those of reduced images are
        # about the tokens before the reduction.
        (torch.cat([one.to(device) for one in row]) if row else example.new_zeros(0, *example.shape[1:]).to(device))[
            : None if any(image.place is not None for image in images) else count
        ]
        for row, images, count in zip(values, row_images, inputs.layout.counts, strict=True)
    ]
