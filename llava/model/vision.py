"""Features and CLS attention of a CLIP vision tower.

Runs the tower's own modules (any attention implementation) up to the selected layer and no further, and
computes the few values that a pruning method declares.

Shapes: N crops, P patches, T tokens of the tower (CLS + P), C tower width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava.compat import execution_device
from llava.model.tower_merging import TowerMerger
from llava.pruning.scores import attention_rows, reliable_attention
from llava.pruning.vision import CLS_ATTENTION, ReliableAttention, TowerValue, VisionFact

Value = TowerValue | ReliableAttention
SELECT_FEATURES = ("patch", "cls_patch")
_BLOCK = 64


@dataclass(frozen=True)
class VisionFeatures:
    """What the tower says about a batch of crops."""

    features_NPC: Tensor
    # Mean over heads of the CLS row, float32, one value per feature row; None unless it was asked for.
    cls_attention_NP: Tensor | None
    # What else was asked for, by name, `[N, P, ...]` (`cls_attention` is among them).
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    # The CLS token of the selected layer, `[N, C]`; None where it is among the features or tokens were merged.
    cls_NC: Tensor | None = None


def layers_to_run(select_layer: int, num_layers: int) -> int:
    """How many encoder layers produce `hidden_states[select_layer]` of a tower with `num_layers` layers.

    `hidden_states` has `num_layers + 1` entries (the embeddings come first), so -2 means all layers but the
    last.
    """
    count = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= count <= num_layers:
        raise ValueError(f"mm_vision_select_layer {select_layer} is out of range for a tower of {num_layers} layers")
    return count


def layer_facts(layer: nn.Module, hidden_NTC: Tensor, values: set[Value]) -> dict[Value, Tensor]:
    """What one encoder layer says about its tokens, `[N, T, ...]`, CLS included; only the rows that are needed.

    Args:
        layer: encoder layer with `layer_norm1` and `self_attn.{q_proj,k_proj,scale,head_dim}`.
        hidden_NTC: the hidden states that enter the layer.
        values: what is wanted.

    Attention is not renormalized over the patches: the patch entries of a row sum to less than 1.
    """
    attention = layer.self_attn
    # The layer's own hooks would move its input; its parts are called here before it is.
    normed_NTC = layer.layer_norm1(hidden_NTC.to(execution_device(layer.layer_norm1)))
    heads = (-1, attention.head_dim)
    rows = slice(None) if any(value.of_all_rows for value in values) else slice(1)
    # Where only row 0 is wanted: one query instead of T, and no T x T map.
    query_NTC = attention.q_proj(normed_NTC[:, rows]) if any(value.is_attention for value in values) else None
    key_NTC = attention.k_proj(normed_NTC)
    key_NHTD = key_NTC.unflatten(-1, heads).transpose(1, 2)
    facts: dict[Value, Tensor] = {}
    for value in values:
        value.check_known()
        if value is TowerValue.KEYS:
            facts[value] = key_NHTD.float().mean(1)
        elif value is TowerValue.WIDE_KEYS:
            facts[value] = key_NTC
        elif value is TowerValue.WIDE_CLS_ATTENTION:
            width = key_NTC.shape[-1]
            facts[value] = attention_rows(query_NTC[:, None, :1], key_NTC[:, None], width**-0.5)[:, 0, 0]
        else:
            query_NHTD = query_NTC.unflatten(-1, heads).transpose(1, 2)
            last = 1 if value is TowerValue.CLS_ATTENTION else query_NHTD.shape[2]
            total: Any = 0
            parts = []
            # In blocks of rows: the full map of all heads never exists.
            for start in range(0, last, _BLOCK):
                block = query_NHTD[:, :, start : min(start + _BLOCK, last)]
                own = attention_rows(block, key_NHTD, attention.scale).mean(1)
                total = total + own.sum(1)
                parts += [own] * isinstance(value, ReliableAttention)
            if isinstance(value, ReliableAttention):
                facts[value] = reliable_attention(torch.cat(parts, dim=1), value.threshold)
            else:
                facts[value] = total / last
    return facts


def encode_crops(
    tower: nn.Module,
    pixel_values: Tensor,
    select_layer: int = -2,
    select_feature: str = "patch",
    with_cls_attention: bool = False,
    facts: Mapping[str, VisionFact] | None = None,
    merger: TowerMerger | None = None,
    timer: Callable[[], AbstractContextManager] = nullcontext,
) -> VisionFeatures:
    """Hidden states of the selected layer, and what pruning has to know about them.

    Args:
        tower: transformers' `CLIPVisionModel`.
        pixel_values: `[N, 3, S, S]`, any dtype and device.
        select_layer: index into the tower's hidden states, negative from the end (LLaVA: -2).
        select_feature: "patch" drops the CLS token, "cls_patch" keeps it as the first feature row.
        with_cls_attention: also compute the CLS attention of the layer that made the features, one value per
            feature row.
        facts: further values by name; a layer behind the selected one is run only as far as a value needs it.
        merger: merges tokens inside the layers.
        timer: context manager around what only pruning needs.

    Raises:
        ValueError: unknown `select_feature`, a layer out of range, or attention of the embeddings (no layer ran).
    """
    if select_feature not in SELECT_FEATURES:
        raise ValueError(f"mm_vision_select_feature must be one of {SELECT_FEATURES}, got {select_feature!r}")
    layers = tower.encoder.layers
    count = layers_to_run(select_layer, len(layers))
    wanted = dict(facts or {})
    if with_cls_attention:
        wanted[CLS_ATTENTION] = VisionFact(TowerValue.CLS_ATTENTION)
    places = {name: (_fact_layer(fact, count, len(layers), select_layer), fact.value) for name, fact in wanted.items()}
    patch_embedding = tower.embeddings.patch_embedding
    pixel_values = pixel_values.to(device=execution_device(patch_embedding), dtype=patch_embedding.weight.dtype)
    hidden_NTC = tower.pre_layrnorm(tower.embeddings(pixel_values))
    said: dict[tuple[int, Value], Tensor] = {}
    selected_NTC = hidden_NTC if count == 0 else None
    for index in range(max([count, *(layer + 1 for layer, _ in places.values())])):
        values = {value for layer, value in places.values() if layer == index}
        if values:
            with timer():
                found = layer_facts(layers[index], hidden_NTC, values)
            said |= {(index, value): tensor for value, tensor in found.items()}
        if index >= count and not any(layer > index for layer, _ in places.values()):
            break  # the layer was only asked for its keys and queries
        if merger is None or index >= count:
            hidden_NTC = layers[index](hidden_NTC, None)
        else:
            hidden_NTC = merger.run(layers[index], index, count, hidden_NTC)
        if index == count - 1:
            selected_NTC = hidden_NTC
    first = 1 if select_feature == "patch" else 0
    features = selected_NTC[:, first:]
    return VisionFeatures(
        features,
        said[places[CLS_ATTENTION]][:, first:] if CLS_ATTENTION in places else None,
        {name: said[place][:, first:].to(features.device) for name, place in places.items()},
        selected_NTC[:, 0] if first and merger is None else None,
    )


def _fact_layer(fact: VisionFact, count: int, layers: int, select_layer: int) -> int:
    if fact.layer is None:
        if count == 0:
            raise ValueError(
                f"mm_vision_select_layer {select_layer} selects the embeddings, which have no attention: "
                "this pruning method needs a later layer"
            )
        return count - 1
    layer = fact.layer if fact.layer >= 0 else layers + fact.layer
    if not 0 <= layer < layers:
        raise ValueError(f"the pruning method asks for layer {fact.layer} of a vision tower with {layers} layers")
    return layer


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
    def __call__(self, images: Tensor | list[Tensor]) -> Any:
        """Features before the projector, in the images' dtype: `[N, P, C]`, or a list for a list of `[3, S,
        S]`.
        """
        if isinstance(images, list):
            return [self(image[None] if image.ndim == 3 else image) for image in images]
        encoded = encode_crops(self.vision_tower, images, self.select_layer, self.select_feature)
        return encoded.features_NPC.to(images.dtype)

    @property
    def config(self) -> Any:
        return self.vision_tower.config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.vision_tower.parameters()).device

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
