"""What selecting costs in each method: time against the floor of its own prefill, and memory on top.

    python -m benchmarks.costs --threads 1 --save
    python -m benchmarks.costs --threads 1 --visual-tokens 2880 --budgets 160 --save

Every method at one budget. selection: all that only pruning needs in a prefill, attention rows and moving of tokens
included; in front of the decoder what the vision tower would say is given (random numbers), so its rows are not in it.
Methods inside the tower: what they do between its layers, of one crop. saved: what others then need not do; keys that
the next layer would project itself (the time of projecting as many), and of a tower the difference between its plain
pass and the rest of the one with the method. floor: the decoder's layers at the lengths that the method leaves, without
any selection. On a CPU all are seconds of processor time, which other work on the machine does not add to, and the
least of interleaved rounds; of pruned floor: selection less what it saves, over the floor. extra: peak of the memory
that selecting takes from the system.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.candidates import MIB, floor_prefill, layer_widths
from benchmarks.flags import Job, decoder_parser
from benchmarks.geometry import Geometry, RandomPrompt, random_model
from benchmarks.parts import Clock
from benchmarks.timing import interleaved_rounds, timed
from llava.eval.reports.memory import PeakMemory
from llava.model.tower_merging import TowerMerger
from llava.model.vision import encode_crops
from llava.pruning import BEFORE_DECODER, VisualLayout, list_methods
from llava.pruning.engine.trace import Trace
from llava.pruning.method import PruningMethod
from llava.pruning.vision import TowerValue
from llava.utils import UserError, cli_main

COLUMNS = ("method", "budget", "visual", "selection_ms", "saved_ms", "floor_ms", "of_pruned_floor", "extra_mib")
_KEYS = 64
"""Width of a mean key."""


_PLAIN = "tower as it is"


class Spent(NamedTuple):
    """Seconds of a run: what is selection, and all."""

    selection: float
    whole: float


@dataclass(frozen=True)
class Selecting:
    """A prefill with a method, of which only the selection counts; calling it gives seconds."""

    model: Any
    method: PruningMethod
    prompt: RandomPrompt
    facts: Mapping[str, list[torch.Tensor]]

    def run(self, part: Callable[[], Any]) -> list[Trace]:
        """One prefill, with a context manager around each piece of the selection."""
        with torch.inference_mode(), self.method.attach(self.model) as run:
            run.selection_timer = part
            cls = self.prompt.cls_BV if run.needs_cls_attention else None
            run.set_visual(self.prompt.layout, cls, facts=self.facts)
            self.model.model(inputs_embeds=self.prompt.embeds_BNC, use_cache=True)
        return run.traces

    def only_selecting(self, part: Callable[[], Any]) -> None:
        """The same as far as the method selects: not through layers behind which it does nothing."""
        layers = self.model.model.layers
        last = max(self.method.stages(len(layers)), default=BEFORE_DECODER)
        if last == len(layers) - 1:
            self.run(part)
            return
        hook = layers[last + 1].register_forward_pre_hook(_enough)
        try:
            with suppress(_Enough):
                self.run(part)
        finally:
            hook.remove()

    def __call__(self) -> Spent:
        return _seconds_within(self.only_selecting, self.prompt.embeds_BNC.device)

    def reused(self) -> list[int]:
        """Of how many tokens each layer takes keys that selecting has projected already."""
        widths: list[int] = []

        def note(module: nn.Module, _: Any, keys: torch.Tensor) -> None:
            if "forward" in vars(module):  # stands in for the layer's own
                widths.append(keys.shape[1])

        projections = [getattr(layer.self_attn, "k_proj", None) for layer in self.model.model.layers]
        hooks = [projection.register_forward_hook(note) for projection in projections if projection is not None]
        try:
            self.run(nullcontext)
        finally:
            for hook in hooks:
                hook.remove()
        return widths


class _Enough(Exception):
    """Nothing is selected any more."""


def _enough(*_: Any) -> None:
    raise _Enough


@dataclass(frozen=True)
class InTower:
    """The same inside a vision tower, of one crop."""

    tower: Any
    method: PruningMethod
    target: int
    pixels: torch.Tensor

    def run(self, part: Callable[[], Any]) -> None:
        with torch.inference_mode():
            encode_crops(self.tower, self.pixels, merger=TowerMerger(self.method, self.target, part), timer=part)

    only_selecting = run

    def __call__(self) -> Spent:
        return _seconds_within(self.run, self.pixels.device)


def plain_tower(tower: Any, pixels: torch.Tensor) -> Callable[[], Any]:
    """A pass of the tower as it is."""
    return lambda: encode_crops(tower, pixels)


def projections(model: Any, widths: Sequence[int], prompt: RandomPrompt) -> Callable[[], Any]:
    """Projecting the keys of so many tokens, once for each width."""
    project = model.model.layers[0].self_attn.k_proj
    return lambda: [project(prompt.embeds_BNC[:, :width]) for width in widths]


def seconds_of(work: Callable[[], Any], device: torch.device) -> Spent:
    """What the work says itself, or how long it takes: none of it selection."""
    if isinstance(work, Selecting | InTower):
        return work()
    return _seconds_within(lambda _: work(), device)


def _seconds_within(run: Callable[[Callable[[], Any]], Any], device: torch.device) -> Spent:
    """Seconds that a run spends in its parts, and in all: the device's on CUDA, elsewhere those of the processor."""
    if device.type == "cuda":
        clock = Clock(device)
        whole = timed(lambda: run(partial(clock.part, "selection")), device)
        return Spent(clock.seconds["selection"], whole)
    spent = [0.0]

    @contextmanager
    def part() -> Any:
        start = time.process_time()
        yield
        spent[0] += time.process_time() - start

    start = time.process_time()
    run(part)
    return Spent(spent[0], time.process_time() - start)


