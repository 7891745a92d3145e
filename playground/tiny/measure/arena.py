"""Is the arena fair? Measures the tiny LLaVA on the miniature benchmarks and writes `arena.json` beside its weights.

    python -m playground.tiny.measure.arena            # all figures, some minutes on two cores
    python -m playground.tiny.measure.arena --check    # only compares the recorded figures with the thresholds

Measured per benchmark, with the scorers of `llava.eval`: the dense model, also with a blank behind the prompt; the best
answer that ignores the picture; and the model with 64 of the 576 visual tokens, dropped before the decoder: the patches
of the objects asked about (oracle), random patches, the patches that CLS attention ranks first. And how much of that
ranking lies on objects.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from llava.eval.tasks.registry import DEMO as SCORERS
from llava.utils import UserError, cli_main
from playground.tiny.build.benchmarks import ARENA, DATA, build_all
from playground.tiny.build.ensure import ensure
from playground.tiny.build.items import Item
from playground.tiny.train import packing, text
from playground.tiny.train.export import load
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.vision import normalize, run_tower
from playground.tiny.world import scenes
from playground.tiny.world.scenes import COLORS, GRID, ON_OBJECT, SHAPES, WORDS, Scene, center_patch, coverage

KEEP = 64
RANDOM_DRAWS = 2
RECORD = text.CHECKPOINT / "arena.json"
THRESHOLDS = {
    "mean accuracy of the dense model, at least": 85.0,
    "dense above image-blind on each benchmark, at least": 30.0,
    "share of the 64 patches with most CLS attention on objects, at least": 0.70,
    "share of the picture covered by objects, at most": 1 / 3,
    "oracle at 64 tokens loses less than": 2.0,
    "random at 64 tokens loses at least": 10.0,
    "a blank behind the prompt loses less than": 1.0,
}


@torch.inference_mode()
def encode(model: TinyLlava, pictures: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected visual tokens [n, 576, 128] and CLS attention over them [n, 576]."""
    tokens, rows = [], []
    for i in range(0, len(pictures), 16):
        pixels = normalize(np.stack([scenes.pad_square(scenes.render(s)) for s in pictures[i : i + 16]]))
        features, attention, _ = run_tower(model.tower, pixels)
        tokens.append(model.projector(features))
        rows.append(attention)
    return torch.cat(tokens), torch.cat(rows)


@torch.inference_mode()
def generate(
    model: TinyLlava,
    tokens: torch.Tensor,
    kept: list[np.ndarray],
    asked: list[list[str]],
    limit: int = 6,
    batch: int = 8,
    end: str = "",
) -> list[list[str]]:
    """Greedy answers. Every row is a picture's tokens, the indices that are kept, and questions about it; `end` is
    what follows the prompt."""
    out: list[list[str]] = []
    tokenizer = text.tokenizer()
    for first in range(0, len(kept), batch):
        rows = range(first, min(first + batch, len(kept)))
        prompts = [[tokenizer(text.prompt(q).split("<image>")[1] + end).input_ids[1:] for q in asked[r]] for r in rows]
        said: list[list[list[int]]] = [[[] for _ in row] for row in prompts]
        for _ in range(limit):
            tails = [
                [(tuple(p + s), 0, "") for p, s in zip(ps, ss, strict=True)]
                for ps, ss in zip(prompts, said, strict=True)
            ]
            data = packing.pack_ids([kept[r] for r in rows], tails, np.zeros(len(rows), dtype=bool))
            best = packing.next_tokens(model.decoder, data, tokens[list(rows)]).tolist()
            flat = iter(best)
            done = True
            for row in said:
                for answer in row:
                    token = next(flat)
                    if not answer or answer[-1] != 2:
                        answer.append(token)
                        done &= token == 2
            if done:
                break
        out += [[tokenizer.decode([t for t in answer if t != 2]).strip() for answer in row] for row in said]
    return out


def oracle(item: Item) -> np.ndarray:
    """64 patches: those of the objects asked about, filled up with background.

    Where the answer depends on no object in particular (an absent one), objects like it count, or all; if they have
    more than 64 patches, every object gives equally many, best covered first. Centers come first.
    """
    cover = coverage(item.scene)
    chosen = list(item.question.asked) or list(range(len(item.scene.things)))
    ranked = []
    for i in chosen:
        flat = np.where(cover[i] >= ON_OBJECT, cover[i], 0)
        flat[center_patch(item.scene, item.scene.things[i])] += 1
        flat = flat.reshape(-1)
        ranked.append([int(p) for p in np.argsort(-flat, kind="stable") if flat[p] > 0])
    kept: list[int] = []
    for place in range(max(map(len, ranked))):
        kept += [r[place] for r in ranked if place < len(r)]
    kept = kept[:KEEP]
    free = np.flatnonzero(cover.max(0).reshape(-1) == 0)
    fill = free[np.linspace(0, len(free) - 1, KEEP - len(kept)).astype(int)] if len(kept) < KEEP else []
    return np.sort(np.array([*kept, *fill]))


