"""`LlavaConfig`: transformers' configuration of LLaVA, which also reads LLaVA's own flat config.json.

Importing this module makes `AutoConfig` read the original checkpoints too. Left alone, transformers takes their
`model_type: llava` for its own class and returns the defaults of the 7B model, whatever the file says. The translation
itself is in `llava.model.checkpoint`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig


class LlavaConfig(transformers.LlavaConfig):
    """Transformers' `LlavaConfig` (`text_config`, `vision_config`, ...) with LLaVA's own fields beside it
    (`mm_vision_tower`, `image_aspect_ratio`, `mm_use_im_start_end`, ...).

    `from_pretrained` and `AutoConfig.from_pretrained` accept the original layout and llava-hf's.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The configuration of a checkpoint, as `load_pretrained_model` would use it.

        Raises:
            UserError: the folder has no usable config.json, or the vision tower that it names cannot be found.
        """
        from llava.model.checkpoint import read_json

        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir():
            # A hub name or a file: transformers knows revisions, tokens and caches.
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls._translated(read_json(folder / "config.json"), folder, kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a config.json's content. Flat ones are translated; llava-hf's stay as they are, because
        `AutoConfig` comes here for every user of transformers' LLaVA.

        Raises:
            UserError: see `from_pretrained`.
        """
        if "text_config" in config_dict or "hidden_size" not in config_dict:
            return super().from_dict(config_dict, **kwargs)
        # AutoConfig tells where the file lies: a relative vision tower is looked for there.
        place = str(kwargs.pop("name_or_path", None) or ".")
        folder = Path(place if os.path.isdir(place) else os.path.dirname(place))
        kwargs.pop("_from_auto", None)
        return cls._translated(config_dict, folder, kwargs)

    @classmethod
    def _translated(cls, raw: dict[str, Any], folder: Path, kwargs: dict[str, Any]) -> Any:
        from llava.model.checkpoint import read_config

        config = read_config(raw, folder / "config.json", bool(kwargs.pop("local_files_only", False)))
        # Transformers' protocol: keywords that are fields replace them, the others may be handed back.
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        for name in [name for name in kwargs if hasattr(config, name)]:
            setattr(config, name, kwargs.pop(name))
        return (config, kwargs) if wants_unused else config


class _LlavaLlamaConfig(LlavaConfig):
    """Model type of checkpoints trained by newer LLaVA code; read as `LlavaConfig`."""

    model_type = "llava_llama"


class _LlavaMistralConfig(LlavaConfig):
    """Model type of LLaVA on Mistral; read as `LlavaConfig`."""

    model_type = "llava_mistral"


for _config in (LlavaConfig, _LlavaLlamaConfig, _LlavaMistralConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
