"""A vision tower and a projector by themselves, built as LLaVA's own package builds them, for scripts that do so.

The models of this package do not use them: their tower and projector are modules of the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava.model.projector import projector_depth
from llava.model.vision import VisionTower


class CLIPVisionTower(VisionTower, nn.Module):
    """A CLIP tower: pixels `[N, 3, S, S]`, or a list of `[3, S, S]`, to features of the selected layer `[N, P, C]`.

    Args:
        vision_tower: folder or hub name.
        args: has `mm_vision_select_layer` and perhaps `mm_vision_select_feature`.
        delay_load: read only the configuration until `load_model`.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        nn.Module.__init__(self)
        self.is_loaded = False  # type: ignore[misc]
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if delay_load:
            self.cfg_only = CLIPVisionConfig.from_pretrained(vision_tower)
        else:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Reads the weights; the tower is not trained."""
        if not self.is_loaded:
            self.image_processor = CLIPImageProcessor.from_pretrained(self.vision_tower_name)
            self.vision_tower = CLIPVisionModel.from_pretrained(self.vision_tower_name, device_map=device_map)
            self.vision_tower.requires_grad_(False)
            self.is_loaded = True  # type: ignore[misc]

    forward = VisionTower.__call__

    @property
    def config(self) -> Any:
        return self.vision_tower.config if self.is_loaded else self.cfg_only


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> CLIPVisionTower:
    """The tower that a configuration names (`mm_vision_tower` or `vision_tower`); kwargs: of `CLIPVisionTower`."""
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if not isinstance(name, str):
        raise ValueError(f"the configuration names no vision tower: mm_vision_tower is {name!r}")
    if getattr(vision_tower_cfg, "s2", False):
        raise ValueError("towers at several scales (s2) are not part of autoprune-llava")
    return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)


class IdentityMap(nn.Module):
    """The projector that changes nothing."""

    config = {"mm_projector_type": "identity"}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """A projector with random weights, its parameters named as in `mm_projector.bin` (`0.weight`, `2.weight`, ...).

    Args:
        config: has `mm_hidden_size`, `hidden_size` and perhaps `mm_projector_type` (`linear` without it).
    """
    kind = getattr(config, "mm_projector_type", "linear")
    depth = projector_depth(kind)
    if depth is None:
        raise ValueError(f"unknown projector type: {kind}; known are linear, identity and mlpNx_gelu")
    if depth == 0:
        return IdentityMap()
    first = nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "linear":
        return first
    layers: list[nn.Module] = [first]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
