"""`load_pretrained_model`: from a checkpoint folder to tokenizer, model, image processor and context length.

Puts together what `locate`, `checkpoint` and `weights` read; placing weights on devices, casting and
quantizing are left to transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BitsAndBytesConfig, CLIPImageProcessorPil, GenerationConfig

from llava.model.adapters import apply_adapter, base_named_by, is_adapter
from llava.model.checkpoint import (
    check_config,
    find_tower,
    is_llava_hf_config,
    llava_config,
    read_json,
    tower_config,
    tower_name,
    translate_name,
    translate_tower_name,
)
from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_mistral import LlavaMistralForCausalLM
from llava.model.locate import locate
from llava.model.tokenizer import load_tokenizer
from llava.model.weights import check_weights, read_weights, weight_files
from llava.utils import UserError

DEFAULT_CONTEXT_LEN = 2048
TOWER_PREFIX = "model.vision_tower."
NEWLINE = "model.image_newline"
# Left in full precision under bitsandbytes, as LLaVA does: small, and sensitive to quantization.
UNQUANTIZED_MODULES = ["lm_head", "multi_modal_projector", "vision_tower"]
PASSED_ON = ("attn_implementation", "quantization_config", "max_memory", "offload_folder", "offload_buffers")
# Accepted for the sake of LLaVA's callers; loading is always lean, and every model here is multimodal.
NO_LONGER_NEEDED = ("low_cpu_mem_usage", "use_fast", "trust_remote_code", "use_cache", "multimodal")


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint say, before a model is built.

    Attributes:
        folder: the checkpoint.
        base: the folder of its base model, for LoRA and projector-only checkpoints.
        config: translated configuration.
        weights: translated names, tensors on the CPU, mapped from disk where they can be.
        files: where the decoder's weights came from.
        tower_folder: the vision tower's folder, if it has one.
    """

    folder: Path
    base: Path | None
    config: LlavaConfig
    weights: dict[str, torch.Tensor]
    files: list[Path]
    tower_folder: Path | None

    def find(self, *names: str) -> Path | None:
        """The folder, of the checkpoint and its base, that has one of these files; LLaVA takes the base's first."""
        for folder in (self.base, self.folder):
            if folder is not None and any((folder / name).is_file() for name in names):
                return folder
        return None


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

    folder = locate(str(model_path), "checkpoint", local_files_only=local_files_only)
    base = None
    if model_base:
        base = locate(str(model_base), "base model", local_files_only=local_files_only)
    # Converted while reading where the result stays on the CPU; on the way to another device the device does it.
    on_cpu = _only_cpu(options["device_map"]) and "quantization_config" not in options
    checkpoint = _read_checkpoint(folder, base, options["dtype"], on_cpu, local_files_only)
    config = checkpoint.config
    tokenizer = load_tokenizer(checkpoint.find("tokenizer.model", "tokenizer.json") or folder, config)
    image_processor = load_image_processor(base or folder, checkpoint.tower_folder, config)
    model = _build_model(checkpoint, options)
    model.image_processor = image_processor
    if not getattr(config, "anyres_resolution_rule", None):
        # How LLaVA itself chooses among image_grid_pinpoints, or the published AutoPrune.
        model.config.anyres_resolution_rule = "fill" if mm_patch_merge_type == "spatial" else "effective"
    if mm_patch_merge_type is not None:
        model.set_patch_merge_type(mm_patch_merge_type)
    _set_generation_config(model, checkpoint.find("generation_config.json") or folder)
    model.generation_config.suppress_tokens = _wordless_tokens(config, tokenizer, model.generation_config.eos_token_id)
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


