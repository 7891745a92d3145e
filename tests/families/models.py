"""Tiny random models of transformers' own classes, one per family, and prompts made by hand for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, NEWLINE, START, END, PAD = 90, 91, 92, 93, 94, 0
VOCABULARY = 97
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}


def _clip(**fields: Any) -> dict[str, Any]:
    kind = {"model_type": "clip_vision_model", "projection_dim": 16, "image_size": 24, "patch_size": 4}
    return {**_TOWER, **kind, **fields}


def _siglip(**fields: Any) -> dict[str, Any]:
    kind = {"model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 24, "patch_size": 4}
    return {**_TOWER, **kind, **fields}


def _sharpened(model: Any) -> Any:
    """Attention and outputs far from uniform: default initialization would make all scores nearly equal."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not name.endswith(("embeddings.weight", "embed_tokens.weight")):
                weight.mul_(9 if "q_proj" in name or "k_proj" in name or "qkv" in name else 4)
            elif "embed_tokens" in name or "newline" in name:
                weight.mul_(20)
    return model.eval()


@dataclass
class Tiny:
    """A family's model and what its pictures look like.

    Attributes:
        build: the configuration.
        picture: a picture as (ids of its placeholders, tensors by name); the argument is a seed, which also chooses the
            size where sizes differ.
        film: the same for a video; None if the family has none.
        stack: names of tensors that are stacked, not concatenated.
    """

    name: str
    classes: str
    build: Callable[[], Any]
    picture: Callable[[int], tuple[list[int], dict[str, Tensor]]]
    film: Callable[[int], tuple[list[int], dict[str, Tensor]]] | None = None
    extra: Callable[[Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None
    axes: bool = False
    models: dict[str, Any] = field(default_factory=dict)

    def model(self, attention: str = "sdpa") -> Any:
        if attention not in self.models:
            torch.manual_seed(0)
            config = self.build()
            config._attn_implementation = attention
            self.models[attention] = _sharpened(getattr(transformers, self.classes)(config))
        return self.models[attention]

    def prompt(self, *parts: Any) -> tuple[list[int], list[dict[str, Tensor]]]:
        """Ids and tensors of a prompt of numbers (so many text tokens), ``("image", seed)`` and ``("video", seed)``."""
        ids: list[int] = []
        tensors = []
        for place, part in enumerate(parts):
            if isinstance(part, int):
                generator = torch.Generator().manual_seed(100 * place + part)
                ids += torch.randint(3, 80, (part,), generator=generator).tolist()
            else:
                make = self.picture if part[0] == "image" else self.film
                own, values = make(part[1])
                ids += [START, *own, END]
                tensors.append(values)
        return ids, tensors

    def batch(self, *prompts: tuple[Any, ...]) -> dict[str, Tensor]:
        """Model inputs of several prompts, padded on the left."""
        made = [self.prompt(*parts) for parts in prompts]
        width = max(len(ids) for ids, _ in made)
        ids = torch.tensor([[PAD] * (width - len(own)) + own for own, _ in made])
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own, _ in made])
        inputs = {"input_ids": ids, "attention_mask": mask}
        tensors = [values for _, own in made for values in own]
        for key in dict.fromkeys(key for values in tensors for key in values):
            own = [values[key] for values in tensors if key in values]
            if key == "pixel_values" and own[0].ndim == 5:  # crops of images: padded to the most crops
                most = max(value.shape[1] for value in own)
                own = [torch.nn.functional.pad(value, (0,) * 7 + (most - value.shape[1],)) for value in own]
            inputs[key] = torch.cat(own)
        return inputs if self.extra is None else {**inputs, **self.extra(ids, inputs)}


def _pixels(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=_clip(), text_config={"model_type": "llama", **_TEXT}, image_token_id=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=36,
    )  # fmt: skip


def _next() -> Any:
    return transformers.LlavaNextConfig(
        vision_config=_clip(), text_config={"model_type": "mistral", "sliding_window": None, **_TEXT},
        image_token_id=IMAGE, vision_feature_layer=-2, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )  # fmt: skip


def _onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=_siglip(), text_config={"model_type": "qwen2", **_TEXT}, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]], vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip


def _tiles(seed: int) -> tuple[tuple[int, int], int]:
    """Original (height, width) of a picture, and how many crops it has beside the base view."""
    return [((40, 44), 4), ((20, 45), 2), ((47, 23), 2)][seed % 3]


def _anyres(tiny: Tiny) -> Callable[[int], tuple[list[int], dict[str, Tensor]]]:
    def picture(seed: int) -> tuple[list[int], dict[str, Tensor]]:
        size, tiles = _tiles(seed)
        values = {"pixel_values": _pixels(seed, 1, 1 + tiles, 3, 24, 24), "image_sizes": torch.tensor([size])}
        with torch.no_grad():  # how many tokens these are, only the model knows
            features = tiny.model().model.get_image_features(**values, return_dict=True).pooler_output
        return [IMAGE] * len(features[0]), values

    return picture


def _onevision_film(seed: int) -> tuple[list[int], dict[str, Tensor]]:
    return [VIDEO] * (3 * 9 + 1), {"pixel_values_videos": _pixels(seed, 1, 3, 3, 24, 24)}


