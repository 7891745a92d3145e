"""The main job on the embedded default: dense and one pruned method on four miniature benchmarks.

A preset of the experiment in `experiment` that starts from nothing, measures prefill times batch by batch, and draws
single samples. `comparison` is the other preset.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llava.eval.answering.loading import load_adapter
from llava.eval.common.arguments import (
    DTYPE_HELP,
    DTYPES,
    GenerationOptions,
    Parser,
    check_budget,
    check_range,
    find_method,
)
from llava.eval.common.budgets import BUDGETS_HELP, Budget, parse_budgets
from llava.eval.common.jsonio import read_json, require_folder, write_json, write_text_atomic
from llava.eval.common.outputs import PICTURE, TABLE_MARKDOWN, JsonObject, OutputFolder
from llava.eval.common.questions import spread
from llava.eval.common.tables import markdown_table as pipe_table
from llava.eval.reports.defaults import DEFAULT_BUDGETS, MAX_NEW_TOKENS
from llava.eval.reports.look.html import REPORT, write_report
from llava.eval.reports.look.joined import choose, join
from llava.eval.reports.paper_tables import retained_percent
from llava.eval.reports.results import collect, costs
from llava.eval.reports.settings import Variant, make_settings
from llava.eval.tasks.registry import DEMO
from llava.places import RESULTS
from llava.schema import NUMBER, SCALAR, TEXT, Fields, ListOf, MapOf, check
from llava.tiny import BENCHMARKS, CHECKPOINT, make_benchmarks
from llava.utils import UserError

OUTPUT = OutputFolder(
    {
        "demo.json": JsonObject("a result of the demo", ("run", "benchmarks", "rows")),
        "demo.md": TABLE_MARKDOWN,
        "survivors.png": PICTURE,
        "retention.png": PICTURE,
        "report.html": REPORT,
    }
)

MARKER = "demo table"
REPORTED = 3000  # questions in the report: all of the miniature benchmarks
_COSTS = ("tokens_nominal", "tokens_processed", "flops_ratio")


def build_parser() -> argparse.ArgumentParser:
    """All flags of the demo."""
    parser = Parser(description="Dense and AutoPrune on the miniature benchmarks: one table, two pictures, a report.")
    parser.add_argument("--model-path", default=str(CHECKPOINT), help="checkpoint folder")
    parser.add_argument("--data-dir", default=str(BENCHMARKS), help="benchmark data, upstream's layout")
    parser.add_argument("--output-dir", type=OUTPUT, default=str(RESULTS / "demo"), help="where the results go")
    parser.add_argument("--method", default="autoprune", help="pruning method that is compared with dense")
    parser.add_argument("--budgets", default=",".join(map(str, DEFAULT_BUDGETS)), help=BUDGETS_HELP)
    parser.add_argument("--limit", type=int, default=0, help="questions per benchmark, spread over it; 0: all of them")
    parser.add_argument("--batch-size", type=int, default=8, help="questions per forward pass")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--device", default=None, help="cuda, mps, cpu; default: the best there is")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help=DTYPE_HELP)
    parser.add_argument("--attn-implementation", default=None, help="eager, sdpa or flash_attention_2; default: sdpa")
    parser.set_defaults(model_base=None)
    return parser


def run(args: argparse.Namespace) -> None:
    """Asks, scores, prints the table and draws the pictures."""
    budgets = parse_budgets(args.budgets)
    check_range("--batch-size", args.batch_size, 1)
    check_range("--limit", args.limit, 0)
    make_benchmarks(args.data_dir)
    data_dir = require_folder(args.data_dir, "data folder")
    title = getattr(find_method(args.method, "--method"), "__name__", args.method)
    settings = make_settings([Variant(title, args.method)], budgets, flag="--method")

    from llava.eval.answering.answerer import Answerer
    from llava.eval.reports.experiment import Experiment, QuestionSet, describe_conditions
    from llava.eval.reports.look.gathered import Gathered, answer_sets
    from llava.eval.reports.sample_plots import Example

    sets = []
    for task in DEMO:
        questions = task.read_questions(task.questions_path(data_dir))
        chosen = spread(questions, args.limit or None)
        sets.append(QuestionSet(task.title, task.key, chosen, len(questions), task.images_path(data_dir)))
    output = Path(args.output_dir)
    generation = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS)
    name = Path(args.model_path).name
    experiment = Experiment(settings, sets, output / "answers", name, asdict(generation), resume=False)
    examples: list[Example] = []
    gathered = []
    for row in experiment.cells:

        def draw_later(item: Any, asked: QuestionSet = row[0].asked) -> None:
            examples.append(Example(asked, item.question, item.text, item.trace))

        gathered.append([Gathered(cell, draw_later if cell is row[-1] else None) for cell in row])
    started = time.perf_counter()
    adapter = load_adapter(args)
    model = adapter.model
    for setting in settings:
        check_budget(setting.method, adapter.most_visual_tokens(), flag="--budgets")
    make_answerer = partial(Answerer, adapter, generation=generation)
    experiment.answer_missing(make_answerer, args.batch_size, args.quiet, strict=True)

    rows = make_rows(experiment, data_dir)
    conditions = describe_conditions(args.model_path, args.batch_size, model)
    result = {
        "run": {**conditions, "visual_tokens": rows[0].pop("tokens_visual")},
        "benchmarks": [
            {"name": task.title, "metric": task.metric, "samples": len(s.questions), "available": s.available}
            for task, s in zip(DEMO, sets, strict=True)
        ],
        "rows": rows,
    }
    report = markdown_report(result)
    print(f"\n{report}\n")
    write_json(output / "demo.json", result)
    write_text_atomic(output / "demo.md", report + "\n")
    written = ["demo.md", "demo.json"]
    try:
        written += draw(examples, adapter, budgets[-1], output)
    except UserError as error:  # no matplotlib: the figures are there all the same
        print(f"no pictures: {error}", file=sys.stderr)
    for file in written:
        print(f"wrote {output / file}")
    runs = join(answer_sets(gathered, DEMO, data_dir))
    write_report(output / "report.html", runs, choose(runs.entries, REPORTED), f"{name}: dense and {title}")
    print(f"took {time.perf_counter() - started:.0f} s")


def draw(examples: Sequence[Any], adapter: Any, budget: Budget, output: Path) -> list[str]:
    """Draws the pictures that these samples give; the names of their files."""
    from llava.eval.reports.sample_plots import plot_retention_curves, plot_survivors

    config, written = adapter.model.config, []
    anyres = getattr(config, "image_aspect_ratio", None) == "anyres"
    if adapter.family is not None or anyres or adapter.model.mixes_patches:
        print("no survivors.png: it is drawn where a picture is one square of patches, as in LLaVA-1.5")
    elif plot_survivors(examples, config, adapter.image_processor, output / "survivors.png"):
        written.append("survivors.png")
    targets = [e.trace.target_tokens for e in examples if e.trace.target_tokens is not None]
    # Of a share, what it is on average.
    target = budget if isinstance(budget, int) else round(statistics.fmean(targets or [1]))
    if plot_retention_curves(examples, target, output / "retention.png"):
        written.append("retention.png")
    return written


def make_rows(experiment: Any, data_dir: Path) -> list[dict[str, Any]]:
    """Scores and costs of every setting; the first setting is what the others are relative to.

    The first row also says how many visual tokens a prompt has.
    """
    collected = [
        collect(row[0].asked.name, row[0].asked.questions, [cell.path for cell in row]) for row in experiment.cells
    ]
    times = [[ms for row in experiment.cells for ms in row[i].batch_ms] for i in range(len(experiment.settings))]
    rows: list[dict[str, Any]] = []
    dense_scores: dict[str, float] = {}
    for i, setting in enumerate(experiment.settings):
        scores = {task.title: task.score(data_dir, c.records[i]) for task, c in zip(DEMO, collected, strict=True)}
        published = {name: score.score for name, score in scores.items()}
        dense_scores = dense_scores or published
        means = costs([record for c in collected for record in c.records[i]])
        # Ratio within each batch, then the median: a disturbance during one batch does not spoil the mean.
        ratios = [own / dense for own, dense in zip(times[i], times[0], strict=True)]
        rows.append(
            {
                "label": setting.label,
                "method": setting.method.name,
                "options": setting.method.settings(),
                "scores": {name: asdict(score) for name, score in scores.items()},
                "mean_accuracy": statistics.fmean(score.accuracy for score in scores.values()),
                "retained": retained_percent(published, dense_scores),
                **{key: means[key] for key in _COSTS},
                "prefill_ms": statistics.median(times[i]),
                "prefill_ratio": statistics.median(ratios),
            }
        )
        if i == 0:
            rows[0]["tokens_visual"] = means["tokens_visual"]
    return rows


_ROW = Fields(
    {
        "label": TEXT,
        "scores": MapOf(Fields({"score": NUMBER})),
        **dict.fromkeys(("mean_accuracy", "retained", "tokens_nominal", "tokens_processed"), NUMBER),
        **dict.fromkeys(("flops_ratio", "prefill_ratio", "prefill_ms"), NUMBER),
    }
)
_RUN = Fields(
    {
        "visual_tokens": NUMBER,
        **dict.fromkeys(("model", "batch_size", "device", "threads", "dtype", "torch", "transformers"), SCALAR),
    }
)
_BENCHMARK = Fields({"name": TEXT, "metric": TEXT, "samples": SCALAR, "available": SCALAR})
_RESULT = Fields({"benchmarks": ListOf(_BENCHMARK), "rows": ListOf(_ROW), "run": _RUN})


def read_result(path: str) -> dict[str, Any]:
    """A demo.json; `UserError` if it is something else."""
    result = read_json(path, "result file")
    if not isinstance(result, dict) or not {"benchmarks", "rows", "run"} <= set(result):
        raise UserError(f"{path}: not a result of llava.eval.demo")
    check(result, _RESULT, f"{path}: not a result of llava.eval.demo")
    for row in result["rows"]:
        missing = [b["name"] for b in result["benchmarks"] if b["name"] not in row["scores"]]
        if missing:
            raise UserError(f"{path}: not a result of llava.eval.demo: {row['label']} has no {missing[0]!r}")
    return result


def markdown_table(result: Mapping[str, Any]) -> str:
    """The table of a result: one row per setting, the first one dense."""
    benchmarks = result["benchmarks"]
    header = ["", *(f"{b['name']} ({b['metric']})" for b in benchmarks), "mean accuracy", "retained"]
    header += ["tokens, nominal", "tokens, processed", "FLOPs", "prefill time"]
    return pipe_table(header, [_cells(row, benchmarks) for row in result["rows"]])


def _cells(row: Mapping[str, Any], benchmarks: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        row["label"],
        *(f"{row['scores'][b['name']]['score']:.1f}" for b in benchmarks),
        f"{row['mean_accuracy']:.1f}%",
        f"{row['retained']:.1f}%",
        f"{row['tokens_nominal']:.1f}",
        f"{row['tokens_processed']:.1f}",
        f"{100 * row['flops_ratio']:.1f}%",
        f"{100 * row['prefill_ratio']:.1f}% ({row['prefill_ms']:.1f} ms)",
    ]


def markdown_report(result: Mapping[str, Any]) -> str:
    """Table and, below it, what was measured on what."""
    run = result["run"]
    counts = ", ".join(f"{b['name']} {b['samples']} of {b['available']}" for b in result["benchmarks"])
    return (
        f"{markdown_table(result)}\n\n"
        f"Model `{run['model']}`, questions answered: {counts}. Mean accuracy: share of right answers, averaged over "
        "the benchmarks (TextVQA: soft accuracy). Retained: mean of score / dense score. Tokens: visual tokens per "
        f"decoder layer, of {run['visual_tokens']:.0f}; FLOPs: decoder prefill from processed tokens, "
        "relative to dense. "
        f"Prefill time: decoder with selection, per sample, relative to dense; median over interleaved batches of "
        f"{run['batch_size']} on {run['device']} ({run['threads']} threads, {run['dtype']}, torch {run['torch']}, "
        f"transformers {run['transformers']})."
    )
