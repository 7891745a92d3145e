"""FLOPs of AutoPrune without running a model: the decoder's geometry, a prompt length and the planned schedule.

The formula is the paper's (`DecoderShape`); a rule estimates how many tokens a prompt has where the checkpoint's
tokenizer is not at hand. Real runs report measured FLOPs; this compares the paper's with the formula.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.eval.common.arguments import Parser, parse_count, split_names
from llava.eval.common.jsonio import write_json
from llava.eval.common.outputs import JsonObject
from llava.eval.common.questions import Question, read_questions
from llava.eval.common.tables import markdown_table
from llava.eval.reports.published import PAPER, published_rows
from llava.utils import UserError


@dataclass(frozen=True)
class Geometry:
    """Sizes of a language model and the visual tokens of its full prompt."""

    layers: int
    hidden: int
    intermediate: int
    visual_tokens: int


GEOMETRIES = {
    "llava-v1.5-7b": Geometry(32, 4096, 11008, 576),
    "llava-v1.5-13b": Geometry(40, 5120, 13824, 576),
    "llava-v1.6-vicuna-7b": Geometry(32, 4096, 11008, 2880),
}
# Of LLaVA-1.5's template: 35 before the image (one of them starts the text), 5 for the blank and "ASSISTANT:".
TEMPLATE_TOKENS = 40
# Slopes that the schedule can get: none of it (all tokens equal in all layers) up to k0.
SLOPES = (0.0, 0.1, 0.2, 0.3, 0.4)
_PIECES = re.compile(r"[^\W\d_]+|\d|\S|\n")
_SHORT_WORD = 9  # letters that one token of a frequent lower-case word covers
_ODD_WORD = 3  # letters that one token of a name or a word in capitals covers


def estimate_tokens(text: str) -> int:
    """Tokens of English text under LLaMA's tokenizer, estimated: no vocabulary is needed.

    Every digit, punctuation mark and line break is one token; a lower-case word (or one with a capital at its start)
    is one token for each nine letters begun, a word in capitals or mixed case one for each three.
    """
    count = 0
    for piece in _PIECES.findall(text):
        if piece[0].isalpha() and piece[1:] == piece[1:].lower():
            count += math.ceil(len(piece) / _SHORT_WORD)
        elif piece[0].isalpha():
            count += math.ceil(len(piece) / _ODD_WORD)
        else:
            count += 1
    return count


def prompt_tokens(question: Question) -> int:
    """Text tokens of the prompt of a question: LLaVA-1.5's template, which is known, and the text, estimated."""
    return TEMPLATE_TOKENS + estimate_tokens(f"\n{question.text}")


def relative_flops(
    geometry: Geometry, text_tokens: float, target_tokens: int, slope: float = 0.2, counting: str = "processed"
) -> float:
    """FLOPs of the decoder's prefill relative to dense, in percent, for AutoPrune's planned schedule.

    counting: `processed` charges a layer with the tokens it computed on, `nominal` with those that leave it (which
    the layer never saves, so this figure is too low).
    """
    from llava.pruning import retention_schedule
    from llava.pruning.engine.trace import DecoderShape

    shape = DecoderShape(geometry.layers, geometry.hidden, geometry.intermediate, geometry.hidden, 2)
    leaving = retention_schedule(geometry.layers, geometry.visual_tokens, target_tokens, slope)
    flops: Callable[[float], float] = shape.layer_flops  # type: ignore[assignment]  # the formula takes means as well
    counts: Sequence[float] = leaving if counting == "nominal" else [geometry.visual_tokens, *leaving[:-1]]
    pruned = sum(flops(text_tokens + count) for count in counts)
    return 100 * pruned / (geometry.layers * flops(text_tokens + geometry.visual_tokens))