def template(question: str) -> str:
    """The question with what it names taken out."""
    for names, mark in ((COLORS, "COLOR"), (SHAPES, "SHAPE"), (WORDS, "WORD")):
        for name in names:
            question = question.replace(name, mark)
    return question


def blind_answers(items: list[Item]) -> list[str]:
    """The best answers that ignore the picture: per template the best of the majority answer and of a fixed choice from
    the words of the prompt (first or second alternative, first or last OCR token). Chosen with the right answers at
    hand, so it is an upper bound."""
    groups = defaultdict(list)
    for place, item in enumerate(items):
        groups[item.benchmark, template(item.question.question)].append(place)
    out = [""] * len(items)
    for places in groups.values():
        truth = [items[p].question.answer for p in places]
        guesses = [[Counter(truth).most_common(1)[0][0]] * len(places)]
        for pick in (0, -1):
            if all(items[p].question.ocr for p in places):
                guesses.append([items[p].question.ocr[pick] for p in places])
            if all(" or " in items[p].question.question for p in places):
                words = [[w.strip("?") for w in items[p].question.question.split()] for p in places]
                named = [[w for w in ws if w in (*COLORS, "left", "right", "top", "bottom")] for ws in words]
                guesses.append([n[pick] for n in named])
        best = max(guesses, key=lambda guess: sum(g == t for g, t in zip(guess, truth, strict=True)))
        for place, answer in zip(places, best, strict=True):
            out[place] = answer
    # POPE is scored by F1, where "Yes" to everything is the best constant.
    return ["Yes" if item.benchmark == "pope" else answer for item, answer in zip(items, out, strict=True)]


def score(items: list[Item], answers: list[str], data: Path = DATA) -> dict[str, dict[str, float]]:
    """Per benchmark `score` (percent of the maximum of its metric) and `accuracy` (percent of right answers)."""
    result = {}
    for name, scorer in zip(ARENA, SCORERS, strict=True):
        lines = [
            {"question_id": i.line["question_id"], "prompt": i.line["text"], "text": a}
            for i, a in zip(items, answers, strict=True)
            if i.benchmark == name
        ]
        if lines:
            value = scorer.score(data, lines)
            scale = 10.0 if name == "mme" else 1.0  # five subtasks of 200
            result[name] = {"score": round(value.score / scale, 2), "accuracy": round(value.accuracy, 2)}
    return result


def answer_all(model: TinyLlava, items: list[Item], setting: str, seed: int = 0) -> list[str]:
    """Answers of the model to all items. `setting`: dense, blank (dense, with a blank behind the prompt, as other
    programs write it), oracle, random or cls."""
    pictures = {(i.benchmark, i.image): i.scene for i in items}
    names = list(pictures)
    tokens, attention = encode(model, list(pictures.values()))
    place = {name: k for k, name in enumerate(names)}
    if setting in ("dense", "blank", "cls"):
        every = np.arange(GRID * GRID)
        kept = [
            np.sort(attention[k].topk(KEEP).indices.numpy()) if setting == "cls" else every for k in range(len(names))
        ]
        where: list[list[int]] = [[] for _ in names]
        for number, item in enumerate(items):
            where[place[item.benchmark, item.image]].append(number)
        questions = [[items[n].line["text"] for n in row] for row in where]
        answers = generate(model, tokens, kept, questions, end=" " if setting == "blank" else "")
        flat = {n: a for row, said in zip(where, answers, strict=True) for n, a in zip(row, said, strict=True)}
        return [flat[n] for n in range(len(items))]
    rng = np.random.default_rng([64, seed])
    kept = [oracle(i) if setting == "oracle" else np.sort(rng.permutation(GRID * GRID)[:KEEP]) for i in items]
    index = [place[i.benchmark, i.image] for i in items]
    answers = generate(model, tokens[index], kept, [[i.line["text"]] for i in items], batch=32)
    return [a[0] for a in answers]


