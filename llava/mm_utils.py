"""LLaVA's image and prompt helpers: preprocessing (pad, anyres), placeholder tokenization, stopping, model
names.

Sizes are `(width, height)` in pixels wherever a name ends in `_wh`, as PIL gives them.
"""

from __future__ import annotations

import ast
import base64
import math
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import IMAGE_TOKEN_INDEX
from llava.thin_images import pad_and_scale
from llava.utils import UserError

Size = tuple[int, int]

# Largest picture that is made only to be scaled down again: 400 MB as RGB. Very long images are then processed
# in parts.
MAX_CANVAS_PIXELS = 2**27
_STRIP_ROWS = 64
_BLOCK_VALUES = 2**20  # values of deep gray that are converted at a time
# Largest picture that scaling makes on its way, one side scaled and the other not yet: half a gigabyte in PIL. With
# LLaVA's 336 pixels a side may be 399,457 pixels long.
MAX_SCALED_PIXELS = 2**27
# Pictures this much longer than wide are padded without a canvas: the work for one grows with the square of the length.
_THIN = 4


class ImageTooLarge(UserError):
    """A picture whose sides need more memory than preprocessing may take."""


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Decode a base64 string into a PIL image."""
    return Image.open(BytesIO(base64.b64decode(image)))


# --- color modes --------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB: the one conversion of evaluation, `run_llava` and the chat.

    Ordinary images become what LLaVA's `convert("RGB")` makes of them: alpha is dropped, not blended; EXIF
    orientation is not applied; of an animation it is the frame that is current (the first, after opening).
    Different are modes where that call loses the picture: 16-bit and 32-bit gray and float are brought to 8
    bits instead of being clipped to white (`docs/images_and_prompts.md`).

    Raises:
        ValueError: PIL cannot convert this mode.
    """
    image.load()  # a file may be closed behind us
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(np.asarray(image), image.mode).convert("RGB")
    # PIL has no direct way from premultiplied gray, and warns of palettes with several transparent colors.
    way = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        way = "RGBA"
    return (image if way is None else image.convert(way)).convert("RGB")