def matching_prompt(geometry: Geometry, target_tokens: int, percent: float, counting: str = "processed") -> float:
    """The number of text tokens with which the formula gives `percent`; relative FLOPs grow with it. By bisection."""
    low, high = 0.0, 4096.0
    for _ in range(60):
        middle = (low + high) / 2
        if relative_flops(geometry, middle, target_tokens, counting=counting) < percent:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def compare(
    geometry: Geometry, checkpoint: str, budgets: Sequence[int], prompts: dict[str, float]
) -> list[dict[str, Any]]:
    """One row per budget: relative FLOPs for each prompt length (name -> text tokens), and the published figure."""
    rows = []
    for budget in budgets:
        published = [
            row.flops for row in published_rows(checkpoint, "autoprune", budget) if row.source == PAPER and row.flops
        ]
        row: dict[str, Any] = {"budget": budget, "published": published[0] if published else None, "prompts": {}}
        for name, tokens in prompts.items():
            values = [relative_flops(geometry, tokens, budget, slope) for slope in SLOPES]
            row["prompts"][name] = {
                "text_tokens": tokens,
                "processed": relative_flops(geometry, tokens, budget),
                "processed_range": (min(values), max(values)),
                "nominal": relative_flops(geometry, tokens, budget, counting="nominal"),
            }
        if published:
            row["matching_text_tokens"] = {
                kind: matching_prompt(geometry, budget, published[0], kind) for kind in ("processed", "nominal")
            }
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Relative FLOPs from processed tokens (from nominal ones in parentheses), by budget and prompt."""
    names = list(rows[0]["prompts"])
    lengths = [f"{name}, {rows[0]['prompts'][name]['text_tokens']:.0f} text tokens" for name in names]
    header = ["tokens", *lengths, "published", "text tokens that give the published figure"]
    lines = []
    for row in rows:
        cells = [str(row["budget"])]
        for figures in (row["prompts"][name] for name in names):
            cells.append(f"{figures['processed']:.1f}% ({figures['nominal']:.1f}%)")
        cells.append("-" if row["published"] is None else f"{row['published']:.1f}%")
        match = row.get("matching_text_tokens")
        cells.append("-" if match is None else f"{match['processed']:.0f} ({match['nominal']:.0f})")
        lines.append(cells)
    return markdown_table(header, lines, labels=0)


def build_parser() -> Parser:
    """All flags of the tool."""
    parser = Parser(prog="python -m llava.eval.flops", description="FLOPs of AutoPrune relative to dense, by formula.")
    parser.add_argument("--checkpoint", default="llava-v1.5-7b", choices=tuple(GEOMETRIES), help="geometry")
    parser.add_argument("--budgets", default="192,128,64", help="target tokens, by commas")
    parser.add_argument("--text-tokens", help="length of the text part of a prompt")
    parser.add_argument("--question-files", nargs="*", default=[], help="LLaVA question files; prompts are estimated")
    parser.add_argument(
        "--json",
        type=JsonObject("FLOPs of this tool", ("checkpoint", "rows")),
        metavar="PATH",
        help="write the figures as JSON",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Prints the table that the flags ask for, and writes the figures where they say."""
    geometry = GEOMETRIES[args.checkpoint]
    budgets = [parse_count(text, "--budgets") for text in split_names(args.budgets)]
    if not budgets or max(budgets) > geometry.visual_tokens:
        raise UserError(f"--budgets: needs numbers from 1 to {geometry.visual_tokens}")
    prompts = {"given": float(parse_count(args.text_tokens, "--text-tokens"))} if args.text_tokens else {}
    means = {}
    for path in args.question_files:
        means[Path(path).parent.name] = fmean(prompt_tokens(question) for question in read_questions(path))
    prompts |= means
    if len(means) > 1:
        prompts["mean"] = fmean(means.values())
    if not prompts:
        raise UserError("give --question-files or --text-tokens")
    rows = compare(geometry, args.checkpoint, budgets, prompts)
    print(markdown(rows))
    if args.json:
        write_json(args.json, {"checkpoint": args.checkpoint, "rows": rows})
