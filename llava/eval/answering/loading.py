"""The model that the flags name, behind the surface that an answerer uses."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llava.eval.common.arguments import merge_type_from_args
from llava.utils import UserError


def load_model(args: argparse.Namespace) -> tuple[Any, Any, Any, int]:
    """LLaVA's 4-tuple for the model flags."""
    import torch
    from transformers.utils import logging as transformers_logging

    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    if args.device is not None:
        try:
            torch.device(args.device)
        except RuntimeError:
            raise UserError(f"--device: {args.device!r} is not a device") from None
    kwargs: dict[str, Any] = {}
    if args.dtype != "auto":
        kwargs["torch_dtype"] = getattr(torch, args.dtype)
    kwargs |= {name: True for name in ("load_8bit", "load_4bit") if getattr(args, name, False)}
    if args.attn_implementation is not None:
        kwargs["attn_implementation"] = args.attn_implementation
    if (merge_type := merge_type_from_args(args)) is not None:
        kwargs["mm_patch_merge_type"] = merge_type
    name = get_model_name_from_path(args.model_path)
    if not sys.stderr.isatty():
        # A log file needs no bar per weight; on a terminal it shows that a large checkpoint is being read.
        transformers_logging.disable_progress_bar()
    return load_pretrained_model(args.model_path, args.model_base, name, device=args.device, **kwargs)


def load_adapter(args: argparse.Namespace, conv_mode: str = "vicuna_v1", masks_padding: bool = True) -> Any:
    """The model of the flags behind the surface that an answerer uses; the one place that chooses an adapter."""
    from llava.eval.answering.adapter import LlavaAdapter
    from llava.eval.answering.family import FamilyAdapter, family_folder, load_family

    if (family := family_folder(args.model_path)) is not None:
        return FamilyAdapter(*load_family(args), family)
    tokenizer, model, image_processor, _ = load_model(args)
    return LlavaAdapter(tokenizer, model, image_processor, conv_mode, masks_padding)
