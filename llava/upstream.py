"""Modules of LLaVA's own package that are not here under their names: where their parts are, or what to use instead.

Scripts in the wild import `llava.model.language_model.llava_llama` and the like. Python asks the finder of this file
only for modules of `llava` that are no files: it makes those of `MOVED` on the spot, with names that lead to the parts
of this package, and refuses those of `ABSENT` in one line.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODEL = {"LlavaConfig": "llava.model.configuration", "LlavaLlamaForCausalLM": "llava.model.llava_llama"}

# Module -> name there -> module here, and the name here where it is another one.
MOVED: dict[str, dict[str, str]] = {
    "llava.model.language_model": {},
    "llava.model.language_model.llava_llama": _MODEL,
    "llava.model.language_model.llava_mistral": {"LlavaMistralForCausalLM": "llava.model.llava_mistral"},
    # What is an instance of LLaVA's mix-in there is an instance of the model's class here.
    "llava.model.llava_arch": {"LlavaMetaForCausalLM": "llava.model.llava_llama:LlavaLlamaForCausalLM"},
    "llava.model.multimodal_encoder": {},
    "llava.model.multimodal_encoder.builder": {"build_vision_tower": "llava.model.standalone"},
    "llava.model.multimodal_encoder.clip_encoder": {"CLIPVisionTower": "llava.model.standalone"},
    "llava.model.multimodal_projector": {},
    "llava.model.multimodal_projector.builder": {"build_vision_projector": "llava.model.standalone"},
    "llava.eval.m4c_evaluator": {
        "EvalAIAnswerProcessor": "llava.eval.tasks.m4c",
        "TextVQAAccuracyEvaluator": "llava.eval.tasks.m4c",
    },
}
_REPOSITORY = "https://github.com/haotian-liu/LLaVA"
_CHAT = "python -m llava.serve.cli chats in the terminal, llava.serve.gradio_app in the browser, without a server"
_TRAINING = f"train with {_REPOSITORY}, then load the checkpoint here, LoRA or projector alone included"
_GPT = f"reviews by GPT are made with {_REPOSITORY}; llava.eval.summarize_gpt_review reads them here"
# Module, or package with all below it -> what to do.
ABSENT: dict[str, str] = {
    "llava.train": _TRAINING,
    "llava.serve.controller": _CHAT,
    "llava.serve.model_worker": _CHAT,
    "llava.serve.sglang_worker": _CHAT,
    "llava.serve.register_worker": _CHAT,
    "llava.serve.test_message": _CHAT,
    "llava.serve.gradio_web_server": _CHAT,
    "llava.model.language_model.llava_mpt": "decoders are Llama and Mistral",
    "llava.model.apply_delta": f"apply the delta of a checkpoint before v1.1 with {_REPOSITORY}",
    "llava.model.make_delta": f"deltas are made with {_REPOSITORY}",
    "llava.model.consolidate": "load_pretrained_model reads shards as they are",
    "llava.model.utils": "load_pretrained_model reads configurations of all versions as they are",
    "llava.eval.eval_gpt_review": _GPT,
    "llava.eval.eval_gpt_review_bench": _GPT,
    "llava.eval.eval_gpt_review_visual": _GPT,
    "llava.eval.eval_science_qa_gpt4": _GPT,
    "llava.eval.eval_science_qa_gpt4_requery": _GPT,
    "llava.eval.qa_baseline_gpt35": _GPT,
    "llava.eval.generate_webpage_data_from_table": _GPT,
    "llava.eval.model_qa": "questions without an image are asked with llava.eval.model_vqa too",
}


class _Moved(Loader):
    """Makes a module whose names are looked up where they are now."""

    def exec_module(self, module: ModuleType) -> None:
        names = MOVED[module.__name__]

        def look_up(name: str) -> Any:
            if name in names:
                place, _, other = names[name].partition(":")
                return getattr(importlib.import_module(place), other or name)
            there = f" (there are: {', '.join(names)})" if names else ""
            raise AttributeError(f"{module.__name__} of this package has no {name!r}{there}")

        vars(module)["__getattr__"] = look_up
        vars(module)["__all__"] = list(names)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MOVED:
            package = any(other.startswith(f"{fullname}.") for other in MOVED)
            return ModuleSpec(fullname, _Moved(), is_package=package)
        for name, instead in ABSENT.items():
            if fullname == name or fullname.startswith(f"{name}."):
                message = f"{fullname} is LLaVA's and not part of autoprune-llava: {instead}"
                raise ModuleNotFoundError(message, name=fullname)
        return None


def install() -> None:
    """From now on Python asks here for modules that are no files."""
    if not any(type(finder).__qualname__ == _Finder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
