"""Features and CLS attention of a CLIP vision tower.

Runs the tower's own modules (any attention implementation) up to the selected layer and no further, and
computes the one row of attention that pruning needs. Knows nothing of prompts, projectors or the decoder.

Shapes: N crops, P patches, T tokens of the tower (CLS + P), C tower width, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava.pruning.scores import attention_rows

SELECT_FEATURES = ("patch", "cls_patch")


@dataclass(frozen=True)
class VisionFeatures:
    """What the tower says about a batch of crops."""

    features_NPC: Tensor
    # Mean over heads of the CLS row, float32, one value per feature row; None unless it was asked for.
    cls_attention_NP: Tensor | None


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: its weights' device, or the one accelerate moves them to when they are offloaded."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(module.parameters()).device


def layers_to_run(select_layer: int, num_layers: int) -> int:
    """How many encoder layers produce `hidden_states[select_layer]` of a tower with `num_layers` layers.

    `hidden_states` has `num_layers + 1` entries (the embeddings come first), so -2 means all layers but the
    last.
    """
    count = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= count <= num_layers:
        raise ValueError(f"mm_vision_select_layer {select_layer} is out of range for a tower of {num_layers} layers")
    return count


def cls_attention(layer: nn.Module, hidden_NTC: Tensor) -> Tensor:
    """CLS row of one encoder layer's attention, mean over heads: float32 `[N, T]`, entry 0 is CLS to itself.

    Args:
        layer: encoder layer with `layer_norm1` and `self_attn.{q_proj,k_proj,scale,head_dim}`.
        hidden_NTC: the hidden states that enter the layer.

    Source: AutoPrune, vision side; rows are not renormalized over the patches, so the patch entries sum to
    less than 1.
    """
    attention = layer.self_attn
    # The layer's own hooks would move its input; its parts are called here before it is.
    normed_NTC = layer.layer_norm1(hidden_NTC.to(execution_device(layer.layer_norm1)))
    crops, tokens, _ = normed_NTC.shape
    # Only row 0 is wanted: one query instead of T, and no T x T map.
    query_NHTD = attention.q_proj(normed_NTC[:, :1]).view(crops, 1, -1, attention.head_dim).transpose(1, 2)
    key_NHTD = attention.k_proj(normed_NTC).view(crops, tokens, -1, attention.head_dim).transpose(1, 2)
    return attention_rows(query_NHTD, key_NHTD, attention.scale)[:, :, 0].mean(dim=1)


def encode_crops(
    tower: nn.Module,
    pixel_values: Tensor,
    select_layer: int = -2,
    select_feature: str = "patch",
    with_cls_attention: bool = False,
) -> VisionFeatures:
    """Hidden states of the selected layer, and the CLS attention of the layer that produced them.

    Args:
        tower: transformers' `CLIPVisionModel`.
        pixel_values: `[N, 3, S, S]`, any dtype and device.
        select_layer: index into the tower's hidden states, negative from the end (LLaVA: -2).
        select_feature: "patch" drops the CLS token, "cls_patch" keeps it as the first feature row.
        with_cls_attention: also compute the CLS attention, one value per feature row.

    Raises:
        ValueError: unknown `select_feature`, layer out of range, or CLS attention of the embeddings (no layer ran).
    """
    if select_feature not in SELECT_FEATURES:
        raise ValueError(f"mm_vision_select_feature must be one of {SELECT_FEATURES}, got {select_feature!r}")
    layers = tower.encoder.layers
    count = layers_to_run(select_layer, len(layers))
    if with_cls_attention and count == 0:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} selects the embeddings, which have no attention: "
            "pruning by CLS attention needs a later layer"
        )
    patch_embedding = tower.embeddings.patch_embedding
    pixel_values = pixel_values.to(device=execution_device(patch_embedding), dtype=patch_embedding.weight.dtype)
    hidden_NTC = tower.pre_layrnorm(tower.embeddings(pixel_values))
    attention_NT = None
    for index, layer in enumerate(layers[:count]):
        if with_cls_attention and index == count - 1:
            attention_NT = cls_attention(layer, hidden_NTC)
        hidden_NTC = layer(hidden_NTC, None)
    first = 1 if select_feature == "patch" else 0
    return VisionFeatures(hidden_NTC[:, first:], None if attention_NT is None else attention_NT[:, first:])


class VisionTower:
    """LLaVA's view of the vision tower, for scripts that ask `model.get_vision_tower()` for its parts.

    Not a module: it owns no weights and only refers to the tower inside the model.
    """

    is_loaded = True

    def __init__(self, tower: nn.Module, image_processor: object, select_layer: int, select_feature: str):
        self.vision_tower = tower
        self.image_processor = image_processor
        self.select_layer = select_layer
        self.select_feature = select_feature

    def load_model(self, device_map: object = None) -> None:
        """Nothing to do: the tower is loaded with the model. Kept because LLaVA's scripts call it."""

    @torch.no_grad()
    def __call__(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features before the projector, in the images' dtype: `[N, P, C]`, or a list for a list of `[3, S,
        S]`.
        """
        if isinstance(images, list):
            return [self(image[None] if image.ndim == 3 else image) for image in images]
        encoded = encode_crops(self.vision_tower, images, self.select_layer, self.select_feature)
        return encoded.features_NPC.to(images.dtype)

    @property
    def config(self) -> object:
        return self.vision_tower.config

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)
