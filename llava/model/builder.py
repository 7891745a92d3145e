"""`load_pretrained_model`: from a checkpoint folder to tokenizer, model, image processor and context length.

Everything that can be wrong is looked at before the weights are touched: configuration, vision tower, tokenizer, image
processor, names and shapes of all tensors, memory. Placing weights on devices and quantizing are left to transformers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig

from llava.model.assemble import MERGE_TYPES
from llava.model.configuration import LlavaConfig
from llava.model.fields import check_depths
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_mistral import LlavaMistralForCausalLM
from llava.model.machine import check_memory, slow_half_precision
from llava.model.projector import adapter_widths, projector_depth
from llava.model.reading import Checkpoint, Weights, look_up, read_checkpoint_weights
from llava.model.small_files import generation_tokens, load_image_processor, wordless_tokens
from llava.model.tokenizer import load_tokenizer
from llava.model.weights import check_weights
from llava.utils import UserError, describe_error

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LEN = 2048
NEWLINE = "model.image_newline"
# Left in full precision under bitsandbytes, as LLaVA does: small, and sensitive to quantization.
UNQUANTIZED_MODULES = ["lm_head", "multi_modal_projector", "image_adapter", "vision_tower"]
PASSED_ON = ("attn_implementation", "quantization_config", "max_memory", "offload_folder", "offload_buffers")
# Accepted for the sake of LLaVA's callers; loading is always lean, and every model here is multimodal.
NO_LONGER_NEEDED = ("low_cpu_mem_usage", "use_fast", "trust_remote_code", "use_cache", "multimodal")


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | torch.device | None = None,
    use_flash_attn: bool = False,
    mm_patch_merge_type: str | None = None,
    **kwargs: Any,
) -> tuple[Any, LlavaLlamaForCausalLM, Any, int]:
    """Load a LLaVA checkpoint.

    Args:
        model_path: folder or hub name of LLaVA 1.5 or 1.6, in the original layout or llava-hf's.
        model_base: folder or hub name of the base model, where `model_path` holds only LoRA matrices
            (`adapter_model.*`, `non_lora_trainables.bin`) or a projector (`mm_projector.bin`); they are merged.
        model_name: kept for LLaVA's callers; the checkpoint's config.json decides what it is.
        load_8bit: quantize with bitsandbytes.
        load_4bit: the same, with 4 bits.
        device_map: transformers' placement; ignored when `device` is given.
        device: put everything there ("cpu", "cuda:1", "mps").
        use_flash_attn: the same as `attn_implementation="flash_attention_2"`.
        mm_patch_merge_type: how the crops of LLaVA-1.6 ("anyres") are put together: "spatial_unpad" (LLaVA's own),
            "spatial" (the published AutoPrune's, with its choice of the resolution) or "flat"; default: the
            checkpoint's own, and "spatial" while a pruning method is attached.
        **kwargs: `dtype` (or `torch_dtype`), `attn_implementation`, `quantization_config`, `max_memory`,
            `offload_folder`, `local_files_only`. Default precision: float16 on an accelerator, float32 on the CPU.

    Returns:
        `(tokenizer, model, image_processor, context_len)`; the tokenizer is None for a checkpoint without one.

    Raises:
        UserError: anything wrong with the folder, a file in it, or an option.
    """
    local_files_only = bool(kwargs.pop("local_files_only", False))
    options = _placement_options(device_map, device, kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
    options |= _quantization_options(load_8bit, load_4bit, options["dtype"])
    # lmms-eval passes its own spelling, also to say no.
    if kwargs.pop("use_flash_attention_2", False) or use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    for name in NO_LONGER_NEEDED:
        kwargs.pop(name, None)
    if unknown := sorted(set(kwargs) - set(PASSED_ON)):
        valid = ", ".join(("dtype", "torch_dtype", "local_files_only", *PASSED_ON))
        raise UserError(f"load_pretrained_model: unknown option(s) {', '.join(unknown)}; valid ones: {valid}")
    options |= {name: value for name, value in kwargs.items() if value is not None}

    if mm_patch_merge_type is not None and mm_patch_merge_type not in MERGE_TYPES:
        raise UserError(f"mm_patch_merge_type {mm_patch_merge_type!r}: expected one of {', '.join(MERGE_TYPES)}")
    if _only_cpu(options["device_map"]) and (notice := slow_half_precision(options["dtype"])):
        logger.warning("%s", notice)

    checkpoint = look_up(str(model_path), str(model_base) if model_base else None, local_files_only)
    config, folder = checkpoint.config, checkpoint.folder
    _check_merge_type(config, mm_patch_merge_type, folder)
    tokenizer = load_tokenizer(checkpoint.find("tokenizer.model", "tokenizer.json") or folder, config)
    image_processor = load_image_processor(checkpoint.base or folder, checkpoint.tower_folder, config)
    generation = generation_tokens(checkpoint.find("generation_config.json") or folder)
    model = _build_model(checkpoint, read_checkpoint_weights(checkpoint), options)
    model.image_processor = image_processor
    if not getattr(config, "anyres_resolution_rule", None):
        # How LLaVA itself chooses among image_grid_pinpoints, or the published AutoPrune.
        model.config.anyres_resolution_rule = "fill" if mm_patch_merge_type == "spatial" else "effective"
    if mm_patch_merge_type is not None:
        model.set_patch_merge_type(mm_patch_merge_type)
    _set_generation_config(model, generation)
    model.generation_config.suppress_tokens = wordless_tokens(config, tokenizer, model.generation_config.eos_token_id)
    return tokenizer, model, image_processor, int(getattr(config, "max_sequence_length", None) or DEFAULT_CONTEXT_LEN)


def _check_merge_type(config: LlavaConfig, asked: str | None, folder: Path) -> None:
    own = getattr(config, "mm_patch_merge_type", None) or "flat"
    if asked is None and own not in MERGE_TYPES:
        raise UserError(
            f"{folder / 'config.json'}: mm_patch_merge_type {own!r} is not supported, only {', '.join(MERGE_TYPES)}"
        )


# --- options ------------------------------------------------------------------------------------------------


def _placement_options(device_map: Any, device: Any, dtype: Any, torch_dtype: Any) -> dict[str, Any]:
    if device is not None:
        try:
            device = torch.device(device)
        except RuntimeError:
            raise UserError(f"device {device!r} is not one that torch knows (cpu, cuda, cuda:0, mps, ...)") from None
        available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if not available.get(device.type, lambda: True)():
            raise UserError(f"device {str(device)!r} is not available here; use --device cpu")
        device_map = {"": device}
    elif device_map == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available():
        # Nothing to distribute: without hooks around every module, CPU runs are faster and errors are readable.
        device_map = {"": torch.device("cpu")}
    dtype = dtype if dtype is not None else torch_dtype
    if dtype is None:
        # LLaVA runs in half precision. CPUs have no fast fp16 arithmetic, and its rounding changes answers for nothing.
        dtype = torch.float32 if _only_cpu(device_map) else torch.float16
    if isinstance(dtype, str):
        names = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
        found = getattr(torch, names.get(dtype, dtype), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UserError(f"dtype {dtype!r} is not supported; use float16, bfloat16 or float32")
        dtype = found
    return {"device_map": device_map, "dtype": dtype}


def _only_cpu(device_map: Any) -> bool:
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    # None is transformers' "stay on the CPU"; "auto" and its like reach here only where there is an accelerator.
    return all(place is None or str(place) == "cpu" for place in places)


def _quantization_options(load_8bit: bool, load_4bit: bool, dtype: torch.dtype) -> dict[str, Any]:
    if not (load_8bit or load_4bit):
        return {}
    if load_8bit and load_4bit:
        raise UserError("choose one of 8-bit and 4-bit loading")
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UserError(
            "8-bit and 4-bit loading need the package bitsandbytes and a device it supports: pip install bitsandbytes"
        )
    if load_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED_MODULES)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=UNQUANTIZED_MODULES,
        )
    }


# --- model --------------------------------------------------------------------------------------------------


def _build_model(checkpoint: Checkpoint, weights: Weights, options: dict[str, Any]) -> LlavaLlamaForCausalLM:
    config, folder, tensors = checkpoint.config, checkpoint.folder, weights.tensors
    model_class = LlavaMistralForCausalLM if config.text_config.model_type == "mistral" else LlavaLlamaForCausalLM
    depth = projector_depth(getattr(config, "mm_projector_type", None) or "linear")
    layers = (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers, depth or 0)
    check_depths(tensors, *layers, checkpoint.config_path)
    _find_adapter(tensors, config, folder)
    try:
        with torch.device("meta"):
            expected = model_class(config).state_dict()
    except Exception as error:
        # Sizes that make no model; what torch and transformers raise for them depends on the field.
        reason = describe_error(error)[:300]
        raise UserError(f"{checkpoint.config_path}: not a usable configuration ({reason})") from None
    if NEWLINE not in expected:
        # It belongs to an arrangement of tiles that this checkpoint does not use; some store one nevertheless.
        tensors.pop(NEWLINE, None)
    optional = ("lm_head.weight",) if config.tie_word_embeddings else ()
    check_weights(tensors, expected, folder, optional, weights.files)
    _check_memory(weights, options)
    # Converted while reading where the result stays on the CPU; on the way to another device the device does it.
    on_cpu = _only_cpu(options["device_map"]) and "quantization_config" not in options
    weights.prepare(options["dtype"], convert=on_cpu)
    try:
        model = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
    except (ImportError, ValueError) as error:
        # Packages or options that do not fit this machine (flash attention, quantization, device maps).
        raise UserError(f"{folder}: cannot be loaded this way: {describe_error(error)}") from None
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def _find_adapter(tensors: dict[str, Any], config: LlavaConfig, folder: Path) -> None:
    """Write into the configuration what only the weights say: Senna's files do not name the adapter."""
    try:
        widths = adapter_widths(tensors)
    except ValueError as error:
        raise UserError(f"{folder}: the weights of img_adapter cannot be used: {error}") from None
    if widths is None:
        return  # if config.json names one that was saved from here, the comparison of all names tells what is missing
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    if widths[0] != patches:
        raise UserError(
            f"{folder}: img_adapter takes {widths[0]} tokens of a picture, the vision tower gives {patches}"
        )
    if getattr(config, "image_aspect_ratio", None) == "anyres":
        raise UserError(
            f"{folder}: img_adapter takes a picture in one piece, image_aspect_ratio anyres cuts it into tiles"
        )
    config.mm_image_adapter, config.image_seq_length = widths, widths[-1]


def _check_memory(weights: Weights, options: dict[str, Any]) -> None:
    device_map = options["device_map"]
    places = set(device_map.values()) if isinstance(device_map, dict) else {"cpu" if device_map is None else device_map}
    if len(places) != 1 or "quantization_config" in options:
        return  # transformers distributes it, over the disk where need be
    try:
        device = torch.device(places.pop())
    except (RuntimeError, TypeError):  # "auto", "disk"
        return
    needed, held = weights.bytes_in(options["dtype"])
    if notice := check_memory(needed, held, device, options["dtype"]):
        logger.warning("%s", notice)


def _set_generation_config(model: LlavaLlamaForCausalLM, tokens: dict[str, Any] | None) -> None:
    if tokens is not None:
        model.generation_config = GenerationConfig(**tokens)
    text = model.config.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, name, None) is None:
            setattr(model.generation_config, name, getattr(text, name, None))
    if model.generation_config.pad_token_id is None:
        eos = model.generation_config.eos_token_id
        model.generation_config.pad_token_id = eos[0] if isinstance(eos, list) else eos
