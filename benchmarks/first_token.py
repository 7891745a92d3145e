"""Time to first token of a whole LLaVA, from pixels on the device to logits, and where it goes.

    python -m benchmarks.first_token --geometry llava-1.5-7b --budgets 192,128,64 --batch-sizes 1,4,16 --save
    python -m benchmarks.first_token --geometry llava-next-7b --budgets 640,320,160 --save

dense is transformers' own LLaVA; a second row says what ours takes with nothing attached to it, on the same modules.
The parts are medians of passes of their own. vision: the tower and putting crops together. selection: what only pruning
needs, wherever it is, and in no other part. other: text embeddings, putting the prompt together, attaching, masks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.candidates import count_row
from benchmarks.flags import Job, decoder_parser
from benchmarks.parts import Clock, Cut, cut, selection
from benchmarks.timing import interleaved_rounds, median_ratio, summary
from benchmarks.whole_model import (
    ImagePrompt,
    Watch,
    first_token,
    random_image_prompt,
    random_llava,
    tower_watched,
    transformers_first_token,
    transformers_own,
)
from llava.pruning import get_method
from llava.pruning.engine.trace import Trace
from llava.pruning.method import PruningMethod
from llava.utils import cli_main

PARTS = ("vision", "projector", "prefill", "selection", "head", "other")
COLUMNS = ("method", "budget", "model", "batch", "visual", "processed", "ms", "p10", "p90", "of_dense",
           "flops_of_dense", "kv_mib", *PARTS, "vision_percent", "tower_layers", "extra_rows")  # fmt: skip
DENSE = ("dense", None, "transformers")

Key = tuple[str, int | None, str]


@dataclass(frozen=True)
class Candidate:
    """A model with a method; without one it is transformers' own."""

    model: Any
    method: PruningMethod | None
    prompt: ImagePrompt

    def work(self, watch: Watch = nullcontext) -> Callable[[], torch.Tensor]:
        """A pass from pixels to logits."""
        if self.method is None:
            return transformers_first_token(self.model, self.prompt, watch)
        return first_token(self.model, self.method, self.prompt, watch)

    def seconds_by_part(self) -> dict[str, float]:
        """One pass, split."""
        clock = Clock(self.prompt.pixels.device)
        with torch.inference_mode(), clock.part("other"):
            self.work(lambda run: cut(self._cuts(run), clock.part))()
        return dict(clock.seconds)

    def _cuts(self, run: Any) -> list[Cut]:
        inner = self.model.model
        encoder = (inner, "get_image_features") if run is None else (self.model, "encode_visual_tokens")
        return [
            Cut("vision", *encoder),
            Cut("projector", inner.multi_modal_projector, "forward"),
            Cut("prefill", inner.language_model, "forward"),
            Cut("head", self.model.lm_head, "forward"),
            *([] if run is None else [selection(run)]),
        ]

    def facts(self) -> tuple[list[Trace], dict[str, int]]:
        """What a pass does, whatever time it takes: its traces and what ran in the vision tower."""
        runs: list[Any] = []
        with torch.inference_mode(), tower_watched(self.model.model.vision_tower) as tower:
            self.work(lambda run: nullcontext(runs.append(run)))()
        traces = [] if runs[0] is None else runs[0].traces
        return traces, tower


def candidates(model: Any, prompt: ImagePrompt, settings: Mapping[tuple[str, int], Any]) -> dict[Key, Candidate]:
    """(method, budget, whose model) -> what is timed, the two dense ones first."""
    ours = {("dense", None): get_method("dense").from_options({}), **settings}
    return {DENSE: Candidate(transformers_own(model), None, prompt)} | {
        (*key, "llava"): Candidate(model, method, prompt) for key, method in ours.items()
    }


def median_parts(found: Mapping[Key, Candidate], rounds: int, device: torch.device) -> dict[Key, dict[str, float]]:
    """Milliseconds by part, medians over interleaved passes."""
    passes: Any = interleaved_rounds(found, rounds, device, 0, lambda one, _: one.seconds_by_part(), "parts")
    return {
        key: {part: 1000 * statistics.median(one.get(part, 0.0) for one in own) for part in PARTS}
        for key, own in passes.items()
    }


def measure(model: Any, prompt: ImagePrompt, settings: Mapping[tuple[str, int], Any], args: Any) -> list[dict]:
    """Rows for one batch size: dense twice, then every setting."""
    found = candidates(model, prompt, settings)
    facts = {key: candidate.facts() for key, candidate in found.items()}
    facts[DENSE] = (facts["dense", None, "llava"][0], facts[DENSE][1])  # the same tokens
    seconds = interleaved_rounds(
        {key: candidate.work() for key, candidate in found.items()},
        args.rounds,
        prompt.pixels.device,
        args.warmup,
        description=f"first token, batch {len(prompt.pixels)}",
    )
    parts = median_parts(found, args.rounds, prompt.pixels.device)
    return [
        {
            **dict(zip(("method", "budget", "model"), key, strict=True)),
            **count_row(traces),
            **summary(seconds[key]),
            "of_dense": median_ratio(seconds[key], seconds[DENSE]),
            **parts[key],
            "vision_percent": 100 * parts[key]["vision"] / sum(parts[key].values()),
            **tower,
        }
        for key, (traces, tower) in facts.items()
    ]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = decoder_parser("Time to first token of a whole LLaVA, from pixels to logits, and its parts.")
    args = parser.parse_args(argv)
    job = Job.of(args, tower=True)
    prompts = [random_image_prompt(job.shape, size, job.device, job.dtype, job.visual) for size in job.sizes]
    model = random_llava(job.shape, job.device, job.dtype, job.attention)
    rows = [row for prompt in prompts for row in measure(model, prompt, job.settings, args)]
    job.deliver("first_token", rows, COLUMNS, args)


if __name__ == "__main__":
    main()