def _eight_bits(gray: np.ndarray, mode: str) -> Image.Image:
    """Deep gray `[H, W]` as mode "L". The scale follows from the mode or, where it says nothing, from the
    largest value: 1 (floats only), 255, 65535, or that value itself.
    """
    # In double precision a whole picture would be eight times as large.
    rows = max(_BLOCK_VALUES // max(gray.shape[1], 1), 1)
    blocks = [slice(start, start + rows) for start in range(0, len(gray), rows)]

    def wide(block: slice) -> np.ndarray:
        return np.nan_to_num(gray[block].astype(np.float64), posinf=0.0, neginf=0.0).clip(min=0)

    top = max((wide(block).max(initial=0.0) for block in blocks), default=0.0)
    scaled = np.empty(gray.shape, dtype=np.uint8)
    for block in blocks:
        values = wide(block)
        if mode == "F" and 0 < top <= 1:
            values *= 255
        elif mode.startswith("I;16") or 255 < top <= 65535:
            values = np.floor_divide(values, 256)  # the high byte, as PIL reads 16-bit color
        elif top > 65535:
            values *= 255 / top
        scaled[block] = values.astype(np.uint8)
    return Image.fromarray(scaled)


# --- pad ----------------------------------------------------------------------------------------------------


def expand2square(pil_img: Image.Image, background_color: Any) -> Image.Image:
    """Pad the shorter side symmetrically with `background_color` until the image is square (offset rounded
    down).
    """
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def _padded_square(image: Image.Image, background_color: Any, processor: Any) -> Image.Image:
    """`expand2square`; if that square were huge, the square at the processor's size, with the same bytes.

    PIL scales the rows of a square first and then its columns, with 8-bit values in between. So rows can be
    scaled strip by strip, and those of the padding need not be scaled at all. Of thin pictures nothing but the
    picture itself is scaled.
    """
    width, height = image.size
    full = max(image.size)
    if width == height or full * full <= MAX_CANVAS_PIXELS:
        return expand2square(image, background_color)
    side = _side(processor.size)
    if min(image.size) * _THIN <= full and processor.resample == Image.Resampling.BICUBIC:
        return pad_and_scale(image, side, background_color)
    left, top = (full - width) // 2, (full - height) // 2
    narrow = Image.new("RGB", (side, full), background_color)
    for y in range(0, height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, height - y)
        strip = Image.new("RGB", (full, rows), background_color)
        strip.paste(image.crop((0, y, width, y + rows)), (left, 0))
        narrow.paste(strip.resize((side, rows), processor.resample), (0, top + y))
    return narrow.resize((side, side), processor.resample)


def padding_mask(size_wh: Size, grid: int) -> torch.Tensor:
    """Which patches of a padded square lie outside the image: bool `[grid, grid]`, True = padding.

    The image band is enlarged by about one patch on both sides before it is cut out, so a patch that
    touches the image is never masked. Source: the published AutoPrune preprocessing with its fixed 24 x 24
    grid, generalized to any grid (same values at 24).
    """
    width, height = (int(x) for x in size_wh)
    if width < 1 or height < 1 or grid < 1:
        raise ValueError(f"size and grid must be positive, got size_wh={tuple(size_wh)} and grid={grid}")
    side = max(width, height)
    border = int((side + grid - 1) / grid)
    # Nearest-neighbor resize of the pixel mask: patch i looks at pixel floor(i * side / grid).
    source = torch.arange(grid) * side // grid
    outside = torch.zeros(grid, dtype=torch.bool)
    if width != height:
        difference, total = abs(width - height) // 2, (width + height) // 2
        outside = (source < max(difference - border, 0)) | (source >= min(total + border, side))
    rows = outside if width > height else torch.zeros_like(outside)
    columns = outside if height > width else torch.zeros_like(outside)
    return rows[:, None] | columns[None, :]


def padding_share(size_wh: Size, grid: int) -> torch.Tensor:
    """How much of each patch of a padded square is padding: float32 `[grid, grid]` in 0..1, the band not rounded."""
    width, height = (int(x) for x in size_wh)
    if width < 1 or height < 1 or grid < 1:
        raise ValueError(f"size and grid must be positive, got size_wh={tuple(size_wh)} and grid={grid}")
    band = abs(width - height) / (2 * max(width, height)) * grid
    first = torch.arange(grid, dtype=torch.float64)
    share = ((band - first).clamp(0, 1) + (first + 1 - grid + band).clamp(0, 1)).float()
    return share[:, None].expand(-1, grid) if width > height else share.expand(grid, -1)


# --- anyres -------------------------------------------------------------------------------------------------


def parse_grid_pinpoints(grid_pinpoints: Sequence[Sequence[int]] | str) -> list[Size]:
    """The candidate resolutions of a config, `[(width, height), ...]`; configs store a list or its text."""
    sizes: Any = grid_pinpoints
    if isinstance(sizes, str):
        try:
            sizes = ast.literal_eval(sizes)
        except (ValueError, SyntaxError):
            raise ValueError(f"image_grid_pinpoints is not a list of [width, height]: {sizes!r}") from None
    return [(int(w), int(h)) for w, h in sizes]


def select_best_resolution(
    original_size: Size, possible_resolutions: Iterable[Sequence[int]], rule: str = "fill"
) -> Size:
    """The resolution `(width, height)` that suits an image of `original_size` best; the first wins ties.

    `rule="fill"` (AutoPrune's published code): the largest share of the canvas that the scaled image
    covers, upscaling included. `rule="effective"` (LLaVA's own code): the most image pixels without
    counting upscaling, then the least unused canvas. The two differ for small images ("fill" gives a
    336 x 336 image the 672 x 672 canvas, "effective" the 336 x 672 one) and, with LLaVA-1.6's resolutions, for
    large ones whose sides are as sqrt(2) to sqrt(6) : 1 (1920 x 1080: 672 x 336 and 672 x 672).
    """
    width, height = original_size
    best, best_rank = None, None
    for candidate_width, candidate_height in possible_resolutions:
        scale = min(candidate_width / width, candidate_height / height)
        area = int(width * scale) * int(height * scale)
        canvas = candidate_width * candidate_height
        if rule == "fill":
            rank: tuple[float, ...] = (area / canvas,)
        elif rule == "effective":
            effective = min(area, width * height)
            rank = (effective, effective - canvas)
        else:
            raise ValueError(f"unknown resolution rule {rule!r}, expected 'fill' or 'effective'")
        if best_rank is None or rank > best_rank:
            best, best_rank = (int(candidate_width), int(candidate_height)), rank
    if best is None:
        raise ValueError("image_grid_pinpoints is empty")
    return best


def resolution_rule(model_cfg: Any) -> str:
    """The rule of `select_best_resolution` that a configuration asks for with `anyres_resolution_rule`.

    `load_pretrained_model` writes it: LLaVA's own, "effective", or AutoPrune's, "fill", together with its merge type
    "spatial". A bare configuration that says nothing gets "fill", as the published AutoPrune code does.
    """
    return getattr(model_cfg, "anyres_resolution_rule", None) or "fill"


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Scale the image into `target_resolution` (width, height), keeping its shape, centered on black."""
    width, height = image.size
    target_width, target_height = target_resolution
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        new_width, new_height = target_width, min(math.ceil(height * scale_width), target_height)
    else:
        new_width, new_height = min(math.ceil(width * scale_height), target_width), target_height
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    offset = ((target_width - new_width) // 2, (target_height - new_height) // 2)
    canvas.paste(image.resize((new_width, new_height)), offset)
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut the image into `patch_size` squares, row by row."""
    width, height = image.size
    return [
        image.crop((x, y, x + patch_size, y + patch_size))
        for y in range(0, height, patch_size)
        for x in range(0, width, patch_size)
    ]


def get_anyres_image_grid_shape(
    image_size: Size, grid_pinpoints: Sequence[Sequence[int]] | str, patch_size: int, rule: str = "fill"
) -> Size:
    """Crops along `(width, height)` for an image of `image_size`; `patch_size` is the side of one crop in
    pixels.
    """
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints), rule)
    return width // patch_size, height // patch_size


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: Sequence[Sequence[int]] | str, rule: str = "fill"
) -> torch.Tensor:
    """Crops of one image, `[1 + grid_w * grid_h, 3, side, side]`: the whole image (squeezed to a square),
    then the tiles row by row.
    """
    resolution = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints), rule)
    canvas = resize_and_pad_image(image, resolution)
    side = _side(processor.size)
    crops = [image.resize((side, side)), *divide_to_patches(canvas, _side(processor.crop_size))]
    return torch.stack([_preprocess(processor, crop) for crop in crops])


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Pixel values as the checkpoint's `image_aspect_ratio` asks for.

    `"pad"`: squares padded with the processor's mean color, `[n, 3, side, side]`. `"anyres"`: crops per
    image, `[n, crops, 3, side, side]`, or a list of `[crops, 3, side, side]` if the images have different
    numbers of crops. Anything else: the processor's own resize and center crop.

    Raises:
        ImageTooLarge: a side is so long that scaling would take more than half a gigabyte.
    """
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    longest = MAX_SCALED_PIXELS // _side(image_processor.size)
    for image in images:
        if max(image.size) > longest:
            raise ImageTooLarge(
                f"{image.width} x {image.height} pixels: a side may have {longest} pixels, scale the picture down first"
            )
    # Palette, gray and alpha images would fail or change meaning when a color is pasted beneath them.
    images = [to_rgb(image) for image in images]
    if aspect_ratio == "pad":
        color = tuple(int(x * 255) for x in image_processor.image_mean)
        processed = [_preprocess(image_processor, _padded_square(image, color, image_processor)) for image in images]
    elif aspect_ratio == "anyres":
        rule = resolution_rule(model_cfg)
        processed = [
            process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints, rule) for image in images
        ]
    elif str(aspect_ratio).startswith("anyres"):
        # LLaVA-1.6's code would silently take the whole image for these.
        raise UserError(f"image_aspect_ratio {aspect_ratio!r} is not supported, only 'anyres' (LLaVA-1.6)")
    else:
        processed = [_preprocess(image_processor, _center(image, image_processor)) for image in images]
    if processed and all(x.shape == processed[0].shape for x in processed):
        return torch.stack(processed)
    return processed


def _center(image: Image.Image, processor: Any) -> Image.Image:
    """The image; where scaling its short side to the processor's size would make it huge, only the scaled
    middle that the center crop keeps (the same up to rounding: PIL places the middle with float32).
    """
    width, height = image.size
    short, side = min(image.size), _side(processor.size)
    long = int(side * max(image.size) / short)
    if long * side <= MAX_CANVAS_PIXELS or side != _side(processor.crop_size):
        return image
    start = (long - side) // 2 * max(image.size) / long
    stop = start + side * max(image.size) / long
    # Rows before columns, as PIL would: newer versions choose the order by cost, and a box changes the cost.
    if width > height:
        return image.resize((side, height), processor.resample, box=(start, 0, stop, height)).resize(
            (side, side), processor.resample
        )
    rows = image.resize((side, height), processor.resample)
    return rows.resize((side, side), processor.resample, box=(0, start, side, stop))


def _preprocess(processor: Any, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


def _side(size: Any) -> int:
    # Processors describe a square as {"shortest_edge": n} or {"height": n, "width": n}, in a dict or an
    # object like one.
    if isinstance(size, int):
        return size
    for key in ("shortest_edge", "height"):
        value = size.get(key) if hasattr(size, "get") else getattr(size, key, None)
        if value:
            return int(value)
    raise ValueError(f"cannot read the side length from the image processor's size {size!r}")


# --- text ---------------------------------------------------------------------------------------------------


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Token ids of `prompt` with `image_token_index` where `<image>` stands; one BOS at most, at the front.

    The pieces between placeholders are tokenized on their own, as LLaVA does; the ids therefore differ from
    tokenizing the whole text (a piece gets its own leading-space token). With a tokenizer of
    `llava.model.tokenizer.load_tokenizer`, which merges by score, the ids are those of the sentencepiece
    tokenizer that LLaVA was published with. Returns a list, or an int64 tensor `[T]` for
    `return_tensors="pt"`.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"Unsupported tensor type: {return_tensors}")
    pieces = [_piece_ids(piece, tokenizer) for piece in prompt.split("<image>")]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids: list[int] = [tokenizer.bos_token_id] if has_bos else []
    for i, piece in enumerate(pieces):
        if i > 0:
            ids.append(image_token_index)
        ids.extend(piece[1:] if has_bos else piece)
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def _piece_ids(piece: str, tokenizer: Any) -> list[int]:
    """Ids of one piece of a prompt, BOS included if the tokenizer writes it."""
    # Sentencepiece puts a blank before every text. Transformers 5's Llama tokenizer takes a blank that is already
    # there for it and so loses one; a second blank in front gives the published ids.
    if piece.startswith((" ", "\u2581")) and list(tokenizer(" a").input_ids) == list(tokenizer("a").input_ids):
        piece = " " + piece
    return list(tokenizer(piece).input_ids)


def get_model_name_from_path(model_path: str) -> str:
    """The last folder of a path; training checkpoints (`checkpoint-500`) get their parent's name in front."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop a sequence as soon as one of `keywords` appears in what was generated.

    Unlike LLaVA's, rows of a batch stop one by one, and generation from embeddings (output without the
    prompt) is recognized.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.keyword_ids: list[torch.Tensor] = []
        for keyword in self.keywords:
            ids = list(tokenizer(keyword).input_ids)
            if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            self.keyword_ids.append(torch.tensor(ids, dtype=torch.long))
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def _row_is_done(self, generated_T: torch.Tensor) -> bool:
        for ids in self.keyword_ids:
            n = len(ids)
            if 0 < n <= len(generated_T) and torch.equal(generated_T[-n:], ids.to(generated_T.device)):
                return True
        # A keyword may be tokenized differently inside a sentence: compare the decoded tail as well.
        tail = generated_T[-self.max_keyword_len :] if self.max_keyword_len else generated_T[:0]
        text = self.tokenizer.batch_decode([tail], skip_special_tokens=True)[0]
        return any(keyword in text for keyword in self.keywords)

    def __call__(self, output_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        if output_ids.shape[1] <= self.start_len:
            # The prompt cannot be part of something shorter than itself: generation runs from embeddings.
            self.start_len = 0
        done = [self._row_is_done(row[self.start_len :]) for row in output_ids]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)
