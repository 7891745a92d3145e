"""A whole LLaVA with random weights: vision tower, projector, decoder, output head; and prompts of pixels and ids.

transformers' own model and ours are two views of the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from benchmarks.geometry import Geometry, random_model
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.pruning.method import PruningMethod
from llava.utils import UserError


def llava_config(shape: Geometry, attention: str) -> LlavaConfig:
    """Of LLaVA 1.5, its settings otherwise. The last id of the vocabulary stands for visual tokens in transformers' own
    model.
    """
    tower = shape.tower
    config = LlavaConfig(
        text_config=shape.config(attention),
        vision_config=CLIPVisionConfig(
            hidden_size=tower.hidden,
            intermediate_size=tower.ffn,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image,
            patch_size=tower.patch,
        ),
        image_token_index=shape.vocabulary - 1,
        image_seq_length=tower.patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = attention  # of both parts
    return config


def random_llava(
    shape: Geometry, device: torch.device, dtype: torch.dtype, attention: str, seed: int = 0
) -> LlavaLlamaForCausalLM:
    """Our model of these sizes. An image of several crops is one crop behind the other, as in `transformers_own`."""
    model = random_model(lambda: LlavaLlamaForCausalLM(llava_config(shape, attention)), device, dtype, seed)
    model.set_patch_merge_type("flat")
    return model


def transformers_own(model: LlavaLlamaForCausalLM) -> LlavaForConditionalGeneration:
    """transformers' class around the same modules: its code, no second copy of the weights."""
    with torch.device("meta"):
        own = LlavaForConditionalGeneration(model.config)
    own.model, own.lm_head = model.model, model.lm_head
    return own.eval()


@dataclass(frozen=True)
class ImagePrompt:
    """One image per sample, on the device.

    Attributes:
        pixels: `[B, 3, S, S]`, or `[B, crops, 3, S, S]` for images of several crops.
        ids_BT: with one placeholder for the image, as LLaVA writes them.
        expanded_ids_BN: with an id of the vocabulary for every visual token, as transformers' own model wants them.
    """

    pixels: torch.Tensor
    ids_BT: torch.Tensor
    expanded_ids_BN: torch.Tensor


def random_image_prompt(
    shape: Geometry, batch: int, device: torch.device, dtype: torch.dtype, visual: int | None = None, seed: int = 1
) -> ImagePrompt:
    """`batch` samples of one length; `visual` instead of the geometry's number of visual tokens.

    Raises:
        UserError: `visual` is no whole number of crops.
    """
    visual = shape.visual if visual is None else visual
    side, patches = shape.tower.image, shape.tower.patches
    crops, rest = divmod(visual, patches)
    if rest or not crops:
        raise UserError(f"--visual-tokens: {visual} is no multiple of the {patches} patches of a crop of {shape.name}")
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, crops, 3, side, side, generator=generator)
    text = torch.randint(1, shape.vocabulary - 1, (batch, shape.before + shape.after), generator=generator)
    before, after = text.split((shape.before, shape.after), dim=1)

    def around(count: int, token: int) -> torch.Tensor:
        return torch.cat((before, before.new_full((batch, count), token), after), dim=1).to(device)

    return ImagePrompt(
        (pixels if crops > 1 else pixels[:, 0]).to(device, dtype),
        around(1, IMAGE_TOKEN_INDEX),
        around(visual, shape.vocabulary - 1),
    )


Watch = Callable[[Any], AbstractContextManager]
"""What goes around a pass, given the attached run (None: nothing is attached)."""


def transformers_first_token(
    own: LlavaForConditionalGeneration, prompt: ImagePrompt, watch: Watch = nullcontext
) -> Callable[[], torch.Tensor]:
    """From pixels to the logits of the first new token, `[B, vocabulary]`, in transformers' own model."""
    pixels = prompt.pixels.reshape(-1, *prompt.pixels.shape[-3:])

    def work() -> torch.Tensor:
        with watch(None):
            output = own(input_ids=prompt.expanded_ids_BN, pixel_values=pixels, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    return work


def first_token(
    model: LlavaLlamaForCausalLM, method: PruningMethod, prompt: ImagePrompt, watch: Watch = nullcontext
) -> Callable[[], torch.Tensor]:
    """The same in our model, attaching the method included."""

    def work() -> torch.Tensor:
        with method.attach(model) as run, watch(run):
            output = model(prompt.ids_BT, images=prompt.pixels, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    return work


@contextmanager
def tower_watched(tower: nn.Module) -> Iterator[dict[str, int]]:
    """While it lasts, counts what runs in a vision tower.

    tower_layers: encoder layers that ran, counted by their MLPs. extra_rows: most query rows that were computed at once
    beside the layers' own: 1 where only the CLS row is scored, 0 where nothing is.
    """
    seen = {"tower_layers": 0, "extra_rows": 0}
    inside: list[nn.Module] = []

    def enter(attention: nn.Module, *_: Any) -> None:
        inside.append(attention)

    def leave(*_: Any) -> None:
        inside.pop()

    def projected(_: nn.Module, args: Any, queries_NTC: torch.Tensor) -> None:
        if not inside:
            seen["extra_rows"] = max(seen["extra_rows"], queries_NTC.shape[1])

    def ran(*_: Any) -> None:
        seen["tower_layers"] += 1

    with ExitStack() as stack:
        for layer in tower.encoder.layers:
            for handle in (
                layer.self_attn.register_forward_pre_hook(enter),
                layer.self_attn.register_forward_hook(leave),
                layer.self_attn.q_proj.register_forward_hook(projected),
                layer.mlp.register_forward_hook(ran),
            ):
                stack.callback(handle.remove)
        yield seen
