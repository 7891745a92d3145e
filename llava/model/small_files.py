"""What the small files of a checkpoint say beside config.json: its image processor and the ids that end a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import CLIPImageProcessorPil

from llava.model.configuration import LlavaConfig
from llava.model.fields import PREPROCESSOR, check_generation
from llava.model.locate import read_checkpoint_json
from llava.schema import check
from llava.utils import UserError, describe_error

MAX_SCALE = 4
"""How much larger than the crop an image processor may scale a picture; CLIP's scale its short side to the crop."""


def load_image_processor(folder: Path, tower_folder: Path | None, config: LlavaConfig) -> CLIPImageProcessorPil:
    """The tower's CLIP preprocessing on the PIL backend, whose pixels are the ones LLaVA was trained and
    measured with.
    """
    side = config.vision_config.image_size
    places = [place for place in (tower_folder, folder) if place is not None]
    for path in [place / name for place in places for name in ("preprocessor_config.json", "processor_config.json")]:
        if not path.is_file():
            continue
        raw: Any = read_checkpoint_json(path)
        if path.name == "processor_config.json":
            # Newer llava-hf folders keep the image processor's settings inside the processor's.
            raw = raw.get("image_processor")
            if not isinstance(raw, dict):
                continue
        try:
            check(raw, PREPROCESSOR, "settings")
            processor = CLIPImageProcessorPil.from_dict(raw)
            crop = {int(processor.crop_size[edge]) for edge in ("height", "width")}
            scaled = [int(length) for length in dict(processor.size).values() if length]
            # Most of what a setting can be wrong about shows only when a picture goes through, which is no larger than
            # the tower takes.
            if crop == {side} and max(scaled) <= MAX_SCALE * side:
                red, green, blue = (int(255 * mean) for mean in processor.image_mean)
                processor(Image.new("RGB", (side, side), (red, green, blue)), return_tensors="pt")
        except Exception as error:
            reason = describe_error(error)[:300]
            raise UserError(f"{path}: not a usable image processor ({reason}); copy or download it again") from None
        if crop != {side}:
            found = " x ".join(str(processor.crop_size[edge]) for edge in ("width", "height"))
            found = found if len(crop) > 1 else str(*crop)
            raise UserError(f"{path}: crop_size is {found} pixels but the vision tower takes {side}")
        if max(scaled) > MAX_SCALE * side:
            raise UserError(
                f"{path}: size is {max(scaled)} pixels, more than {MAX_SCALE} times the {side} that the vision tower "
                "takes"
            )
        return processor
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def generation_tokens(folder: Path) -> dict[str, Any] | None:
    """The token ids of a folder's generation_config.json; None if it has none."""
    path = folder / "generation_config.json"
    # Sampling settings in the file (LLaVA-1.5: temperature 0.9, top_p 0.6) would silently apply wherever a caller
    # leaves one out; only what belongs to the checkpoint is taken.
    return check_generation(read_checkpoint_json(path), path) if path.is_file() else None


def wordless_tokens(config: Any, tokenizer: Any | None, eos: int | list[int] | None) -> list[int] | None:
    """Ids that the llava-hf layout appends to the vocabulary for `<image>`, padding and alignment.

    Their rows are no part of LLaVA. Ruling them out makes both layouts choose among the same words.
    """
    first, size = config.image_token_index, config.text_config.vocab_size
    if not 0 <= first < size:
        return None
    words = set(eos if isinstance(eos, list) else [eos])
    if tokenizer is not None:
        words |= set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) - {first}
    return [token for token in range(first, size) if token not in words]
