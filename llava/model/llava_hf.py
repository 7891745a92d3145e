"""From a checkpoint in LLaVA's original layout to llava-hf's, which transformers' own classes load.

Weights go over shard by shard, with the precision they are stored in; nothing is computed. What LLaVA's code does
around the model (prompt template, padding of pictures, ids of a text behind a picture) becomes chat template, image
processor and tokenizer, so that transformers alone gives LLaVA's answers.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import parse_grid_pinpoints, tokenizer_image_token
from llava.model.configuration import LLAVA_FIELDS, PINPOINTS_WH, LlavaConfig, is_llava_hf_config
from llava.model.locate import read_checkpoint_json
from llava.model.names import llava_hf_name, translate_name
from llava.model.reading import Weights, look_up, read_checkpoint_weights
from llava.model.small_files import generation_tokens, load_image_processor, wordless_tokens
from llava.model.tokenizer import load_tokenizer
from llava.model.weights import check_weights
from llava.utils import UserError, describe_error

SHARD_BYTES = 1 << 30
"""Weights held in memory at a time, and the size of a file; a larger tensor has a file of its own."""
ROWS = 64
"""The vocabulary grows to a multiple of this, as in the published folders."""
VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")
DEFAULT_MODES = {"llama": "vicuna_v1", "mistral": "mistral_instruct"}
NEWLINE = "model.image_newline"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Kind:
    """What a version of LLaVA is called in transformers: model type, and the beginning of its classes' names."""

    model_type: str
    title: str

    @property
    def config_class(self) -> Any:
        return getattr(transformers, f"{self.title}Config")

    @property
    def model_class(self) -> Any:
        return getattr(transformers, f"{self.title}ForConditionalGeneration")


LLAVA, NEXT = Kind("llava", "Llava"), Kind("llava_next", "LlavaNext")


@dataclass(frozen=True)
class Exported:
    """What was written: transformers' class for it, its weight files, and the rows that the vocabulary has now."""

    model_class: str
    shards: int
    rows: int


def export(
    model_path: str,
    output: str,
    conv_mode: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    model_base: str | None = None,
) -> Exported:
    """Write a checkpoint in llava-hf's layout.

    Args:
        model_path: folder or hub name of LLaVA 1.5 or 1.6 in the original layout.
        output: folder to write; must be empty or not there.
        conv_mode: prompt template that becomes the chat template; default: that of the evaluation tools.
        shard_bytes: size of a weight file.
        model_base: base model of a LoRA or projector-only checkpoint, which is merged in the precision of the base.

    Raises:
        UserError: anything wrong with the checkpoint, or something in it that transformers' classes do not do.
    """
    # Everything that can be wrong is found before anything is written.
    folder = Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {output}: is there already; name an empty or a new folder")
    checkpoint = look_up(model_path, model_base, False)
    config, path = checkpoint.config, checkpoint.config_path
    if is_llava_hf_config(read_checkpoint_json(path)):
        raise UserError(f"{path}: is in llava-hf's layout already")
    kind = _kind_of(config, path)
    template = _conversation(conv_mode or DEFAULT_MODES[config.text_config.model_type])
    own_tokenizer = load_tokenizer(checkpoint.find("tokenizer.model", "tokenizer.json") or checkpoint.folder, config)
    if own_tokenizer is None:
        raise UserError(f"{checkpoint.folder}: has no tokenizer, and a llava-hf folder needs one")
    tokenizer, image_id = with_image_token(own_tokenizer, getattr(config, "tokenizer_model_max_length", None))
    rows = config.text_config.vocab_size
    if image_id >= rows:
        rows = -(-(image_id + 1) // ROWS) * ROWS
    chat = chat_template(template, _image_text(own_tokenizer, tokenizer, config))
    pictures = _image_processor(load_image_processor(checkpoint.folder, checkpoint.tower_folder, config), config, kind)
    new_config = _config(config, kind, image_id, rows)
    generation = generation_tokens(checkpoint.find("generation_config.json") or checkpoint.folder)
    weights = read_checkpoint_weights(checkpoint)
    if any(name.startswith("model.image_adapter.") for name in weights.tensors):
        raise UserError(f"{path}: the weights have an image adapter (Senna), which transformers' classes do not have")
    if kind is LLAVA:
        weights.tensors.pop(NEWLINE, None)  # some store one that they do not use, see the loader
    _check(weights, config, kind, checkpoint.folder)
    dtypes = Counter(tensor.dtype for name, tensor in weights.tensors.items() if "language_model" in name)
    new_config.dtype = dtypes.most_common(1)[0][0]
    plan = shard_plan({name: _grown_bytes(name, tensor, rows) for name, tensor in weights.tensors.items()}, shard_bytes)
    weights.tensors.clear()  # mapped anew, shard by shard

    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, plan, weights, rows)
    processor = getattr(transformers, f"{kind.title}Processor")(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=DEFAULT_IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLS
        chat_template=chat,
    )
    _write_processor(folder, processor)
    _write_generation(folder, config, new_config, tokenizer, generation)
    new_config.save_pretrained(folder)  # last: without it the folder is no checkpoint
    return Exported(new_config.architectures[0], len(plan), rows)


