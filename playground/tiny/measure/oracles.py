"""What selection could keep at best: oracles that know the scene, on any tiny checkpoint and either family of scenes.

    python -m playground.tiny.measure.oracles --model-path playground/tiny/models/tiny-llava-deep --crowded
    python -m playground.tiny.measure.oracles --budgets 64,32,16 --questions 60 --output results/oracles.json

Tokens are dropped before the decoder. `asked` keeps the patches of the objects that the question asks about, `objects`
those of all objects, every one equally many, `cls` what CLS attention ranks first, `random` any; the first two are
filled up with background. A question counts as right when the greedy answer is the right one to the letter. `--layers`
adds where text looks: the share of the answering place's attention to the picture that lies on the objects asked about,
layer by layer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, write_json
from llava.eval.common.outputs import PICTURE, JsonObject
from llava.utils import UserError, cli_main
from playground.tiny.build.benchmarks import ARENA, build_all
from playground.tiny.build.items import CROWDED, PLAIN, Item
from playground.tiny.measure.arena import blind_answers, encode
from playground.tiny.train import guidance, packing, text
from playground.tiny.train.export import load
from playground.tiny.train.joint import TinyLlava
from playground.tiny.world.scenes import GRID, ON_OBJECT, Scene

RECORD = JsonObject("figures of the oracles", values=dict)
SELECTORS = ("asked", "objects", "cls", "random")
BY_QUESTION = ("asked", "random")
"""Selectors that keep other patches for every question about a picture."""


def keep(scene: Scene, members: Sequence[int], budget: int) -> np.ndarray:
    """The best covered patches of some objects in turn, one of each at a time, filled up with background; sorted."""
    shares = scene.cover().reshape(len(scene.things), -1)
    ranked = []
    for i in members:
        order = np.argsort(-shares[i], kind="stable")
        ranked.append([int(p) for p in order if shares[i, p] >= ON_OBJECT])
    turns = [r[turn] for turn in range(max(map(len, ranked), default=0)) for r in ranked if turn < len(r)]
    kept = list(dict.fromkeys(turns))[:budget]
    free = np.flatnonzero(shares.sum(0) == 0)
    return np.sort(np.array([*kept, *free[np.linspace(0, len(free) - 1, budget - len(kept)).astype(int)]]))


def select(name: str, item: Item, budget: int, attention: torch.Tensor, rng: np.random.Generator) -> np.ndarray:
    """Sorted patches that a selector keeps for a question. attention: [576], of CLS."""
    everything = range(len(item.scene.things))
    if name == "asked":
        return keep(item.scene, item.question.asked or everything, budget)
    if name == "objects":
        return keep(item.scene, everything, budget)
    if name == "cls":
        return np.sort(attention.topk(budget).indices.numpy())
    return np.sort(rng.permutation(GRID * GRID)[:budget])


@torch.inference_mode()
def right(model: TinyLlava, tokens: torch.Tensor, rows: list[tuple[np.ndarray, list[Item]]], batch: int) -> list[bool]:
    """Which greedy answers are the right ones. rows: kept patches and questions; tokens: per row [n, 576, D].

    The right answer is put in and has to be the most likely one token by token, which is when greedy decoding says it.
    """
    out: list[bool] = []
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        kept, items = [k for k, _ in some], [[i.question for i in own] for _, own in some]
        data = packing.pack(kept, items, np.zeros(len(some), dtype=bool))
        out += guidance.forward(model.decoder, data, tokens[first : first + batch])[1].tolist()
    return out


def pictures_of(items: Sequence[Item], questions: int | None) -> list[list[Item]]:
    """The questions of each picture; of every benchmark as many pictures, evenly spread, as have so many questions."""
    by_picture: dict[tuple[str, str | None], list[Item]] = defaultdict(list)
    for item in items:
        by_picture[item.benchmark, item.image].append(item)
    out = []
    for name in ARENA:
        own = [group for (benchmark, _), group in by_picture.items() if benchmark == name]
        each = sum(map(len, own)) / len(own)
        wanted = len(own) if questions is None else min(len(own), max(1, round(questions / each)))
        out += [own[int(k)] for k in np.linspace(0, len(own) - 1, wanted)]
    return out


def measure(model: TinyLlava, groups: list[list[Item]], budgets: Sequence[int], say=lambda line: None) -> dict:
    """Accuracy in percent of the dense model and under every selector and budget, per benchmark and on average."""
    items = [item for group in groups for item in group]
    tokens, attention = encode(model, [group[0].scene for group in groups])

    def scored(good: Sequence[bool]) -> dict[str, float]:
        by = defaultdict(list)
        for item, value in zip(items, good, strict=True):
            by[item.benchmark].append(value)
        rates = {name: 100 * float(np.mean(values)) for name, values in by.items()}
        return {name: round(rate, 2) for name, rate in {**rates, "mean": float(np.mean(list(rates.values())))}.items()}

    record: dict = {"questions": len(items), "pictures": len(groups), "settings": {}}
    said = blind_answers(items)
    record["settings"]["blind"] = scored([i.question.answer == a for i, a in zip(items, said, strict=True)])
    everything = [(np.arange(GRID * GRID), group) for group in groups]
    good = right(model, tokens, everything, 6)
    record["settings"]["dense"] = scored(good)
    kinds = defaultdict(list)
    for item, value in zip(items, good, strict=True):
        kinds[item.question.kind].append(value)
    record["by_kind"] = {kind: round(100 * float(np.mean(v)), 1) for kind, v in sorted(kinds.items())}
    say(f"dense {record['settings']['dense']}")
    place = [k for k, group in enumerate(groups) for _ in group]
    rng = np.random.default_rng(64)
    for budget in budgets:
        for name in SELECTORS:
            if name in BY_QUESTION:
                rows = [(select(name, i, budget, attention[k], rng), [i]) for k, i in zip(place, items, strict=True)]
                good = right(model, tokens[place], rows, 48)
            else:
                rows = [(select(name, group[0], budget, attention[k], rng), group) for k, group in enumerate(groups)]
                good = right(model, tokens, rows, 24)
            record["settings"][f"{name} {budget}"] = scored(good)
            say(f"{name} {budget} {record['settings'][f'{name} {budget}']}")
    return record


def attention_inputs(model: TinyLlava, data: packing.Pack, tokens: torch.Tensor) -> dict[int, dict]:
    """What the attention of every layer is given."""
    given: dict[int, dict] = {}

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given[module.layer_idx] = kwargs

    handles = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.decoder.model.layers
    ]
    packing.next_tokens(model.decoder, data, tokens)
    for handle in handles:
        handle.remove()
    return given


@torch.inference_mode()
def looking(model: TinyLlava, groups: list[list[Item]]) -> list[list[float]]:
    """Per layer, of the attention that the answering place pays to the picture the share on the objects asked about,
    and that of the first name in the question on what it names: [[answer, name], ...], means over questions and heads.
    """
    tokens, _ = encode(model, [group[0].scene for group in groups])
    sums, counts = np.zeros((len(model.decoder.model.layers), 2)), np.zeros(2)
    for k, group in enumerate(groups):
        asked = [item.question for item in group if item.question.names]
        if not asked:
            continue
        scene, kept = group[0].scene, np.arange(GRID * GRID)
        table = packing.attributes(scene)
        marks = [packing.asked_patches(scene, table, question) for question in asked]
        data = packing.pack([kept], [asked], np.zeros(1, dtype=bool), [marks])
        data = guidance.guide(data, [kept], [scene], [table], [asked])
        given = attention_inputs(model, data, tokens[k : k + 1])
        for column, (rows, there) in enumerate(((data.rows, data.asked), (data.names, data.named))):
            use = there.any(1)
            counts[column] += int(use.sum())
            for i, layer in enumerate(model.decoder.model.layers):
                scores = guidance.head_scores(layer.self_attn, given[i], data, rows[use], slice(None)).softmax(-1)
                on_picture = (scores * (data.visual >= 0)[0]).sum(-1)
                on_asked = (scores * there[use][:, None]).sum(-1)
                sums[i, column] += float((on_asked / on_picture).mean(1).sum())
    return [[round(float(value), 4) for value in row] for row in sums / counts]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=text.CHECKPOINT, help="tiny checkpoint (%(default)s)")
    parser.add_argument("--crowded", action="store_true", help="crowded scenes instead of those with large objects")
    parser.add_argument("--budgets", default="64,32,16", help="tokens into the decoder, by commas (%(default)s)")
    parser.add_argument("--questions", type=int, help="about so many questions of every benchmark (default: all)")
    parser.add_argument("--layers", action="store_true", help="also where text looks in every layer")
    parser.add_argument("--draw", type=Path, help="measure nothing: draw `layers` of such a record as --figure")
    parser.add_argument("--figure", type=PICTURE, help="picture of where text looks in every layer")
    parser.add_argument("--output", type=RECORD, help="JSON file for the figures (default: only printed)")
    args = parser.parse_args(argv)
    if args.figure:
        PICTURE.check(Path(args.figure))
    if args.draw:
        if not args.figure:
            raise UserError("--draw: needs --figure, the picture to draw")
        draw_layers(read_json(args.draw, "figures of the oracles").get("layers"), Path(args.figure), str(args.draw))
        return
    try:
        budgets = [int(budget) for budget in args.budgets.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < budget <= GRID * GRID for budget in budgets):
        raise UserError(f"--budgets {args.budgets}: must be numbers from 1 to {GRID * GRID}, by commas")
    if args.questions is not None and args.questions < 1:
        raise UserError(f"--questions {args.questions}: must be at least 1")
    if not (args.model_path / "config.json").is_file():
        raise UserError(f"--model-path {args.model_path}: has no config.json, so it is no tiny checkpoint")
    if args.output:
        RECORD.check(Path(args.output))
    model, start = load(args.model_path), time.time()
    groups = pictures_of(build_all(ARENA, CROWDED if args.crowded else PLAIN).items, args.questions)
    record = measure(model, groups, budgets, lambda line: print(line, flush=True))
    if args.layers or args.figure:
        record["layers"] = looking(model, groups[:: max(1, len(groups) // 40)])
    record["measured"] = {"seconds": round(time.time() - start), "threads": torch.get_num_threads()}
    if args.output:
        write_json(Path(args.output), record)
    if args.figure:
        draw_layers(record["layers"], Path(args.figure), "this run")
    print(table(record, budgets))


def draw_layers(layers: list[list[float]] | None, path: Path, source: str) -> None:
    """The picture of `looking`: bars per layer, for the answering place and for names."""
    if not layers:
        raise UserError(f"{source}: has no `layers`; measure with --layers")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(layers))
    for column, (label, color) in enumerate(
        (("answering place, on what is asked about", "tab:blue"), ("names, on what they name", "tab:orange"))
    ):
        axes.bar(place + 0.4 * column - 0.2, [100 * row[column] for row in layers], 0.4, label=label, color=color)
    axes.set(xlabel="decoder layer", ylabel="% of attention to the picture", xlim=(-1, len(layers)), ylim=(0, 100))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def table(record: dict, budgets: Sequence[int]) -> str:
    """The means as a markdown table."""
    settings = record["settings"]
    lines = ["| | " + " | ".join(map(str, budgets)) + " |", "|---|" + "---:|" * len(budgets)]
    for name in SELECTORS:
        lines.append(f"| {name} | " + " | ".join(f"{settings[f'{name} {b}']['mean']:.1f}" for b in budgets) + " |")
    return "\n".join([f"dense {settings['dense']['mean']:.1f}, blind {settings['blind']['mean']:.1f}", "", *lines])


if __name__ == "__main__":
    main()