def _read_checkpoint(
    folder: Path, base: Path | None, dtype: torch.dtype, convert: bool, local_files_only: bool
) -> Checkpoint:
    """Configuration and translated weights, vision tower included; adapters are merged into their base."""
    into = dtype if convert else None
    if base is None and is_adapter(folder) and not _has_weights(folder):
        named = base_named_by(folder)
        raise UserError(
            f"{folder}: holds LoRA matrices or a projector only: pass --model-base with the model it was trained on"
            + (f" ({named})" if named else "")
        )
    if base is not None and not is_adapter(folder):
        raise UserError(
            f"{folder}: has neither LoRA matrices (adapter_config.json) nor mm_projector.bin to put on a base model; "
            "leave --model-base out if this is a whole checkpoint"
        )
    # LLaVA's adapters carry the whole configuration; those that peft alone wrote go by their base's.
    path = (base if base is not None and not (folder / "config.json").is_file() else folder) / "config.json"
    raw = read_json(path)
    # What is wrong with the decoder's half comes first: finding it out needs no download of a tower.
    check_config(raw, path)
    files = weight_files(base or folder)
    weights = read_weights(files, translate_name, into)
    if base is not None:
        apply_adapter(weights, folder, dtype)
    if is_llava_hf_config(raw):
        config, tower_folder = llava_config(raw, path, None), None
    else:
        inside = any(name.startswith(TOWER_PREFIX) for name in weights)
        name = tower_name(raw, path)
        tower_folder = find_tower(name, path, not inside, local_files_only)
        if tower_folder is not None and not inside:
            weights |= read_weights(weight_files(tower_folder), translate_tower_name, into)
        config = llava_config(raw, path, tower_config(name, tower_folder))
    return Checkpoint(folder, base, config, weights, files, tower_folder)


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


def load_image_processor(folder: Path, tower_folder: Path | None, config: LlavaConfig) -> CLIPImageProcessorPil:
    """The tower's CLIP preprocessing on the PIL backend, whose pixels are the ones LLaVA was trained and
    measured with.
    """
    side = config.vision_config.image_size
    places = [place for place in (tower_folder, folder) if place is not None]
    for path in [place / name for place in places for name in ("preprocessor_config.json", "processor_config.json")]:
        if not path.is_file():
            continue
        raw = read_json(path)
        if path.name == "processor_config.json":
            # Newer llava-hf folders keep the image processor's settings inside the processor's.
            raw = raw.get("image_processor")
            if not isinstance(raw, dict):
                continue
        try:
            processor = CLIPImageProcessorPil.from_dict(raw)
            crop = int(processor.crop_size["height"])
            # Most of what a setting can be wrong about shows only when a picture goes through.
            red, green, blue = (int(255 * mean) for mean in processor.image_mean)
            processor(Image.new("RGB", (crop, crop), (red, green, blue)), return_tensors="pt")
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a usable image processor ({reason}); copy or download it again") from None
        if crop != side:
            raise UserError(f"{path}: crop_size is {crop} pixels but the vision tower takes {side}")
        return processor
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


# --- model --------------------------------------------------------------------------------------------------


def _build_model(checkpoint: Checkpoint, options: dict[str, Any]) -> LlavaLlamaForCausalLM:
    config, folder = checkpoint.config, checkpoint.folder
    model_class = LlavaMistralForCausalLM if config.text_config.model_type == "mistral" else LlavaLlamaForCausalLM
    try:
        with torch.device("meta"):
            expected = model_class(config).state_dict()
    except Exception as error:
        # Sizes that make no model; what torch and transformers raise for them depends on the field.
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'}: not a usable configuration ({reason})") from None
    if NEWLINE not in expected:
        # It belongs to an arrangement of tiles that this checkpoint does not use; some store one nevertheless.
        checkpoint.weights.pop(NEWLINE, None)
    optional = ("lm_head.weight",) if config.tie_word_embeddings else ()
    check_weights(checkpoint.weights, expected, folder, optional, checkpoint.files)
    try:
        model = model_class.from_pretrained(None, config=config, state_dict=checkpoint.weights, **options)
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


def _wordless_tokens(config: LlavaConfig, tokenizer: Any | None, eos: int | list[int] | None) -> list[int] | None:
    """Ids that the llava-hf layout appends to the vocabulary for `<image>`, padding and alignment.

    Their rows are no part of LLaVA. Ruling them out makes both layouts choose among the same words.
    """
    first, size = config.image_token_index, config.text_config.vocab_size
    if not 0 <= first < size:
        return None
    words = set(eos if isinstance(eos, list) else [eos])
    if tokenizer is not None:
        words |= set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) - {first}
    return [token for token in range(first, size) if token not in words]
