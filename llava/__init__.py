"""LLaVA's public Python surface, with the visual-token pruning engine in `llava.pruning`.

Importing the package is cheap: nothing heavy (torch, transformers) is loaded until a name is asked for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.model.llava_llama import LlavaLlamaForCausalLM

__version__ = "0.1.0"
__all__ = ["LlavaLlamaForCausalLM", "__version__"]

from llava import neighbors, upstream  # noqa: E402

neighbors.warn_of_neighbors()
upstream.install()

if sys.argv[:1] == ["-m"]:  # only while Python looks for the module of `python -m llava...`
    from llava.launch import explain_missing_packages

    explain_missing_packages()


def __getattr__(name: str):
    # `from llava import LlavaLlamaForCausalLM` is LLaVA's own spelling; loading it lazily keeps `import
    # llava` fast.
    if name == "LlavaLlamaForCausalLM":
        from llava.model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module 'llava' has no attribute {name!r}")
