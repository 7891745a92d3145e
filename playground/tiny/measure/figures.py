"""How well a tiny LLaVA does on the miniature benchmarks, and how well one does without looking.

    python -m playground.tiny.measure.figures                 # answers everything, some minutes; writes figures.json
    python -m playground.tiny.measure.figures --model-path DIR --benchmarks scienceqa,seed_bench
    python -m playground.tiny.measure.figures --model-path DIR --wide --merge spatial    # large pictures

The model answers through the tools of `llava.eval`, as in the scripts, and their scorers score. Image-blind is what one
answers who knows the training questions but not the picture.
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import read_json, write_json
from llava.eval.common.outputs import JsonObject
from llava.eval.tasks import mmbench, mmvet, science_qa, seed
from llava.eval.tasks.registry import DEMO as SCORERS
from llava.eval.tasks.registry import get_task
from llava.utils import UserError, cli_main
from playground.tiny.build.benchmarks import ARENA, BUILDERS, DATA, DATA_WIDE, build_all, build_wide
from playground.tiny.build.ensure import ensure
from playground.tiny.build.items import Item
from playground.tiny.measure.grade_mmvet import grade_all
from playground.tiny.train import text
from playground.tiny.train.common import train_rng
from playground.tiny.world import chinese, formats, questions
from playground.tiny.world.questions import NUMBERS, Question
from playground.tiny.world.scenes import COLORS, SHAPES, WORDS, sample_scene

FIGURES = JsonObject("figures of a checkpoint", values=dict)
NAMES = (*chinese.COLOR.values(), *chinese.SHAPE.values(), *COLORS, *SHAPES, *WORDS, *NUMBERS)
NEW = tuple(name for name in BUILDERS if name not in ARENA)
WIDE = ("textvqa", "gqa")
LETTERED = "--single-pred-prompt"
FLAGS = {"scienceqa": (LETTERED,), "mmbench": (LETTERED,), "mmbench_cn": (LETTERED, "--lang", "cn")}


def score(name: str, answers: Sequence[dict], data: Path = DATA) -> dict[str, float]:
    """The figures of a benchmark in percent, by the scorers of `llava.eval`.

    answers: `question_id`, `prompt`, `text`. LLaVA-Bench, which has no figure without a grader: how often the answer is
    the reference.
    """
    answers = list(answers)
    if name in ARENA:
        return {"accuracy": SCORERS[ARENA.index(name)].score(data, answers).accuracy}
    if name in ("vqav2", "vizwiz"):
        return {"accuracy": get_task(name).score(data, answers).accuracy}
    if name == "scienceqa":
        problems, ids = science_qa.load_problems(str(data / "scienceqa"))
        result = science_qa.evaluate_science_qa(problems, ids, answers)
        return {"accuracy": result["accuracy"], "with a picture": result["img_accuracy"]}
    if name in ("mmbench", "mmbench_cn"):
        result = mmbench.evaluate_mmbench(mmbench.load_rows(str(get_task(name).questions_path(data))), answers)
        return {"single pass": result["single_pass"], "circular": result["circular"]}
    texts = {str(answer["question_id"]): answer["text"] for answer in answers}
    if name == "seed_bench":
        entries, names = seed.load_seed(str(data / "seed_bench/SEED-Bench.json"))
        right, total = seed.seed_accuracy(entries, texts, names)["Total"]
        return {"accuracy": 100 * right / total}
    if name == "mm-vet":
        truth = json.loads((data / "mm-vet/mm-vet.json").read_text())
        grades = grade_all(truth, {f"v1_{key}": said for key, said in texts.items()})
        capabilities = {key: entry["capability"] for key, entry in truth.items()}
        result = mmvet.evaluate_mmvet(capabilities, {key: entry["score"] for key, entry in grades.items()})
        return {"total, graded by rule": result["total"]}
    lines = (data / "llava-bench-in-the-wild/answers_gpt4.jsonl").read_text().splitlines()
    reference = {str(entry["question_id"]): entry["text"] for entry in map(json.loads, lines)}
    same = [texts.get(key, "").strip() == said for key, said in reference.items()]
    return {"like the reference": 100 * sum(same) / len(same)}


def template(question: Question) -> str:
    """The question with what it names taken out."""
    text = re.sub("|".join(sorted(NAMES, key=len, reverse=True)), "*", question.question)
    return re.sub(r"\ban? \*", "a *", text)


@lru_cache(maxsize=1)
def habits(scenes: int = 400) -> tuple[dict[tuple[str, bool], Counter], dict[str, Counter], dict[str, Counter]]:
    """What training questions say about answers, by template: how often each answer is right; how often each option is
    offered, and how often it is then right."""
    answers, offered, right = defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    rng = train_rng("habits")
    short = [make for make, _ in questions.KINDS.values()]
    makers = [*short, *formats.CHOICES.values(), *chinese.CHOICES.values(), formats.vizwiz, formats.unanswerable]
    makers += [make for make, _ in formats.OPEN.values()]
    for _ in range(scenes):
        scene = sample_scene(rng, 5, 6, held_out=False)
        asked = [question for make in makers if (question := make(scene, rng)) is not None]
        for question in (*asked, *(formats.text_only(rng) for _ in range(5))):
            key = template(question) + question.note
            answers[key, bool(question.options)][question.target or question.answer] += 1
            for option in question.options:
                offered[key][option] += 1
            if question.options:
                right[key][question.options["ABCD".index(question.answer)]] += 1
    return dict(answers), dict(offered), dict(right)


def blind_answer(question: Question) -> str:
    """The answer that a reader of the training questions gives without the picture: the most frequent one to such a
    question, or the option that is most often right where it is offered."""
    answers, offered, right = habits()
    key = template(question) + question.note
    if question.options:
        rates = [right.get(key, {}).get(o, 0) / offered.get(key, {}).get(o, 1) for o in question.options]
        return "ABCD"[rates.index(max(rates))]
    found = answers.get((key, False))
    return found.most_common(1)[0][0] if found else "Yes"


def as_answers(items: Sequence[Item], said: Sequence[str]) -> list[dict]:
    """Answers as an answer file holds them."""
    return [
        {
            "question_id": item.line.get("question_id", item.line.get("id")),
            "prompt": ("<image>\n" if item.scene and "id" in item.line else "") + item.question.text,
            "text": answer,
        }
        for item, answer in zip(items, said, strict=True)
    ]


def model_answers(name: str, model: Path, out: Path, data: Path = DATA, flags: Sequence[str] = ()) -> list[dict]:
    """What the dense model answers, by the tool of the benchmark."""
    task = get_task(name)
    target = out / f"{name}.jsonl"
    argv = [
        "--model-path",
        str(model),
        "--question-file",
        str(task.questions_path(data)),
        "--answers-file",
        str(target),
    ]
    argv += ["--image-folder", str(task.images_path(data))] if task.image_folder is not None else []
    argv += ["--temperature", "0", "--conv-mode", "vicuna_v1", "--method", "dense", "--batch-size", "8"]
    run: Callable[[list[str]], object] = importlib.import_module(f"llava.eval.{task.tool}").main
    run([*argv, *FLAGS.get(name, ()), *flags])
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=text.CHECKPOINT, help="checkpoint (%(default)s)")
    parser.add_argument("--wide", action="store_true", help="the data of large pictures: data/eval_wide")
    parser.add_argument(
        "--benchmarks", help=f"names by commas (default: {','.join(NEW)}; with --wide {','.join(WIDE)})"
    )
    parser.add_argument("--merge", choices=("spatial", "spatial_unpad"), help="merge type of a 1.6 checkpoint")
    parser.add_argument(
        "--output", type=FIGURES, help="JSON that gets the figures (default: figures.json of the checkpoint)"
    )
    parser.add_argument("--limit", type=int, help="only the first questions of every benchmark")
    args = parser.parse_args(argv)
    known, data = (WIDE, DATA_WIDE) if args.wide else (tuple(BUILDERS), DATA)
    names = args.benchmarks.split(",") if args.benchmarks else list(WIDE if args.wide else NEW)
    for name in names:
        if name not in known:
            raise UserError(f"--benchmarks: {name!r} is none of {', '.join(known)}")
    flags = ("--mm-patch-merge-type", args.merge) if args.merge else ()
    flags += ("--limit", str(args.limit)) if args.limit else ()
    ensure()
    build = build_wide() if args.wide else build_all(tuple(names))
    label = f"{data.name}, {args.merge}" if args.merge else data.name
    target = Path(args.output or args.model_path / "figures.json")
    FIGURES.check(target)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            items = [item for item in build.items if item.benchmark == name][: args.limit]
            dense = score(name, model_answers(name, args.model_path, Path(folder), data, flags), data)
            blind = score(name, as_answers(items, [blind_answer(item.question) for item in items]), data)
            rounded = [{key: round(value, 2) for key, value in values.items()} for values in (dense, blind)]
            record = read_json(target, "figures") if target.is_file() else {}
            figures = {"prompts": len(items), "dense": rounded[0], "blind": rounded[1]}
            write_json(target, {**record, label: {**record.get(label, {}), name: figures}})
            for key, value in dense.items():
                print(f"| {name}, {key} | {len(items)} | {value:.1f} | {blind[key]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
