"""Does a model drive by what its cameras show? Meta actions of the held-out streets, and what they rest on.

    python -m playground.tiny.measure.driving --checkpoint playground/tiny/models/tiny-drive

Measured with the tools of `llava.eval`: with all views; with the things that the front camera sees alone, the other
views showing empty streets; with nothing in any view; and with a tenth of the visual tokens, those of all things first
(oracle). Beside each stands what the best guesser can reach who knows the rule and sees those views. Figures are
written to `drive.json` in the checkpoint as they are made; `--kinds` makes some of them anew.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava.eval.answering.adapter import LlavaAdapter
from llava.eval.answering.answerer import Answerer
from llava.eval.common.arguments import GenerationOptions
from llava.eval.common.questions import Question
from llava.eval.tasks.senna import is_right
from llava.model.builder import load_pretrained_model
from llava.pruning import BEFORE_DECODER, DecoderMethod, Rows, Selection, get_method
from llava.utils import UserError, cli_main
from playground.tiny.build.driving import streets
from playground.tiny.world import driving as dq
from playground.tiny.world.cameras import render_view, shown
from playground.tiny.world.driving import CAMERAS, SEEN, Street, best_accuracy, rule

GOALS = {"all": (95.0, 100.0), "front": (0.0, 65.0), "none": (0.0, 40.0), "oracle": (93.0, 100.0)}
"""Percent, from and to."""
VIEWS = {"all": CAMERAS, "front": ("FRONT",), "none": (), "oracle": CAMERAS}
SAID = {
    "all": "all views",
    "front": "things in the front view alone",
    "none": "empty streets",
    "oracle": "all views, 345 tokens, those of things first",
}
"""As docs/driving.md has it."""
SHARE = 10
"""The oracle keeps one of so many tokens."""


@dataclass(frozen=True, kw_only=True)
class Given(DecoderMethod):
    """Keeps the visual tokens of given places, in front of the decoder; one prompt at a time."""

    target_tokens: int | None = 1
    places: tuple[int, ...] = ()

    name: ClassVar[str] = "given"

    def stages(self, num_layers: int) -> Mapping[int, Rows]:
        return {BEFORE_DECODER: Rows.NONE}

    def select(self, view, memory: SimpleNamespace) -> Selection:
        return Selection(torch.tensor([self.places], device=view.device), (len(self.places),))


def emptied(street: Street, cameras: Iterable[str]) -> Street:
    """The street with nothing but what these cameras see of what decides."""
    kept = set(cameras)
    return replace(street, things=tuple(t for t in street.things if SEEN.get(t.fact) in kept))


def things_first(street: Street) -> tuple[int, ...]:
    """A tenth of all visual tokens: those of things, then of the background, evenly spaced."""
    on = np.concatenate([shown(street, camera).reshape(-1) >= 0 for camera in CAMERAS])
    rest, count = np.flatnonzero(~on), max(len(on) // SHARE, on.sum())
    fill = rest[np.linspace(0, len(rest) - 1, count - on.sum()).astype(int)]
    return tuple(np.sort(np.concatenate([np.flatnonzero(on), fill])).tolist())


def pictures(street: Street, cameras: Iterable[str], number: int) -> dict[str, str]:
    """The six pictures of a question by name, in base64."""
    made, seen = {}, street if set(cameras) == set(CAMERAS) else emptied(street, cameras)
    for camera in CAMERAS:
        file = io.BytesIO()
        Image.fromarray(render_view(seen, camera)).save(file, format="PNG")
        made[f"{camera}{number}"] = base64.b64encode(file.getvalue()).decode()
    return made


def method_of(kind: str, street: Street) -> DecoderMethod:
    """What prunes: nothing, or all but what the oracle keeps."""
    if kind != "oracle":
        dense: DecoderMethod = get_method("dense")()
        return dense
    places = things_first(street)
    return Given(places=places, target_tokens=len(places))


def measure(
    checkpoint: Path, found: list[Street], kinds: Iterable[str] = tuple(VIEWS), tokens: int = 40, quiet: bool = False
) -> Iterator[tuple[str, dict[str, float]]]:
    """Kinds of looking as they are measured, each with its accuracy in percent and the best that can be reached;
    tokens: of an answer, at most.
    """
    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), None, checkpoint.name, device="cpu")
    adapter = LlavaAdapter(tokenizer, model, processor)
    for name in kinds:
        cameras, right = VIEWS[name], []
        for number, street in enumerate(tqdm(found, desc=name, disable=quiet)):
            images = pictures(street, cameras, number)
            answerer = Answerer(adapter, Path("."), GenerationOptions(max_new_tokens=tokens), images=images)
            question = Question(number, name, number, dq.meta_question(street).text, tuple(images))
            with method_of(name, street).attach(model) as run, torch.inference_mode():
                (answer,) = answerer.answer([answerer.prepare(question)], run)
            right.append(is_right(rule(street.facts), answer.text))
        accuracy, best = 100 * float(np.mean(right)), best_accuracy(cameras)
        yield name, {"accuracy": round(accuracy, 2), "best": round(best, 2), "questions": len(right)}


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="what the stage `drive` has left, exported")
    parser.add_argument("--limit", type=int, help="so many of the 150 streets")
    parser.add_argument("--kinds", default=",".join(VIEWS), help="what to measure (default: %(default)s)")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in VIEWS]:
        raise UserError(f"--kinds {unknown[0]}: expected some of {', '.join(VIEWS)}")
    if not (args.checkpoint / "config.json").is_file():
        raise UserError(f"{args.checkpoint}: no checkpoint; train and export one first")
    path = args.checkpoint / "drive.json"
    for name, figures in measure(args.checkpoint, streets()[: args.limit], kinds):
        low, high = GOALS[name]
        met = "met" if low <= figures["accuracy"] <= high else "missed"
        print(f"{name}: {figures['accuracy']:.1f} of at most {figures['best']:.1f}; goal {low:.0f} to {high:.0f} {met}")
        written = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**written, name: figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
