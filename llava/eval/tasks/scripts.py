"""The shell scripts of the benchmarks, called with flags instead of environment variables."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.eval.common.arguments import Parser
from llava.eval.tasks.registry import TASKS, get_task
from llava.places import CHECKOUT, DATA, MODELS, RESULTS, scripts_folder
from llava.tiny import BENCHMARKS, CHECKPOINT
from llava.utils import UserError

VERSIONS = ("v1_5", "v1_6")
_VARIABLES = {  # flag -> environment variable of scripts/common.sh
    "data_dir": "DATA_DIR",
    "out_dir": "OUT_DIR",
    "method": "METHOD",
    "conv_mode": "CONV_MODE",
}


def build_parser() -> argparse.ArgumentParser:
    """The flags; others go to the answering tool."""
    parser = Parser(
        prog="python -m llava.eval.benchmark",
        description="Run a benchmark from its questions to its score. Other flags go to the answering tool.",
    )
    parser.add_argument("benchmark", metavar="BENCHMARK", help=", ".join(task.name for task in TASKS))
    parser.add_argument(
        "tokens",
        metavar="TOKENS",
        help="mean number of visual tokens per layer, a share of them such as 0.11, or dense",
    )
    parser.add_argument("--tag", default="", help="a word for the name of the run")
    parser.add_argument("--model-path", default=None, help="checkpoint; default: upstream's, in playground/models")
    parser.add_argument("--data-dir", default=None, help="benchmark data, upstream's layout")
    parser.add_argument("--out-dir", default=None, help="where answers go; default: the data folder")
    parser.add_argument("--method", default=None, help="pruning method; default: autoprune")
    parser.add_argument("--conv-mode", default=None, help="template; default: by the name of the checkpoint")
    parser.add_argument("--version", choices=VERSIONS, default="v1_5", help="LLaVA's version")
    parser.add_argument("--tiny", action="store_true", help="the model and the data that ship with the package")
    return parser


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs the script; its exit status. rest: flags of the answering tool."""
    task = get_task(args.benchmark)
    script = scripts_folder() / args.version / "eval" / f"{task.name}.sh"
    if not script.is_file():
        raise UserError(f"--version {args.version} has no benchmark {task.name}")
    if args.tiny and args.version != VERSIONS[0]:
        raise UserError("--tiny is LLaVA-1.5: leave out --version")
    command = ["bash", str(script), args.tokens, args.tag, *rest]
    try:
        return subprocess.run(command, env={**os.environ, **environment(args)}).returncode
    except FileNotFoundError:
        raise UserError("bash is not installed: the benchmarks are shell scripts") from None


def environment(args: argparse.Namespace) -> Mapping[str, str]:
    """The variables of scripts/common.sh that the flags stand for."""
    found = {"PYTHON": os.environ.get("PYTHON", sys.executable)}
    if args.tiny:
        found |= {"MODEL_DIR": str(CHECKPOINT.parent), "CKPT": CHECKPOINT.name}
        found |= {"DATA_DIR": str(BENCHMARKS), "OUT_DIR": str(RESULTS / "eval")}
    elif CHECKOUT is None:
        found |= {"MODEL_DIR": str(MODELS), "DATA_DIR": str(DATA)}
        found = {name: os.environ.get(name, value) for name, value in found.items()}
    if args.model_path is not None:
        folder = Path(args.model_path)
        found |= {"MODEL_DIR": str(folder.parent), "CKPT": folder.name}
    given = {variable: getattr(args, flag) for flag, variable in _VARIABLES.items()}
    return found | {variable: value for variable, value in given.items() if value is not None}
