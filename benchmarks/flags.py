"""Flags that the benchmarks share, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.candidates import build_method, needs_no_tower
from benchmarks.environment import use_fixed_allocator
from benchmarks.geometry import GEOMETRIES, Geometry, RandomPrompt, geometry, random_decoder, random_prompt
from benchmarks.saved import RESULTS, deliver, slug
from llava.eval.common.arguments import DTYPES, Parser, check_range, split_names
from llava.pruning.method import PruningMethod
from llava.utils import UserError


def decoder_parser(description: str, rounds: int = 9) -> Parser:
    """Of a benchmark of decoders with random weights."""
    parser = Parser(description=description)
    parser.add_argument("--geometry", default="cpu-1024x24", help=f"sizes of the decoder: {', '.join(GEOMETRIES)}")
    add_method_arguments(parser, "autoprune")
    parser.add_argument("--visual-tokens", type=int, default=None, help="instead of the geometry's number")
    parser.add_argument("--batch-sizes", default="1", help="by commas")
    add_round_arguments(parser, rounds, 2)
    add_running_arguments(parser)
    return parser


def add_method_arguments(parser: argparse.ArgumentParser, methods: str) -> None:
    """Which methods at which budgets."""
    parser.add_argument("--methods", default=methods, help="pruning methods by commas; dense is always measured")
    parser.add_argument("--budgets", default="192,128,64", help="target tokens, by commas")


def add_round_arguments(parser: argparse.ArgumentParser, rounds: int, warmup: int) -> None:
    """How often everything is measured."""
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds that are measured")
    parser.add_argument("--warmup", type=int, default=warmup, help="rounds before that")


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it runs and what becomes of the result."""
    parser.add_argument("--device", default=None, help="cuda, mps, cpu; default: the best there is")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--attn-implementation", default="sdpa", help="eager, sdpa or flash_attention_2")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    parser.add_argument(
        "--allocator", choices=("fixed", "default"), default="fixed",
        help="fixed: malloc keeps freed memory (Linux; the process starts itself again with the variables set)",
    )  # fmt: skip
    add_saving_arguments(parser)


def add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    """`--save` and what goes with it."""
    parser.add_argument("--save", action="store_true", help="write a JSON file below --results-dir, named by hardware")
    parser.add_argument(
        "--name", type=_name, default=None, help="added to what was measured, in the file's name and the report's title"
    )
    parser.add_argument("--results-dir", default=str(RESULTS), help="folder of --save")


def _name(text: str) -> str:
    if not slug(text):
        raise argparse.ArgumentTypeError(f"{text!r} has no letters or digits that a file name could keep")
    return slug(text)


def method_names(text: str) -> list[str]:
    """The pruning methods of `--methods`, without dense."""
    return [name for name in split_names(text) if name != "dense"]


def numbers(text: str, flag: str, least: int = 1) -> list[int]:
    """`1,4,16` as numbers of at least `least`."""
    try:
        values = [int(part) for part in split_names(text)]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UserError(f"{flag}: needs numbers of at least {least} separated by commas, got {text!r}")
    return values


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and type of the flags; fixes the allocator, sets the threads."""
    for flag, least in (("rounds", 1), ("warmup", 0), ("threads", 1)):
        check_range(f"--{flag}", getattr(args, flag, None), least)
    if args.allocator == "fixed":
        use_fixed_allocator()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(args.device or best)
    except RuntimeError:
        raise UserError(f"--device: {args.device!r} is not a device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: this machine has no CUDA device; use --device cpu")
    if args.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, getattr(torch, args.dtype)


Settings = dict[tuple[str, int], Any]
"""(method, budget) -> what is measured: a method, or another setting of benchmarks/candidates.py."""


@dataclass
class Job:
    """What a benchmark of decoders measures: which decoder, of how many visual tokens, which settings and batches."""

    device: torch.device
    dtype: torch.dtype
    shape: Geometry
    visual: int
    settings: Settings
    sizes: Sequence[int] = (1,)
    attention: str = "sdpa"

    @classmethod
    def of(cls, args: argparse.Namespace, tower: bool = False) -> Job:
        """For the flags of :func:`decoder_parser`; fixes the allocator, sets the threads.

        tower: there is a vision tower. Without one, methods that need it are a `UserError`.
        """
        device, dtype = prepare(args)
        shape = geometry(args.geometry)
        visual = args.visual_tokens or shape.visual
        settings = settings_of(args, visual, (lambda method: method) if tower else needs_no_tower)
        sizes = numbers(args.batch_sizes, "--batch-sizes")
        return cls(device, dtype, shape, visual, settings, sizes, args.attn_implementation)

    def decoder(self) -> Any:
        """The model, with random weights."""
        return random_decoder(self.shape, self.device, self.dtype, self.attention)

    def prompt(self, batch: int) -> RandomPrompt:
        """Of that many samples."""
        return random_prompt(self.shape, batch, self.device, self.dtype, self.visual)

    def prompts(self) -> Iterator[RandomPrompt]:
        """One per batch size."""
        return map(self.prompt, self.sizes)

    def labelled(self, rows: Sequence[dict[str, Any]], visual: bool = True) -> str:
        """Adds geometry, type and kernel to the rows; returns them as a label."""
        kind = str(self.dtype).removeprefix("torch.")
        for row in rows:
            row |= {"geometry": self.shape.name, "dtype": kind, "attention": self.attention}
        label = f"{self.shape.name}, {kind}, {self.attention}"
        return f"{label}, {self.visual} visual tokens" if visual else label

    def deliver(self, tool: str, rows: list[dict[str, Any]], columns: Sequence[str], args: argparse.Namespace) -> None:
        """See :func:`~benchmarks.saved.deliver`."""
        deliver(tool, self.labelled(rows), rows, columns, args, self.device)


def settings_of(
    args: argparse.Namespace, visual: int | None = None, checked: Callable[[PruningMethod], PruningMethod] = lambda m: m
) -> Settings:
    """Methods of the flags at their budgets."""
    budgets = numbers(args.budgets, "--budgets")
    if visual is not None and max(budgets) > visual:
        raise UserError(f"--budgets: {max(budgets)} is more than the {visual} visual tokens")
    names = method_names(args.methods)
    return {(name, budget): checked(build_method(name, budget)) for name in names for budget in budgets}
