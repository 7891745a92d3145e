"""`load_pretrained_model`: from a checkpoint folder to tokenizer, model, image processor and context length.

Puts together what `locate`, `checkpoint` and `weights` read; placing weights on devices, casting and
quantizing are left to transformers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, CLIPImageProcessorPil, CLIPVisionConfig, GenerationConfig, LlavaConfig

from llava.model.checkpoint import (
    is_llava_hf_config,
    llava_config,
    read_json,
    translate_name,
    translate_tower_name,
    vision_config_from_folder,
)
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.locate import locate, locate_vision_tower
from llava.model.tokenizer import load_tokenizer
from llava.model.weights import check_weights, read_weights, weight_files
from llava.utils import UserError

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LEN = 2048
TOWER_PREFIX = "model.vision_tower."
# Left in full precision under bitsandbytes, as LLaVA does: small, and sensitive to quantization.
UNQUANTIZED_MODULES = ["lm_head", "multi_modal_projector", "vision_tower"]
PASSED_ON = ("attn_implementation", "quantization_config", "max_memory", "offload_folder", "offload_buffers")
# Accepted for LLaVA's sake; loading is always lean.
NO_LONGER_NEEDED = ("low_cpu_mem_usage", "use_fast", "trust_remote_code", "use_cache")


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | torch.device | None = None,
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[Any, LlavaLlamaForCausalLM, Any, int]:
    """Load a LLaVA checkpoint.

    Args:
        model_path: folder or hub name; original LLaVA-1.5 layout or llava-hf layout.
        model_base: base model of LoRA or projector-only checkpoints; not supported yet.
        model_name: kept for LLaVA's callers; the checkpoint's config.json decides what it is.
        load_8bit: quantize with bitsandbytes.
        load_4bit: the same, with 4 bits.
        device_map: transformers' placement; ignored when `device` is given.
        device: put everything there ("cpu", "cuda:1", "mps").
        use_flash_attn: the same as `attn_implementation="flash_attention_2"`.
        **kwargs: `dtype` (or `torch_dtype`), `attn_implementation`, `quantization_config`, `max_memory`,
            `offload_folder`, `local_files_only`. Default precision: float16 on an accelerator, float32 on the CPU.

    Returns:
        `(tokenizer, model, image_processor, context_len)`; the tokenizer is None for a checkpoint without one.

    Raises:
        UserError: anything wrong with the folder, a file in it, or an option.
    """
    if model_base is not None:
        raise UserError(
            f"model_base {model_base!r}: LoRA and projector-only checkpoints are not supported yet; "
            "merge them into a full checkpoint first"
        )
    local_files_only = bool(kwargs.pop("local_files_only", False))
    options = _placement_options(device_map, device, kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
    options |= _quantization_options(load_8bit, load_4bit, options["dtype"])
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    for name in NO_LONGER_NEEDED:
        kwargs.pop(name, None)
    if unknown := sorted(set(kwargs) - set(PASSED_ON)):
        valid = ", ".join(("dtype", "torch_dtype", "local_files_only", *PASSED_ON))
        raise UserError(f"load_pretrained_model: unknown option(s) {', '.join(unknown)}; valid ones: {valid}")
    options |= {name: value for name, value in kwargs.items() if value is not None}

    folder = locate(str(model_path), "checkpoint", local_files_only=local_files_only)
    config, weights, tower_folder = _read_checkpoint(folder, local_files_only)
    tokenizer = load_tokenizer(folder, config)
    image_processor = load_image_processor(folder, tower_folder, config)
    model = _build_model(folder, config, weights, options)
    model.image_processor = image_processor
    _set_generation_config(model, folder)
    return tokenizer, model, image_processor, int(getattr(config, "max_sequence_length", None) or DEFAULT_CONTEXT_LEN)


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


# --- files --------------------------------------------------------------------------------------------------


def _read_checkpoint(folder: Path, local_files_only: bool) -> tuple[LlavaConfig, dict[str, torch.Tensor], Path | None]:
    """Configuration, translated weights (tower included) and the tower's folder, if it has one."""
    path = folder / "config.json"
    if not path.is_file():
        for name in ("adapter_config.json", "non_lora_trainables.bin", "mm_projector.bin"):
            if (folder / name).is_file():
                raise UserError(
                    f"{folder}: has {name} but no config.json: LoRA and projector-only checkpoints are not supported "
                    "yet; merge them into a full checkpoint first"
                )
    raw = read_json(path)
    if is_llava_hf_config(raw):
        return llava_config(raw, path, None), read_weights(weight_files(folder), translate_name), None
    tower_name = raw.get("mm_vision_tower") or raw.get("vision_tower")
    # Say what is wrong with the decoder's half first: it needs no download of a tower.
    llava_config(raw, path, CLIPVisionConfig())
    if not isinstance(tower_name, str) or not tower_name:
        raise UserError(f"{path}: missing field mm_vision_tower (folder or hub name of the CLIP tower)")
    if raw.get("mm_patch_merge_type", "flat") not in ("flat", "spatial"):
        logger.warning(
            "%s: mm_patch_merge_type %r: tiles are joined as 'spatial', without unpadding and newline tokens, as the "
            "published AutoPrune code does",
            path,
            raw["mm_patch_merge_type"],
        )
    weights = read_weights(weight_files(folder), translate_name)
    inside = any(name.startswith(TOWER_PREFIX) for name in weights)
    tower_folder = locate_vision_tower(tower_name, folder, not inside, local_files_only)
    if not inside:
        weights |= read_weights(weight_files(tower_folder), translate_tower_name)
    return llava_config(raw, path, vision_config_from_folder(tower_folder)), weights, tower_folder


