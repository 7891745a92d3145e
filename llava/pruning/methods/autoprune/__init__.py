"""AutoPrune: the method, its retention curve, and the mutual information that bends it."""

from llava.pruning.methods.autoprune.method import AutoPrune

__all__ = ["AutoPrune"]
