"""The main job on the embedded default: dense and pruned LLaVA on the four miniature benchmarks.

    python -m llava.eval.demo --output-dir results/demo

Knows which settings are compared and how they are measured fairly; answering is in `runner`, scoring in
`benchmarks`, the table in `table`, the pictures in `demo_plots`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.answering import load_model, max_visual_tokens
from llava.eval.arguments import DTYPES, GenerationOptions, Parser, check_budget
from llava.eval.benchmarks import BENCHMARKS, Benchmark, spread
from llava.eval.jsonio import require_folder, write_json, write_text_atomic
from llava.eval.progress import Progress
from llava.eval.questions import Question, read_questions
from llava.eval.table import markdown_report, retained_percent
from llava.utils import UserError, cli_main

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_BUDGETS = (192, 128, 64)
DEFAULT_BATCH_SIZE = 8
# Answers are a word or a letter; the bound only matters for a model that does not stop.
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Example:
    """One sample at the smallest budget, for the pictures."""

    benchmark: Benchmark
    question: Question
    answer: str
    trace: Any


@dataclass
class Setting:
    """One row of the table: a method, its answers by benchmark, its timings and sums over all samples."""

    label: str
    method: Any
    statistics: Any
    keeps_examples: bool = False
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    batch_ms: list[float] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    benchmark: Benchmark | None = None

    def wants(self, question: Question) -> bool:
        """Every question is new: the demo starts from nothing."""
        return True

    def add(self, answers: Sequence[Any]) -> None:
        """Takes the answers of one batch."""
        self.batch_ms.append(1000 * answers[0].prefill_seconds)
        for item in answers:
            self.statistics.add(item)
            self.answers.setdefault(self.benchmark.name, []).append(
                {"question_id": item.question.id, "prompt": item.question.text, "text": item.text}
            )
            if self.keeps_examples:
                self.examples.append(Example(self.benchmark, item.question, item.text, item.trace))


def build_parser() -> argparse.ArgumentParser:
    """All flags of the demo."""
    parser = Parser(description="Dense and AutoPrune on the miniature benchmarks: one table, two pictures.")
    tiny = ROOT / "playground" / "tiny"
    parser.add_argument("--model-path", default=str(tiny / "models" / "tiny-llava-v1.5"), help="checkpoint folder")
    parser.add_argument("--data-dir", default=str(tiny / "data" / "eval"), help="benchmark data, upstream's layout")
    parser.add_argument("--output-dir", default=str(ROOT / "results" / "demo"), help="where the results go")
    parser.add_argument("--method", default="autoprune", help="pruning method that is compared with dense")
    parser.add_argument("--budgets", default=",".join(map(str, DEFAULT_BUDGETS)), help="target tokens, by commas")
    parser.add_argument("--limit", type=int, default=0, help="questions per benchmark, spread over it; 0: all of them")
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH_SIZE, help="questions per forward pass")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--device", default=None, help="cuda, mps, cpu; default: the best there is")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--attn-implementation", default=None, help="eager, sdpa or flash_attention_2; default: sdpa")
    parser.set_defaults(model_base=None)
    return parser


def parse_budgets(text: str) -> list[int]:
    """`192,128,64` as numbers."""
    try:
        budgets = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        budgets = []
    if not budgets or min(budgets) < 1:
        raise UserError(f"--budgets: needs numbers of at least 1 separated by commas, got {text!r}")
    return budgets


def make_settings(method_name: str, budgets: Sequence[int]) -> list[Setting]:
    """Dense first, then the method at each budget."""
    from llava.eval.runner import Statistics
    from llava.pruning import get_method

    try:
        method_class = get_method(method_name)
        methods = [method_class.from_options({"target_tokens": budget}) for budget in budgets]
        dense = get_method("dense").from_options({})
    except ValueError as error:
        raise UserError(f"--method: {error}") from None
    name = getattr(method_class, "__name__", method_name)
    pruned = [Setting(f"{name} {budget}", m, Statistics()) for budget, m in zip(budgets, methods, strict=True)]
    pruned[-1].keeps_examples = True
    return [Setting("dense", dense, Statistics()), *pruned]


def make_rows(settings: Sequence[Setting], data_dir: Path) -> list[dict[str, Any]]:
    """Scores and costs of every setting; the first setting is what the others are relative to."""
    rows = []
    dense_scores: dict[str, float] = {}
    for setting in settings:
        scores = {b.name: b.score(data_dir, setting.answers[b.name]) for b in BENCHMARKS}
        published = {name: score.score for name, score in scores.items()}
        dense_scores = dense_scores or published
        means = setting.statistics.means()
        # Ratio within each batch, then the median: a disturbance during one batch does not spoil the mean.
        ratios = [own / dense for own, dense in zip(setting.batch_ms, settings[0].batch_ms, strict=True)]
        rows.append(
            {
                "label": setting.label,
                "method": setting.method.name,
                "options": asdict(setting.method),
                "scores": {name: asdict(score) for name, score in scores.items()},
                "mean_accuracy": statistics.fmean(score.accuracy for score in scores.values()),
                "retained": retained_percent(published, dense_scores),
                "tokens_nominal": means["nominal"],
                "tokens_processed": means["processed"],
                "flops_ratio": means["flops_ratio"],
                "prefill_ms": statistics.median(setting.batch_ms),
                "prefill_ratio": statistics.median(ratios),
            }
        )
    return rows


def describe_run(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Under which conditions a table was measured."""
    import torch
    import transformers

    device = model.device
    return {
        "model": Path(args.model_path).name,
        "batch_size": args.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    budgets = parse_budgets(args.budgets)
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--limit", args.limit, 0)):
        if value < least:
            raise UserError(f"{flag} must be at least {least}, got {value}")
    data_dir = require_folder(args.data_dir, "data folder")
    output = Path(args.output_dir)
    settings = make_settings(args.method, budgets)
    files = {b.name: read_questions(data_dir / b.question_file) for b in BENCHMARKS}
    questions = {name: spread(items, args.limit or None) for name, items in files.items()}

    from llava.eval.demo_plots import plot_retention_curves, plot_survivors
    from llava.eval.runner import Answerer, SampleError
    from llava.eval.turns import take_turns

    started = time.perf_counter()
    tokenizer, model, image_processor, _ = load_model(args)
    for setting in settings:
        check_budget(setting.method, max_visual_tokens(model))
    for number, benchmark in enumerate(BENCHMARKS):
        answerer = Answerer(
            tokenizer,
            model,
            image_processor,
            data_dir / benchmark.image_folder,
            generation=GenerationOptions(max_new_tokens=MAX_NEW_TOKENS),
            image_cache=len(questions[benchmark.name]),
        )
        try:
            if number == 0:
                warm_up(answerer, questions[benchmark.name][: args.batch_size], settings)
            for setting in settings:
                setting.benchmark = benchmark
            total = len(settings) * len(questions[benchmark.name])
            with Progress(total, benchmark.name, args.quiet, what="answers") as progress:
                take_turns(answerer, questions[benchmark.name], settings, args.batch_size, progress=progress)
        except SampleError as error:
            raise UserError(f"{benchmark.name}: {error}") from None

    examples = settings[-1].examples
    result = {
        "run": {**describe_run(args, model), "visual_tokens": settings[0].statistics.means()["visual"]},
        "benchmarks": [
            {
                "name": b.name,
                "metric": b.metric,
                "samples": len(questions[b.name]),
                "available": len(files[b.name]),
            }
            for b in BENCHMARKS
        ],
        "rows": make_rows(settings, data_dir),
    }
    report = markdown_report(result)
    print(f"\n{report}\n")
    write_json(output / "demo.json", result)
    write_text_atomic(output / "demo.md", report + "\n")
    written = ["demo.md", "demo.json"]
    if plot_survivors(examples, data_dir, model.config, image_processor, output / "survivors.png"):
        written.append("survivors.png")
    if plot_retention_curves(examples, budgets[-1], output / "retention.png"):
        written.append("retention.png")
    for name in written:
        print(f"wrote {output / name}")
    print(f"took {time.perf_counter() - started:.0f} s")


def warm_up(answerer: Any, questions: Sequence[Question], settings: Sequence[Setting]) -> None:
    """One untimed batch per setting: the first passes pay for allocations and kernel choice."""
    samples = [answerer.prepare(question) for question in questions]
    for setting in settings:
        with setting.method.attach(answerer.model) as run:
            answerer.answer(samples, run)


if __name__ == "__main__":
    main()