def looking(model: TinyLlava, pictures: list[Scene]) -> dict[str, float]:
    """Where the CLS attention of the selected layer ranks patches, and how much of the picture is object."""
    _, attention = encode(model, pictures)
    on = np.stack([(coverage(s) >= ON_OBJECT).any(0).reshape(-1) for s in pictures])
    top = attention.topk(KEEP, dim=1).indices.numpy()
    share = np.take_along_axis(on, top, axis=1).mean(1)
    mass = (attention.numpy() * on).sum(1)
    return {
        "top64_on_objects": round(float(share.mean()), 4),
        "attention_mass_on_objects": round(float(mass.mean()), 4),
        "area_of_objects": round(float(on.mean()), 4),
        "area_of_objects_max": round(float(on.mean(1).max()), 4),
        "pictures": len(pictures),
    }


def mean(scores: dict[str, dict[str, float]], key: str = "accuracy") -> float:
    """Mean over benchmarks."""
    return round(float(np.mean([s[key] for s in scores.values()])), 2)


def verdict(record: dict) -> dict[str, bool]:
    """Which thresholds the recorded figures meet."""
    bench, kept = record["benchmarks"], record["mean_accuracy"]
    margin = min(b["dense"]["score"] - b["blind"]["score"] for b in bench.values())
    values = (
        kept["dense"] >= 85,
        margin >= 30,
        record["attention"]["top64_on_objects"] >= 0.70,
        record["attention"]["area_of_objects_max"] <= 1 / 3,
        kept["dense"] - kept["oracle"] < 2,
        kept["dense"] - kept["random"] >= 10,
        kept["dense"] - kept["blank"] < 1,
    )
    return dict(zip(THRESHOLDS, map(bool, values), strict=True))


def measure(model: TinyLlava, items: list[Item]) -> dict:
    """All figures, as they are recorded."""
    runs = {"blind": [blind_answers(items)]}
    runs |= {name: [answer_all(model, items, name)] for name in ("dense", "blank", "oracle", "cls")}
    runs["random"] = [answer_all(model, items, "random", seed) for seed in range(RANDOM_DRAWS)]
    scored = {name: [score(items, answers) for answers in several] for name, several in runs.items()}
    bench: dict[str, dict] = {}
    for name in ARENA:
        bench[name] = {"questions": sum(i.benchmark == name for i in items)}
        for run, several in scored.items():
            bench[name][run] = {
                k: round(float(np.mean([s[name][k] for s in several])), 2) for k in ("score", "accuracy")
            }
    wrong = Counter(i.question.kind for i, a in zip(items, runs["dense"][0], strict=True) if a != i.question.answer)
    total = Counter(i.question.kind for i in items)
    return {
        "benchmarks": bench,
        "mean_accuracy": {run: mean({n: bench[n][run] for n in ARENA}) for run in runs},
        "mean_score": {run: mean({n: bench[n][run] for n in ARENA}, "score") for run in runs},
        "by_kind_dense": {k: round(100 * (1 - wrong[k] / n), 1) for k, n in sorted(total.items())},
        "attention": looking(model, list({(i.benchmark, i.image): i.scene for i in items}.values())),
    }


def table(record: dict) -> str:
    """The figures as a markdown table."""
    runs = ("dense", "blank", "blind", "oracle", "cls", "random")
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---:|" * len(runs)]
    for name, values in record["benchmarks"].items():
        lines.append(f"| {name}, score | " + " | ".join(f"{values[r]['score']:.1f}" for r in runs) + " |")
        lines.append(f"| {name}, accuracy | " + " | ".join(f"{values[r]['accuracy']:.1f}" for r in runs) + " |")
    for key, label in (("mean_score", "mean score"), ("mean_accuracy", "mean accuracy")):
        lines.append(f"| **{label}** | " + " | ".join(f"{record[key][r]:.1f}" for r in runs) + " |")
    return "\n".join(lines)


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the recorded figures with the thresholds")
    args = parser.parse_args()
    if args.check:
        record = json.loads(RECORD.read_text())
    else:
        ensure()
        start = time.time()
        record = measure(load(), build_all(ARENA).items)
        record["thresholds"] = THRESHOLDS
        record["measured"] = {
            "threads": torch.get_num_threads(),
            "seconds": round(time.time() - start),
            "dtype": "float32",
        }
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    print(json.dumps({k: record[k] for k in ("attention", "by_kind_dense")}, indent=1))
    met = verdict(record)
    for name, good in met.items():
        print("ok  " if good else "MISS", name, THRESHOLDS[name])
    if not all(met.values()):
        raise UserError(f"{RECORD}: the figures miss {sum(not m for m in met.values())} threshold(s)")


if __name__ == "__main__":
    main()
