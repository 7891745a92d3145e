"""What a family is: the facts about its classes that the engine must know. Derive from :class:`Family`, one file each.

Shapes: N crops or frames, T tokens of the tower (CLS included), V visual tokens of a prompt, F values per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.pruning.types import UnsupportedError


@dataclass(frozen=True)
class Call:
    """One run of the tower: what the model's ``get_image_features`` (or ``..._video_...``) was called with and said.

    Attributes:
        model: the model without its head.
        modality: ``image`` or ``video``.
        arguments: by name, defaults and the configuration's values filled in.
        packs: calls of the model's ``pack_image_features`` inside, as (positional, keyword) arguments.
    """

    model: Any
    modality: str
    arguments: Mapping[str, Any]
    packs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]

    def option(self, name: str) -> Any:
        """An argument, or where it was left out the value in the configuration."""
        value = self.arguments.get(name)
        return getattr(self.model.config, name) if value is None else value


@dataclass(frozen=True)
class Placed:
    """Values of the tokens of one image or video, in the order of the prompt.

    Attributes:
        values_VF: float32.
        newline_V: which of the tokens are structure (newlines, separators), without a value; None: none is.
        crop_V: which crop each token is from; None: there is one.
    """

    values_VF: Tensor
    newline_V: Tensor | None = None
    crop_V: Tensor | None = None


class Family:
    """A family of models. Subclasses say what differs from a CLIP-like tower in front of a decoder.

    Attributes:
        name: ``model_type`` of the configuration.
        classes: names of the classes in transformers, with and without head.
        has_cls: whether the tower has a CLS token, at index 0 of its tokens.
        has_newlines: whether images have structure tokens of their own, which only :meth:`place` can tell.
        pools: whether several tokens of the tower become one visual token.
        modalities: what the family takes beside text.
        refused: why the family cannot be pruned; None if it can.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    has_cls: ClassVar[bool] = True
    has_newlines: ClassVar[bool] = False
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    refused: ClassVar[str | None] = None

    def without_head(self, model: nn.Module) -> Any:
        """The model that puts features among embeddings: itself, or its ``model``."""
        return model if hasattr(model, "language_model") else model.model

    def tokens(self, config: Any) -> dict[str, int]:
        """Id of the placeholder token, by modality."""
        return {modality: getattr(config, f"{modality}_token_id") for modality in self.modalities}

    def tower(self, model: Any, modality: str) -> Any:
        """The vision tower."""
        return model.vision_tower

    def attentions(self, model: Any, modality: str) -> list[nn.Module]:
        """Attention modules of the tower's layers, first layer first."""
        tower = self.tower(model, modality)
        encoder = getattr(tower, "vision_model", tower).encoder
        layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
        return [layer.self_attn if hasattr(layer, "self_attn") else layer.attention for layer in layers]

    def global_layers(self, model: Any, modality: str) -> list[int]:
        """Layers of the tower in which a token sees all of its picture."""
        return list(range(len(self.attentions(model, modality))))

    def used_layer(self, model: Any, modality: str) -> int:
        """Index of the layer whose output becomes the features."""
        layers = len(self.attentions(model, modality))
        chosen = getattr(model.config, "vision_feature_layer", -1)
        several = [chosen] if isinstance(chosen, int) else chosen
        # Hidden states begin with the embeddings. Of several layers, side by side, the deepest.
        count = max(index if index >= 0 else layers + 1 + index for index in several)
        if count < 1:
            raise UnsupportedError(f"{self.name}: vision_feature_layer={chosen} is the embeddings, without attention")
        return count - 1

    def place(self, call: Call, runs: Sequence[Tensor]) -> list[Placed]:
        """Bring values of the tower's tokens into the order of the prompt.

        Args:
            call: the run of the tower.
            runs: what the attention modules said, one tensor ``[N, T, F]`` per call of a module.

        Returns:
            One entry per image (or video), in the order of their features.
        """
        raise NotImplementedError


def whole(runs: Sequence[Tensor]) -> Tensor:
    """The one call of a tower that takes all crops together, ``[N, T, F]``."""
    (values,) = runs
    return values


def without_cls(call: Call, values_NTF: Tensor) -> Tensor:
    """Without the CLS token, where the model drops it too."""
    return values_NTF[:, 1:] if call.option("vision_feature_select_strategy") == "default" else values_NTF


def pooled(values_NTF: Tensor, factor: int) -> Tensor:
    """Means over squares of ``factor`` x ``factor`` tokens, raster order: ``[N, T / factor^2, F]``."""
    side = round(values_NTF.shape[1] ** 0.5)
    cut = side // factor
    squares = values_NTF.reshape(len(values_NTF), cut, factor, cut, factor, values_NTF.shape[2])
    return squares.mean((2, 4)).flatten(1, 2)


def packed(call: Call, values_NTF: Tensor) -> list[Placed]:
    """Let the model's own ``pack_image_features`` put values together as it put the features together."""
    (args, kwargs) = call.packs[-1]
    names = ("image_features", "image_sizes")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    crops = [len(features) for features in given["image_features"]]
    number = torch.cat([torch.arange(n, device=values_NTF.device) for n in crops]).to(values_NTF)
    shape = values_NTF.shape[:2]
    marks = torch.stack((torch.ones(shape).to(values_NTF), number[:, None].expand(shape)), dim=2)
    extended = torch.cat((marks, values_NTF), dim=2)
    given["image_features"] = list(torch.split(extended, crops))
    if given.get("image_newline") is not None:
        given["image_newline"] = extended.new_zeros(extended.shape[2])  # the first mark says what is a newline
    images, _ = call.model.pack_image_features(**given)
    # Crops may be resized together: the nearest number is that of the crop.
    return [Placed(image[:, 2:], image[:, 0] < 0.5, image[:, 1].round().long()) for image in images]