def load_image_processor(folder: Path, tower_folder: Path | None, config: LlavaConfig) -> CLIPImageProcessorPil:
    """The tower's CLIP preprocessing on the PIL backend, whose pixels are the ones LLaVA was trained and
    measured with.
    """
    side = config.vision_config.image_size
    for place in (tower_folder, folder):
        path = None if place is None else place / "preprocessor_config.json"
        if path is None or not path.is_file():
            continue
        raw = read_json(path)
        try:
            processor = CLIPImageProcessorPil.from_dict(raw)
            crop = int(processor.crop_size["height"])
        except Exception as error:
            raise UserError(f"{path}: not a usable image processor ({error})") from None
        if crop != side:
            raise UserError(f"{path}: crop_size is {crop} pixels but the vision tower takes {side}")
        return processor
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


# --- model --------------------------------------------------------------------------------------------------


def _build_model(
    folder: Path, config: LlavaConfig, weights: dict[str, torch.Tensor], options: dict[str, Any]
) -> LlavaLlamaForCausalLM:
    with torch.device("meta"):
        expected = LlavaLlamaForCausalLM(config).state_dict()
    check_weights(weights, expected, folder, ("lm_head.weight",) if config.tie_word_embeddings else ())
    try:
        model = LlavaLlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **options)
    except (ImportError, ValueError) as error:
        # Packages or options that do not fit this machine (flash attention, quantization, device maps).
        raise UserError(f"{folder}: cannot be loaded this way: {' '.join(str(error).split())}") from None
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def _set_generation_config(model: LlavaLlamaForCausalLM, folder: Path) -> None:
    path = folder / "generation_config.json"
    if path.is_file():
        raw = read_json(path)
        # Sampling settings in the file (LLaVA-1.5: temperature 0.9, top_p 0.6) would silently apply
        # wherever a caller leaves one out; only what belongs to the checkpoint is taken.
        tokens = {name: raw[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in raw}
        model.generation_config = GenerationConfig(**tokens)
    text = model.config.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, name, None) is None:
            setattr(model.generation_config, name, getattr(text, name, None))
    if model.generation_config.pad_token_id is None:
        eos = model.generation_config.eos_token_id
        model.generation_config.pad_token_id = eos[0] if isinstance(eos, list) else eos