def extra_bytes(work: Selecting | InTower, device: torch.device) -> int | None:
    """Largest peak of a piece of the selection above what is in use in front of it."""
    peaks: list[int | None] = []

    @contextmanager
    def part() -> Any:
        with PeakMemory(device) as peak:
            yield
        peaks.append(peak.bytes)

    work.only_selecting(part)
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def random_facts(method: PruningMethod, prompt: RandomPrompt, seed: int = 2) -> dict[str, list[torch.Tensor]]:
    """What a vision tower would say of the visual tokens, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    count, width = sum(prompt.layout.counts), prompt.embeds_BNC.shape[2]
    facts = {}
    for name, fact in method.vision_facts(24).items():
        if fact.value in (TowerValue.KEYS, TowerValue.WIDE_KEYS):
            wide = _KEYS if fact.value is TowerValue.KEYS else width
            drawn = torch.randn(count, wide, generator=generator)
        else:
            drawn = torch.rand(count, generator=generator)
        facts[name] = [drawn.to(prompt.embeds_BNC.device)]
    return facts


def crops_of(prompt: RandomPrompt, patches: int) -> RandomPrompt:
    """The prompt with its visual tokens as crops of a square of patches, if they are several of these."""
    (count,) = prompt.layout.counts
    if count <= patches or count % patches:
        return prompt
    crops = [[[token // patches for token in range(count)]]]
    return replace(prompt, layout=VisualLayout(prompt.layout.spans, prompt.layout.lengths, crops=_nested(crops)))


def _nested(crops: list[list[list[int]]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(map(tuple, row)) for row in crops)


def random_tower(shape: Geometry, device: torch.device, dtype: torch.dtype) -> Any:
    """CLIP's vision tower of these sizes, with random weights."""
    tower = shape.tower
    config = CLIPVisionConfig(
        hidden_size=tower.hidden, intermediate_size=tower.ffn, num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads, image_size=tower.image, patch_size=tower.patch,
    )  # fmt: skip
    model: Any = random_model(lambda: CLIPVisionModel(config), device, dtype)
    return getattr(model, "vision_model", model)


def measure(job: Job, args: Any) -> list[dict[str, Any]]:
    """A row per method."""
    model, shape, device = job.decoder(), job.shape, job.device
    prompt = crops_of(job.prompt(1), shape.tower.patches)
    candidates: dict[str, Any] = {}
    floors: dict[tuple[str, int], str] = {}
    reused: dict[tuple[str, int], str] = {}
    tower = None
    for key, method in job.settings.items():
        # What nothing selects from in the decoder keeps its length.
        widths: tuple[int, ...] = (prompt.tokens - job.visual + key[1],) * shape.layers
        if method.merges_in_tower:
            if job.visual != shape.tower.patches:
                continue  # measured on one crop, at its number of patches
            if tower is None:
                tower = random_tower(shape, device, job.dtype)
                pixels = torch.randn(1, 3, shape.tower.image, shape.tower.image).to(device, job.dtype)
                candidates[_PLAIN] = plain_tower(tower, pixels)
            candidates[f"{key}"] = InTower(tower, method, key[1], pixels)
        else:
            candidates[f"{key}"] = Selecting(model, method, prompt, random_facts(method, prompt))
            if max(method.stages(shape.layers), default=BEFORE_DECODER) > BEFORE_DECODER:
                widths = layer_widths(candidates[f"{key}"].run(nullcontext))
                if known := candidates[f"{key}"].reused():
                    reused[key] = f"keys {known}"
                    candidates[reused[key]] = projections(model, known, prompt)
        floors[key] = f"floor {widths}"
        candidates.setdefault(floors[key], floor_prefill(model, widths, prompt))
    label = f"selection of {len(floors)} methods"
    seconds = interleaved_rounds(candidates, args.rounds, device, args.warmup, seconds_of, label)
    whole = {name: min(spent.whole for spent in found) for name, found in seconds.items()}
    rows = []
    for key, floor in floors.items():
        own, least = min(spent.selection for spent in seconds[f"{key}"]), whole[floor]
        saved = whole[reused[key]] if key in reused else 0.0
        if isinstance(candidates[f"{key}"], InTower):
            saved = whole[_PLAIN] - min(spent.whole - spent.selection for spent in seconds[f"{key}"])
        extra = extra_bytes(candidates[f"{key}"], device)
        rows.append(
            {
                "method": key[0],
                "budget": key[1],
                "visual": job.visual,
                "rounds": args.rounds,
                "selection_ms": 1000 * own,
                "saved_ms": 1000 * saved,
                "floor_ms": 1000 * least,
                "of_pruned_floor": (own - saved) / least,
                "extra_mib": None if extra is None else extra / MIB,
            }
        )
    return rows


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = decoder_parser("What selecting costs in each method.", rounds=5)
    parser.set_defaults(methods=",".join(name for name in list_methods() if name != "dense"), budgets="64", warmup=1)
    args = parser.parse_args(argv)
    job = Job.of(args, tower=True)
    if tuple(job.sizes) != (1,):
        raise UserError("--batch-sizes: selecting is measured at batch size 1")
    job.deliver("costs", measure(job, args), COLUMNS, args)


if __name__ == "__main__":
    main()
