"""Visual token pruning inside a Llama-like decoder; the public API.

``with AutoPrune(target_tokens=64).attach(model) as run: model.generate(...)``, then ``run.traces``.
"""

from llava.pruning.engine.graphs import PrefillGraphs
from llava.pruning.engine.layout import VisualLayout
from llava.pruning.engine.notices import missed_budgets
from llava.pruning.engine.run import PruningRun
from llava.pruning.engine.trace import Trace
from llava.pruning.engine.view import LayerView
from llava.pruning.method import DecoderMethod, PruningMethod, TowerMerger, VisionReducer
from llava.pruning.methods.autoprune.curve import add_curve, retention_schedule
from llava.pruning.methods.autoprune.information import mutual_information
from llava.pruning.methods.autoprune.method import AutoPrune
from llava.pruning.methods.dense import Dense
from llava.pruning.registry import build_method, get_method, list_methods
from llava.pruning.selection import dpc_knn_merge
from llava.pruning.types import BEFORE_DECODER, LayerFact, OptionError, Rows, Selection, UnsupportedError

__all__ = [
    "BEFORE_DECODER",
    "AutoPrune",
    "DecoderMethod",
    "Dense",
    "LayerFact",
    "LayerView",
    "OptionError",
    "PrefillGraphs",
    "PruningMethod",
    "PruningRun",
    "Rows",
    "Selection",
    "TowerMerger",
    "Trace",
    "UnsupportedError",
    "VisionReducer",
    "VisualLayout",
    "add_curve",
    "build_method",
    "dpc_knn_merge",
    "get_method",
    "list_methods",
    "missed_budgets",
    "mutual_information",
    "retention_schedule",
]