# --- configuration ------------------------------------------------------------------------------------------------


def _kind_of(config: LlavaConfig, path: Path) -> Kind:
    """The version; refuses what transformers' classes compute differently."""
    projector = getattr(config, "mm_projector_type", None)
    if projector != "mlp2x_gelu":
        raise UserError(f"{path}: mm_projector_type {projector}: transformers' LLaVA has mlp2x_gelu only")
    if getattr(config, "image_aspect_ratio", None) != "anyres":
        return LLAVA
    merge_type = getattr(config, "mm_patch_merge_type", None)
    if merge_type != "spatial_unpad":
        raise UserError(f"{path}: mm_patch_merge_type {merge_type}: transformers' LlavaNext has spatial_unpad only")
    return NEXT


def _config(config: LlavaConfig, kind: Kind, image_id: int, rows: int) -> Any:
    text = copy.deepcopy(config.text_config)
    text.vocab_size = rows
    fields: dict[str, Any] = {
        "text_config": text.to_dict(),
        "vision_config": config.vision_config.to_dict(),
        "image_token_index": image_id,
        "image_seq_length": config.image_seq_length,
        "projector_hidden_act": config.projector_hidden_act,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    # LLaVA's own fields stay: whoever reads the folder as LLaVA finds them again.
    own = {name: value for name, value in config.to_dict().items() if name.startswith(LLAVA_FIELDS)}
    own.setdefault("image_aspect_ratio", "square")  # where nothing is said, llava-hf folders are padded
    if kind is NEXT:
        pairs = parse_grid_pinpoints(own.pop("image_grid_pinpoints"))
        fields["image_grid_pinpoints"] = [[height, width] for width, height in pairs]
        fields[PINPOINTS_WH] = [list(pair) for pair in pairs]
    made = kind.config_class(**{**own, **fields})
    made.architectures = [kind.model_class.__name__]
    return made


def _write_generation(
    folder: Path, config: LlavaConfig, new_config: Any, tokenizer: Any, tokens: Mapping[str, Any] | None
) -> None:
    text = config.text_config
    ids = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= tokens or {}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.pad_token_id
    made = GenerationConfig(**ids)
    # Rows that are no words of LLaVA's may not win.
    made.suppress_tokens = wordless_tokens(new_config, tokenizer, ids["eos_token_id"])
    made.save_pretrained(folder)


# --- weights ------------------------------------------------------------------------------------------------------


def _check(weights: Weights, config: LlavaConfig, kind: Kind, folder: Path) -> None:
    """Demand that transformers' class finds every tensor in its shape, before the vocabulary grows."""
    before = _config(config, kind, 0, config.text_config.vocab_size)
    with torch.device("meta"):
        expected = {translate_name(name): tensor for name, tensor in kind.model_class(before).state_dict().items()}
    optional = (VOCABULARY[1],) if config.tie_word_embeddings else ()
    check_weights(
        weights.tensors, {name: t for name, t in expected.items() if name is not None}, folder, optional, weights.files
    )


def _grown_bytes(name: str, tensor: Tensor, rows: int) -> int:
    return tensor.nbytes if name not in VOCABULARY else tensor.nbytes // len(tensor) * rows


def shard_plan(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names in groups of at most `shard_bytes`; a tensor that is larger has a group of its own."""
    plan: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not plan or size > room:
            plan.append([])
            room = shard_bytes
        plan[-1].append(name)
        room -= size
    return plan


def _write_shards(folder: Path, plan: Sequence[Sequence[str]], weights: Weights, rows: int) -> None:
    total, files = 0, dict[str, str]()
    for number, names in enumerate(plan, start=1):
        file = f"model-{number:05d}-of-{len(plan):05d}.safetensors" if len(plan) > 1 else "model.safetensors"
        tensors = {llava_hf_name(name): tensor for name, tensor in _read_again(weights, names, rows)}
        (folder / file).touch()
        mode = (folder / file).stat().st_mode
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise UserError(f"{folder / file}: cannot be written ({describe_error(error)})") from None
        (folder / file).chmod(mode)  # safetensors makes files for the owner alone
        total += sum(tensor.nbytes for tensor in tensors.values())
        files |= dict.fromkeys(tensors, file)
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_again(weights: Weights, names: Sequence[str], rows: int) -> Iterator[tuple[str, Tensor]]:
    """These tensors, mapped for as long as they are used; new rows of the vocabulary are zeros."""
    for name, tensor in weights.read_again(set(names)):
        missing = rows - len(tensor) if name in VOCABULARY else 0
        yield (
            name,
            torch.cat((tensor, tensor.new_zeros(missing, tensor.shape[1]))) if missing else tensor.contiguous(),
        )


# --- tokenizer, pictures, prompts ------------------------------------------------------------------------------------


def with_image_token(own: Any, limit: int | None = None) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer with `<image>` behind all words, and its id. Otherwise the ids are those of `own`, whose encoder it
    has as it is: transformers' class for Llama would build another one. limit: tokens of a prompt at most.
    """
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(own.backend_tokenizer),
        model_max_length=limit or own.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # of batches that are generated from
        **special,
    )
    made.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return made, int(made.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN))


