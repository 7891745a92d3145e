"""Visual token pruning inside a Llama-like decoder; the public API.

``with AutoPrune(target_tokens=64).attach(model) as run: model.generate(...)``, then ``run.traces``.
"""

from llava.pruning.base import BEFORE_DECODER, LayerView, OptionError, PruningMethod, Rows, Selection, UnsupportedError
from llava.pruning.information import mutual_information
from llava.pruning.layout import VisualLayout
from llava.pruning.methods.autoprune import AutoPrune
from llava.pruning.methods.dense import Dense
from llava.pruning.missed import missed_budgets
from llava.pruning.registry import get_method, list_methods
from llava.pruning.retention import retention_schedule
from llava.pruning.run import PruningRun
from llava.pruning.selection import dpc_knn_merge
from llava.pruning.trace import Trace

__all__ = [
    "BEFORE_DECODER",
    "AutoPrune",
    "Dense",
    "LayerView",
    "OptionError",
    "PruningMethod",
    "PruningRun",
    "Rows",
    "Selection",
    "Trace",
    "UnsupportedError",
    "VisualLayout",
    "dpc_knn_merge",
    "get_method",
    "list_methods",
    "missed_budgets",
    "mutual_information",
    "retention_schedule",
]