def _video_llava() -> Any:
    return transformers.VideoLlavaConfig(
        vision_config=_clip(), text_config={"model_type": "llama", **_TEXT}, image_token_index=IMAGE,
        video_token_index=VIDEO, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip


def _internvl() -> Any:
    tower = {**_TOWER, "model_type": "internvl_vision", "image_size": [24, 24], "patch_size": [4, 4]}
    return transformers.InternVLConfig(
        vision_config=tower, text_config={"model_type": "qwen2", **_TEXT}, image_token_id=IMAGE, image_seq_length=9
    )


def _idefics3(kind: str) -> Any:
    tower = {**_TOWER, "model_type": f"{kind}_vision", "image_size": 24, "patch_size": 4}
    return getattr(transformers, {"idefics3": "Idefics3Config", "smolvlm": "SmolVLMConfig"}[kind])(
        vision_config=tower, text_config={"model_type": "llama", **_TEXT}, image_token_id=IMAGE, scale_factor=2,
        pad_token_id=PAD,
    )  # fmt: skip


def _idefics3_picture(seed: int) -> tuple[list[int], dict[str, Tensor]]:
    tiles = 2 + seed % 2
    ids = [token for tile in range(tiles) for token in (*[IMAGE] * 9, 40 + tile)]
    return ids, {"pixel_values": _pixels(seed, tiles, 3, 24, 24)}


class TiledTiny(Tiny):
    """Tiles are padded per prompt: ``[B, most tiles, 3, S, S]``."""

    def batch(self, *prompts: tuple[Any, ...]) -> dict[str, Tensor]:
        inputs = super().batch(*prompts)
        if "pixel_values" not in inputs:
            return inputs
        rows = [[values["pixel_values"] for values in self.prompt(*parts)[1]] for parts in prompts]
        tiles = [torch.cat(row) if row else torch.zeros(0, 3, 24, 24) for row in rows]
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
        return inputs


def _qwen(kind: str) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    if kind == "qwen3_vl":
        rope["mrope_interleaved"] = True
    tower: dict[str, Any] = {
        "depth": 4, "num_heads": 2, "hidden_size": 16, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    if kind == "qwen2_vl":
        tower |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    else:
        tower |= {"out_hidden_size": 32, "intermediate_size": 24}
    if kind == "qwen2_5_vl":
        tower |= {"window_size": 16, "fullatt_block_indexes": [1, 3]}
    if kind == "qwen3_vl":
        tower |= {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 64}
    classes = {"qwen2_vl": "Qwen2VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig", "qwen3_vl": "Qwen3VLConfig"}
    return getattr(transformers, classes[kind])(
        vision_config=tower, text_config={**_TEXT, "rope_parameters": rope, "head_dim": 8}, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


def _qwen_picture(seed: int) -> tuple[list[int], dict[str, Tensor]]:
    height, width = [(8, 12), (12, 8), (10, 6)][seed % 3]
    grid = torch.tensor([[1, height, width]])
    values = {"pixel_values": _pixels(seed, height * width, 3 * 2 * 16), "image_grid_thw": grid}
    return [IMAGE] * (height * width // 4), values


def _qwen_film(kind: str) -> Callable[[int], tuple[list[int], dict[str, Tensor]]]:
    def film(seed: int) -> tuple[list[int], dict[str, Tensor]]:
        frames, height, width = 3, 6, 8
        per_frame = height * width // 4
        ids = [VIDEO] * (frames * per_frame)
        if kind == "qwen3_vl":  # a time stamp between frames
            ids = [VIDEO] * per_frame
            for frame in range(1, frames):
                ids += [END, 30 + frame, START, *[VIDEO] * per_frame]
        values = {
            "pixel_values_videos": _pixels(seed, frames * height * width, 3 * 2 * 16),
            "video_grid_thw": torch.tensor([[frames, height, width]]),
        }
        return ids, values

    return film


def _token_types(ids: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def _patches(count: int, token: int = IMAGE) -> Callable[[int], tuple[list[int], dict[str, Tensor]]]:
    return lambda seed: ([token] * count, {"pixel_values": _pixels(seed, 1, 3, 24, 24)})


def _video_llava_film(seed: int) -> tuple[list[int], dict[str, Tensor]]:
    return [VIDEO] * (2 * 37), {"pixel_values_videos": _pixels(seed, 1, 2, 3, 24, 24)}


FAMILIES: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny("llava", "LlavaForConditionalGeneration", _llava, _patches(36)),
        Tiny("llava_next", "LlavaNextForConditionalGeneration", _next, _patches(1)),
        Tiny("llava_onevision", "LlavaOnevisionForConditionalGeneration", _onevision, _patches(1), _onevision_film),
        Tiny("video_llava", "VideoLlavaForConditionalGeneration", _video_llava, _patches(36), _video_llava_film),
        Tiny("internvl", "InternVLForConditionalGeneration", _internvl, _patches(9)),
        TiledTiny("idefics3", "Idefics3ForConditionalGeneration", lambda: _idefics3("idefics3"), _idefics3_picture),
        TiledTiny("smolvlm", "SmolVLMForConditionalGeneration", lambda: _idefics3("smolvlm"), _idefics3_picture),
        *(
            Tiny(kind, name, lambda kind=kind: _qwen(kind), _qwen_picture, _qwen_film(kind), _token_types, True)
            for kind, name in (
                ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
                ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
                ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
            )
        ),
    )
}
for _name in ("llava_next", "llava_onevision"):
    FAMILIES[_name].picture = _anyres(FAMILIES[_name])