def _image_text(own: Any, tokenizer: Any, config: LlavaConfig) -> str:
    """What stands for a picture in a prompt, its line break included.

    LLaVA tokenizes the text behind a picture as a text of its own, which begins with a blank for some tokenizers. Where
    ours does not write it by itself, it has to be in the prompt.
    """
    around = (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN) if config.mm_use_im_start_end else ("", "")
    plain = f"{around[0]}{DEFAULT_IMAGE_TOKEN}{around[1]}\n"
    image_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    for glue in ("", " "):
        text = plain.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IMAGE_TOKEN + glue)
        if all(
            tokenizer(before + text * count + "What").input_ids
            == tokenizer_image_token(before + plain * count + "What", own, image_id)
            for before in ("", "USER: ")
            for count in (1, 2)
        ):
            return text
    raise UserError("the tokenizer gives the text behind a picture ids that no prompt for transformers has")


def _image_processor(own: Any, config: LlavaConfig, kind: Kind) -> Any:
    """transformers' processor with the pixels of `llava.mm_utils.process_images`."""
    numbers = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    fields = {name: value for name, value in own.to_dict().items() if name in (*numbers, *steps)}
    fields["do_convert_rgb"] = True
    if kind is NEXT:
        pairs = parse_grid_pinpoints(config.image_grid_pinpoints)
        fields["image_grid_pinpoints"] = [[height, width] for width, height in pairs]
    else:
        fields["do_pad"] = getattr(config, "image_aspect_ratio", None) == "pad"
    return getattr(transformers, f"{kind.title}ImageProcessorPil")(**fields)


def _conversation(name: str) -> Conversation:
    if name not in conv_templates:
        raise UserError(f"--conv-mode {name!r}: no such template; there are: {', '.join(conv_templates)}")
    made = conv_templates[name]
    if made.sep_style is SeparatorStyle.PLAIN or made.messages:
        raise UserError(f"--conv-mode {name}: has no roles or begins with an example, and makes no chat template")
    return made


_CONTENT = """\
{%- macro content_of(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ IMAGE }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = content_of(messages[0]) -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = SYSTEM -%}{%- set turns = messages -%}
{%- endif -%}
"""
_ROLES = """\
{{ system + HEAD }}
{%- for message in turns -%}
{{ (USER if message['role'] == 'user' else ASSISTANT) + COLON + content_of(message) }}
{{- AFTER_USER if message['role'] == 'user' else AFTER_ASSISTANT }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ASSISTANT + COLON_ALONE }}{%- endif -%}
"""
_TAGS = """\
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{ ('' if loop.first else BETWEEN) + '[INST] ' }}
{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '' }}
{{- content_of(message) + ' [/INST]' }}
{%- else -%}
{{ ' ' + content_of(message) + ' ' + AFTER_ASSISTANT }}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(conversation: Conversation, image: str) -> str:
    """The Jinja template that writes what `Conversation.get_prompt` writes; images stand in front of their message.

    Args:
        conversation: a template with two roles.
        image: what stands for an image.
    """
    sep, sep2, style = conversation.sep, conversation.sep2, conversation.sep_style
    words = {"IMAGE": image, "SYSTEM": conversation.system}
    if style is SeparatorStyle.LLAMA_2:
        text = _CONTENT + _TAGS
        words |= {"BETWEEN": sep, "AFTER_ASSISTANT": sep2 or ""}
    else:
        text = _CONTENT + _ROLES
        colon = "" if style is SeparatorStyle.MPT else ": "
        after = sep2 if style is SeparatorStyle.TWO and sep2 is not None else sep
        user, assistant = conversation.roles[:2]
        words |= {"HEAD": sep, "USER": user, "ASSISTANT": assistant, "COLON": colon, "COLON_ALONE": colon.rstrip()}
        words |= {"AFTER_USER": sep, "AFTER_ASSISTANT": after}
    defined = "".join(
        f"{{%- set {name} = {json.dumps(word, ensure_ascii=False)} -%}}\n" for name, word in words.items()
    )
    return (defined + text).rstrip("\n")


def _write_processor(folder: Path, processor: Any) -> None:
    processor.save_pretrained(folder)
    # Also where readers of older folders look for it.
    pictures = processor.image_processor.to_dict()
    pictures["image_processor_type"] = type(processor.image_processor).__name__.removesuffix("Pil")
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n", encoding="utf-8")
    # Every version of transformers knows this name; the encoder is that of tokenizer.json.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": type(processor).__name__}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
