"""lmms-eval's model `pruned`: any of its models that has a family here, under any method.

    lmms-eval eval --model pruned --tasks pope \\
        --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=autoprune,target_tokens=64

lmms-eval finds it by the entry point `lmms_eval.models`; nothing of it is changed.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    place = "llava.integrations.lmms_eval.model"
    return ModelManifest("pruned", simple_class_path=f"{place}.Pruned", chat_class_path=f"{place}.PrunedChat")
