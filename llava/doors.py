"""The sub-commands of `autoprune`: each is the tool of a module, which is imported when it is called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from llava import __version__
from llava.utils import UserError


@dataclass(frozen=True)
class Door:
    """A sub-command: the module whose `main` it is, and what it does."""

    module: str
    does: str

    @property
    def open(self) -> bool:
        """Whether the module is part of this version."""
        return importlib.util.find_spec(self.module) is not None


DOORS = {
    "demo": Door("llava.eval.demo", "dense and pruned on the small model that ships with the package: one table"),
    "eval": Door("llava.eval.benchmark", "a whole benchmark, from questions to score: BENCHMARK TOKENS"),
    "ask": Door("llava.eval.run_llava", "one question about one or more images"),
    "chat": Door("llava.serve.cli", "a conversation in the terminal"),
    "compare": Door("llava.eval.compare", "many methods and budgets on the same questions: one table, one plot"),
    "report": Door("llava.eval.report", "runs side by side in the browser: answers, survivors, curves; one HTML file"),
    "diff": Door("llava.eval.diff_answers", "which answers differ between two runs"),
    "web": Door("llava.serve.gradio_app", "a web demo: dense and pruned side by side (needs the extra serve)"),
    "methods": Door("llava.eval.methods", "the pruning methods, or the options of one"),
    "families": Door("llava.eval.families", "the families of models that can be pruned"),
    "check-data": Door("llava.eval.check_data", "what of a benchmark's data is missing or misplaced"),
    "export-hf": Door("llava.model.export_hf", "a LLaVA checkpoint in llava-hf's layout"),
}


def enter(argv: Sequence[str]) -> int:
    """Runs the tool that the first word names with the words behind it; returns its exit status."""
    name, rest = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"autoprune {__version__}")
    elif name not in DOORS or not DOORS[name].open:
        raise UserError(f"{name!r} is no sub-command; there are: {', '.join(_present())}")
    else:
        tool = importlib.import_module(DOORS[name].module)
        sys.argv[0] = f"autoprune {name}"  # what `--help` calls a tool that has no other name for itself
        return tool.main(rest) or 0
    return 0


def overview() -> str:
    """What `--help` prints."""
    lines = ["usage: autoprune COMMAND [options]      autoprune COMMAND --help      autoprune --version", ""]
    lines += [f"  {name:<11} {DOORS[name].does}" for name in _present()]
    return "\n".join(lines)


def _present() -> list[str]:
    return [name for name, door in DOORS.items() if door.open]
