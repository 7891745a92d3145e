"""The main job on the embedded default: dense and pruned LLaVA on the four miniature benchmarks.

    python -m llava.eval.demo --output-dir results/demo

Knows which settings are compared and how they are measured fairly; answering is in `runner`, scoring in
`benchmarks`, the table in `table`, the pictures in `demo_plots`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.eval.answering import load_model, max_visual_tokens
from llava.eval.arguments import DTYPES, GenerationOptions, Parser, check_budget
from llava.eval.benchmarks import BENCHMARKS, Benchmark, spread
from llava.eval.jsonio import require_folder, write_json, write_text_atomic
from llava.eval.questions import Question, read_questions
from llava.eval.table import markdown_report, retained_percent
from llava.utils import UserError, cli_main

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_BUDGETS = (192, 128, 64)
DEFAULT_BATCH_SIZE = 8
# Answers are a word or a letter; the bound only matters for a model that does not stop.
MAX_NEW_TOKENS = 16


@dataclass
class Setting:
    """One row of the table: a method, its answers by benchmark, its timings and sums over all samples."""

    label: str
    method: Any
    statistics: Any
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    batch_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """One sample at the smallest budget, for the pictures."""

    benchmark: Benchmark
    question: Question
    answer: str
    trace: Any


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
    return [Setting("dense", dense, Statistics()), *pruned]


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def run_benchmark(
    answerer: Any, benchmark: Benchmark, questions: Sequence[Question], settings: Sequence[Setting], batch_size: int
) -> list[Example]:
    """Answers the questions under every setting, batch by batch, and returns the examples of the last setting.

    The settings take turns on each batch, in an order that rotates, so that whatever else the machine does
    meets all of them alike.
    """
    examples = []
    progress = tqdm(total=len(questions), desc=benchmark.name, unit="q", mininterval=2.0, file=sys.stderr)
    # Prompts of one length share a batch: less padding, and the attention kernels run without a mask.
    samples = sorted((answerer.prepare(question) for question in questions), key=lambda s: len(s.input_ids))
    with progress:
        for number, chunk in enumerate(batches(samples, batch_size)):
            # What comes before the decoder is the same for all settings; prefill times do not include it.
            encoded = answerer.encode(chunk, with_cls_attention=True)
            for turn in range(len(settings)):
                setting = settings[(number + turn) % len(settings)]
                with setting.method.attach(answerer.model) as run:
                    answered = answerer.generate(encoded, run)
                setting.batch_ms.append(1000 * answered[0].prefill_seconds)
                for item in answered:
                    setting.statistics.add(item)
                    setting.answers.setdefault(benchmark.name, []).append(
                        {"question_id": item.question.id, "prompt": item.question.text, "text": item.text}
                    )
                if setting is settings[-1]:
                    examples += [Example(benchmark, item.question, item.text, item.trace) for item in answered]
            progress.update(len(chunk))
    return examples


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


def describe_run(args: argparse.Namespace, model: Any, visual_tokens: float) -> dict[str, Any]:
    """Under which conditions the table was measured."""
    import torch
    import transformers

    device = model.device
    return {
        "model": Path(args.model_path).name,
        "visual_tokens": visual_tokens,
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

    started = time.perf_counter()
    tokenizer, model, image_processor, _ = load_model(args)
    for setting in settings:
        check_budget(setting.method, max_visual_tokens(model))
    examples: list[Example] = []
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
            examples += run_benchmark(answerer, benchmark, questions[benchmark.name], settings, args.batch_size)
        except SampleError as error:
            raise UserError(f"{benchmark.name}: {error}") from None

    result = {
        "run": describe_run(args, model, settings[0].statistics.means()["visual"]),
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
