"""LLaVA's calling conventions on transformers' `LlavaForConditionalGeneration`.

Ids carry -200 placeholders, images come beside them, `generate` returns new tokens only. The modules,
caches, attention kernels and the generation loop are transformers'; this file prepares what they are given
and tells an attached pruning run where the visual tokens are. It does not prune and does not load
checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlavaForConditionalGeneration

from llava.compat import DYNAMIC_CACHES, execution_device
from llava.mm_utils import padding_mask, padding_share
from llava.model.assemble import MERGE_TYPES, arrangement_of
from llava.model.configuration import LlavaConfig
from llava.model.image_arguments import Images, size_list, split_images
from llava.model.multimodal import (
    MultimodalInputs,
    VisualTokens,
    check_ids,
    check_image_count,
    count_placeholders,
    positions_from_mask,
    splice,
    text_ids,
)
from llava.model.projector import (
    DEFAULT_PROJECTOR,
    Adapted,
    Projector,
    TokenAdapter,
    projector_depth,
    projector_dtype,
)
from llava.model.vision import VisionTower, encode_crops
from llava.model.visual_tokens import encode_images
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.notices import say
from llava.utils import UserError


class LlavaLlamaForCausalLM(LlavaForConditionalGeneration):
    """LLaVA with a Llama decoder.

    `config` is transformers' `LlavaConfig` with LLaVA's own fields beside it (`image_aspect_ratio`,
    `image_grid_pinpoints`, `mm_vision_select_layer`, `tokenizer_model_max_length`, ...); see
    `llava.model.configuration`.
    """

    # Set by the loader; scripts reach it through `get_vision_tower().image_processor`.
    image_processor: Any = None
    config_class = LlavaConfig
    _chosen_merge_type: str | None = None

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        kind = getattr(config, "mm_projector_type", DEFAULT_PROJECTOR)
        if kind != DEFAULT_PROJECTOR:
            depth = projector_depth(kind)
            widths = config.vision_config.hidden_size, config.text_config.hidden_size
            self.model.multi_modal_projector = Projector(*widths, depth)
        if mixed := getattr(config, "mm_image_adapter", None):
            self.model.image_adapter = TokenAdapter(mixed)
        if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
            width = config.text_config.hidden_size
            self.model.image_newline = nn.Parameter(torch.randn(width, dtype=self.dtype) * width**-0.5)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> LlavaLlamaForCausalLM:
        """The model of a checkpoint, read by `load_pretrained_model` with its options and defaults.

        Transformers' own loading would take a flat LLaVA config for the 7B defaults and, for a class it does not know,
        skip the weight renames and leave the head random. With None it is used for what it is good at: placing a
        translated `state_dict`.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        import llava.model  # whose loader, imported when it is first asked for, builds this class

        return llava.model.load_pretrained_model(str(pretrained_model_name_or_path), *args, **kwargs)[1]

    # --- parts, under LLaVA's names ---

    def get_model(self) -> nn.Module:
        """The model without its language-model head."""
        return self.model

    def get_vision_tower(self) -> VisionTower:
        """LLaVA's view of the vision tower."""
        return VisionTower(
            self.model.vision_tower,
            self.image_processor,
            self.config.vision_feature_layer,
            "patch" if self.config.vision_feature_select_strategy == "default" else "cls_patch",
        )

    @property
    def image_adapter(self) -> TokenAdapter | None:
        """What mixes the patches of a picture behind the projector (Senna); None in LLaVA."""
        return getattr(self.model, "image_adapter", None)

    @property
    def mixes_patches(self) -> bool:
        """Whether visual tokens have no place in the picture: nothing that is said of patches holds for them."""
        return self.image_adapter is not None

    @property
    def projector(self) -> nn.Module | Adapted:
        """From features of the tower to visual tokens."""
        projector: nn.Module = self.model.multi_modal_projector
        return projector if self.image_adapter is None else Adapted(projector, self.image_adapter)

    @property
    def pruning_run(self) -> Any | None:
        """The pruning run attached to the decoder, if any."""
        return getattr(self.get_decoder(), "pruning_run", None)

    # --- images ---

    def merge_type(self) -> str:
        """How crops are put together now: what was chosen by `set_patch_merge_type`; otherwise `spatial` while a
        pruning method selects tokens, and the checkpoint's own where nothing is pruned.
        """
        if self._chosen_merge_type is not None:
            return self._chosen_merge_type
        if self.pruning_run is not None and self.pruning_run.selects:
            return "spatial"
        return getattr(self.config, "mm_patch_merge_type", None) or "flat"

    def set_patch_merge_type(self, merge_type: str | None) -> None:
        """Choose how crops are put together, for dense and pruned runs alike; None goes back to `merge_type`'s default.

        The choice is written to `config.mm_patch_merge_type`, where scripts look for it. What the types are:
        `llava.model.assemble.arrange_crops`.

        Raises:
            UserError: unknown, or newlines asked of a checkpoint that has none.
        """
        if merge_type is not None and merge_type not in MERGE_TYPES:
            raise UserError(f"mm_patch_merge_type {merge_type!r}: expected one of {', '.join(MERGE_TYPES)}")
        if merge_type == "spatial_unpad" and not hasattr(self.model, "image_newline"):
            raise UserError(
                "mm_patch_merge_type 'spatial_unpad' needs a checkpoint with image_newline (LLaVA-1.6); "
                "choose 'flat' or 'spatial'"
            )
        self._chosen_merge_type = merge_type
        if merge_type is not None:
            self.config.mm_patch_merge_type = merge_type

    def encode_images(self, images: Tensor) -> Tensor:
        """Projected features `[n, P, C]` of crops `[n, 3, S, S]`."""
        tower, projector = self.get_vision_tower(), self.projector
        encoded = encode_crops(tower.vision_tower, images, tower.select_layer, tower.select_feature)
        return projector(encoded.features_NPC.to(projector_dtype(projector, encoded.features_NPC.dtype)))

    def encode_visual_tokens(
        self,
        images: Images | None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        image_masks: Sequence[Tensor | None] | None = None,
        with_cls_attention: bool = False,
        images_per_row: Sequence[int] | None = None,
        texts: Sequence[Tensor] | None = None,
    ) -> list[VisualTokens]:
        """Visual tokens of every image, in order; reduced, if a pruning run is attached that works before the decoder.

        Args:
            images: see `split_images`; an image of several crops is a base view and tiles row by row ("anyres").
            image_sizes: original `(width, height)` per image. Needed for images of several crops; where the
                checkpoint pads to a square it also tells which patches are padding, whose CLS attention becomes 0.
            image_masks: bool per image, one entry per visual token (`[grid, grid]` for one crop), True = padding;
                overrides what `image_sizes` says. None for an image: nothing of it is padding.
            with_cls_attention: compute the CLS attention of each token too, where tokens are patches.
            images_per_row: images of each prompt, which share a pruning budget; default: every image has its own.
            texts: embeddings `[T, C]` of each prompt's text, for pruning methods that look at it.

        Raises:
            UserError: sizes, masks and images do not fit together.
        """
        per_image = split_images(images)
        if not per_image:
            return []
        sizes = size_list(image_sizes)
        for name, values in (("image_sizes", sizes), ("image_masks", image_masks)):
            if values is not None and len(values) != len(per_image):
                raise UserError(f"{name} has {len(values)} entries for {len(per_image)} image(s)")
        # LLaVA takes a tensor [n, 3, S, S] as it is and arranges everything else by the merge type.
        merged = not isinstance(images, Tensor) or images.ndim == 5
        run, merge_type, patches = self.pruning_run, self.merge_type(), self._features_per_crop()
        if run is not None and run.method.merges_in_tower and merge_type == "spatial_unpad":
            merge_type = "spatial"  # what stands for several patches cannot be cut at the border of the picture
            if self._chosen_merge_type is not None:
                say(
                    run.method.name,
                    "merges tokens inside the vision tower: mm_patch_merge_type 'spatial' instead of 'spatial_unpad'",
                )
        arrangements = [
            arrangement_of(
                self.config,
                merge_type,
                len(image) if image.ndim == 4 else 1,
                patches,
                None if sizes is None else sizes[i],
                merged,
            )
            for i, image in enumerate(per_image)
        ]
        device = execution_device(self.model.vision_tower.embeddings.patch_embedding)
        stacks = [(image if image.ndim == 4 else image[None]).to(device) for image in per_image]
        if len({stack.shape[1:] for stack in stacks}) > 1:
            shapes = ", ".join(str(list(stack.shape[1:])) for stack in stacks)
            raise UserError(f"images must have one size, the vision tower's, found {shapes}: use process_images first")
        masks: list[Tensor | None] = list(image_masks) if image_masks is not None else [None] * len(stacks)
        side = self.get_vision_tower().num_patches_per_side
        if self.mixes_patches:
            masks = [None] * len(stacks)  # no token shows padding alone
            if crops := next((len(stack) for stack in stacks if len(stack) > 1), None):
                raise UserError(f"this model takes a picture in one piece, found {crops} crops: give them as images")
        elif image_masks is None and sizes is not None and self.config_pads_images():
            masks = [
                # A square picture has no padding.
                padding_mask(size, side) if len(stack) == 1 and size[0] != size[1] else None
                for size, stack in zip(sizes, stacks, strict=True)
            ]

        def padding(image: int) -> Tensor | None:
            # What was given as a mask says it all; else see `padding_share`.
            if image_masks is not None or masks[image] is None or sizes is None:
                return masks[image]
            return padding_share(sizes[image], side)

        with nullcontext() if run is None else run.exclusive():  # a method may look into the tower's layers
            return encode_images(
                self.get_vision_tower(),
                self.projector,
                getattr(self.model, "image_newline", None),
                stacks,
                arrangements,
                masks,
                [1] * len(stacks) if images_per_row is None else images_per_row,
                with_cls_attention and not self.mixes_patches,
                run,
                texts,
                padding,
            )

    def _features_per_crop(self) -> int:
        if self.image_adapter is not None:
            return self.image_adapter.tokens
        tower = self.get_vision_tower()
        return tower.num_patches + (tower.select_feature == "cls_patch")

    def config_pads_images(self) -> bool:
        """Whether the checkpoint wants images padded to a square."""
        return getattr(self.config, "image_aspect_ratio", None) == "pad"

    # --- prompts ---

    def prepare_multimodal_inputs(
        self,
        input_ids: Tensor,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_masks: Sequence[Tensor] | None = None,
        with_cls_attention: bool | None = None,
    ) -> MultimodalInputs:
        """Everything the decoder needs for prompts `[B, T]` with -200 placeholders.

        Rows may have any number of images at any place; shorter rows are padded on the left, whatever side
        `input_ids` was padded on. Rows longer than the checkpoint's `tokenizer_model_max_length` are cut at
        the end, as in LLaVA.

        Args:
            input_ids: `[B, T]`.
            images: one per placeholder, in reading order over the whole batch; see `split_images`.
            image_sizes: original `(width, height)` per image.
            attention_mask: `[B, T]`, 0 = padding on either side; None = nothing is padded.
            labels: `[B, T]`, expanded like the prompts.
            image_masks: see `encode_visual_tokens`.
            with_cls_attention: None = only if an attached pruning run needs it.

        Raises:
            UserError: placeholders and images do not match, or an id is negative and no placeholder.
        """
        if input_ids.ndim == 1:
            input_ids = input_ids[None]
        run = self.pruning_run
        if with_cls_attention is None:
            with_cls_attention = run is not None and bool(run.needs_cls_attention)
        embeddings = self.get_input_embeddings()

        def embed(ids: Tensor) -> Tensor:
            return embeddings(ids.to(execution_device(embeddings), non_blocking=True))

        # Read here, if they are on a device at all: behind the tower the host would wait for it.
        input_ids = input_ids.cpu()
        attention_mask = None if attention_mask is None else attention_mask.cpu()
        check_ids(input_ids, attention_mask)
        placeholders = count_placeholders(input_ids, attention_mask)
        check_image_count(placeholders, len(split_images(images)))
        texts = None
        if run is not None and run.method.parts[0].reads_text:
            texts = [embed(ids) for ids in text_ids(input_ids, attention_mask)]
        visual = self.encode_visual_tokens(images, image_sizes, image_masks, with_cls_attention, placeholders, texts)
        max_length = getattr(self.config, "tokenizer_model_max_length", None)
        return splice(embed, input_ids, visual, attention_mask, labels, max_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_masks: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits `[B, L, vocab]` over the expanded sequence (or the pruned one, with a pruning run attached).

        With `images`, `input_ids` `[B, T]` are expanded as `prepare_multimodal_inputs` says, and so are
        `labels`. Without images this is a plain decoder call, and `input_ids` keep their padding.
        """
        run = self.pruning_run
        if run is not None and (kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs") is not None):
            raise UserError("a pruning run is attached: pass images= with -200 placeholders instead of pixel_values=")
        starts = past_key_values is None or past_key_values.get_seq_length() == 0
        if input_ids is not None and inputs_embeds is None and starts and kwargs.get("pixel_values") is None:
            if images is not None or bool((input_ids < 0).any()):
                if position_ids is not None:
                    raise UserError(
                        "position_ids= cannot go with images=: positions follow from the expanded prompt and its "
                        "attention_mask"
                    )
                prepared = self.prepare_multimodal_inputs(
                    input_ids, images, image_sizes, attention_mask, labels, image_masks
                )
                inputs_embeds, input_ids, labels = prepared.inputs_embeds, None, prepared.labels
                attention_mask, position_ids = prepared.attention_mask, prepared.position_ids
                if run is not None:
                    prepared.tell(run)
            elif run is not None:
                _set_text_only(run, input_ids)
        elif images is not None:
            raise UserError(
                "images= goes with the input_ids of a whole prompt, not with inputs_embeds or a filled cache"
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_masks: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """New token ids `[B, new]` (the prompt is not repeated), or transformers' output object if asked for.

        Args:
            inputs: prompts `[B, T]` with -200 placeholders (also as `input_ids=`).
            images: see `split_images`; in reading order of the placeholders over the whole batch.
            image_sizes: original `(width, height)` per image.
            attention_mask: `[B, T]`, 0 = padding.
            image_masks: rarely needed, see `encode_visual_tokens`.
            **kwargs: transformers' generation arguments (sampling, beams, streamer, ...).

        Raises:
            UserError: placeholders and images do not match, or an argument that cannot work with embeddings as
                prompts or with pruning.
        """
        ids = inputs if inputs is not None else input_ids
        if inputs is not None and input_ids is not None:
            raise UserError("pass the prompt once: positionally or as input_ids=")
        self._refuse_unsupported(kwargs)
        if ids is None:
            if images is not None:
                raise UserError("images= needs the prompt's input_ids")
            return super().generate(attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        ids = ids[None] if ids.ndim == 1 else ids
        if attention_mask is not None:
            attention_mask = attention_mask.to(ids.device).reshape(ids.shape)
        prepared = self.prepare_multimodal_inputs(ids, images, image_sizes, attention_mask, image_masks=image_masks)
        run = self.pruning_run
        if run is not None:
            prepared.tell(run)
        # A prompt given as embeddings is not part of generate's output.
        return super().generate(  # type: ignore[misc]
            inputs_embeds=prepared.inputs_embeds, attention_mask=prepared.generation_mask(), **kwargs
        )

    def _refuse_unsupported(self, kwargs: dict[str, Any]) -> None:
        """Say no to what would fail far from its cause or give wrong answers."""
        if kwargs.get("pixel_values") is not None:
            raise UserError("pass images= (LLaVA's convention) instead of pixel_values=")
        if kwargs.get("assistant_model") is not None:
            raise UserError("assistant_model= is not supported: prompts reach the decoder as embeddings, without ids")
        if kwargs.get("position_ids") is not None:
            raise UserError("position_ids= is not supported: positions follow from the prompt and its attention_mask")

        def option(name: str) -> Any:
            config = kwargs.get("generation_config") or self.generation_config
            return kwargs[name] if name in kwargs else getattr(config, name, None)

        if option("prefill_chunk_size") is not None:
            raise UserError("prefill_chunk_size cannot be used: prompts reach the decoder as embeddings, in one piece")
        if self.pruning_run is None:
            return
        implementation = option("cache_implementation")
        if implementation not in DYNAMIC_CACHES:
            raise UserError(
                f"cache_implementation={implementation!r} cannot be used with pruning: "
                "layers keep different numbers of tokens, which needs the dynamic cache"
            )
        cache = kwargs.get("past_key_values")
        if cache is not None:
            if getattr(cache, "is_compileable", False):
                raise UserError(f"{type(cache).__name__} cannot be used with pruning: use DynamicCache")
            if cache.get_seq_length() > 0:
                raise UserError("pruning cannot continue a filled cache: pass the whole conversation as one prompt")


def _set_text_only(run: Any, input_ids: Tensor) -> None:
    # Without this the run would look for the visual tokens of the previous prompt.
    run.set_visual(VisualLayout.from_spans([[] for _ in range(len(input_ids))]))


__all__ = ["LlavaLlamaForCausalLM", "positions_from_mask", "split_images"]
