"""The comparison of many methods and budgets: which settings and questions the flags name, and what is written.

A preset of the experiment in `experiment`; `demo` is the other one. Figures are computed in `results`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llava.eval.answering.loading import load_adapter
from llava.eval.answering.loop import Interrupts
from llava.eval.answering.metadata import checkpoint_fingerprint
from llava.eval.common.arguments import (
    GenerationOptions,
    Parser,
    add_model_arguments,
    check_budget,
    check_range,
    split_names,
)
from llava.eval.common.budgets import BUDGETS_HELP, Budget, parse_budgets, parse_ratios
from llava.eval.common.jsonio import read_json, require_folder, write_json, write_text_atomic
from llava.eval.common.outputs import PICTURE, TABLE_MARKDOWN, JsonObject, OutputFolder, Text
from llava.eval.common.questions import most_images, read_questions, spread
from llava.eval.reports.bootstrap import LEVEL, MAX_RESAMPLES, RESAMPLES
from llava.eval.reports.comparison_tables import csv_table, markdown_report
from llava.eval.reports.defaults import DEFAULT_BUDGETS, MAX_NEW_TOKENS
from llava.eval.reports.differences import credits_path
from llava.eval.reports.results import collect, credits_csv, make_rows
from llava.eval.reports.settings import Setting, Variant, ablation_variants, make_settings, read_variants
from llava.eval.tasks.registry import COMPARED
from llava.places import RESULTS
from llava.tiny import BENCHMARKS, CHECKPOINT, make_benchmarks
from llava.utils import INCOMPLETE_STATUS, UserError

OUTPUT = OutputFolder(
    {
        "run.json": JsonObject("the description of a comparison", ("model", "torch")),
        "compare.json": JsonObject("a comparison", ("run", "benchmarks", "rows")),
        "compare.md": TABLE_MARKDOWN,
        "compare.csv": Text("the figures of a comparison", "variant,group,budget,method,"),
        "compare.credits.csv": Text("the credits of a comparison", "benchmark,question_id,"),
        "compare.png": PICTURE,
    }
)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = Parser(
        prog="python -m llava.eval.compare",
        description="Many pruning methods and budgets on the same questions: one table with intervals, one plot.",
    )
    add_model_arguments(parser, default=str(CHECKPOINT))
    group = parser.add_argument_group("settings")
    group.add_argument("--methods", default=None, help="pruning methods by commas, or all; dense is always there")
    group.add_argument(
        "--ablations", nargs="?", const="", default=None, metavar="GROUPS",
        help="ready variants of AutoPrune: groups by commas (parts, x0, k0, gamma), all if none is named",
    )  # fmt: skip
    group.add_argument("--variants", default=None, metavar="FILE", help="JSON or YAML list of label, method, options")
    default = ",".join(map(str, DEFAULT_BUDGETS))
    group.add_argument("--budgets", default=None, help=f"{BUDGETS_HELP} (default: {default})")
    group.add_argument(
        "--target-ratio", default=None, metavar="R,...", help="shares as budgets, by commas, instead of --budgets"
    )
    group.add_argument(
        "--budget", choices=("nominal", "processed", "both"), default="nominal",
        help="which mean of tokens meets the budget; both: one after the other where a method can tell them apart",
    )  # fmt: skip
    group = parser.add_argument_group("questions")
    names = ", ".join(task.key for task in COMPARED)
    group.add_argument("--data-dir", default=str(BENCHMARKS), help="benchmark data, upstream's layout")
    group.add_argument("--benchmarks", default=None, help=f"by commas: {names}; default: those that are there")
    group.add_argument("--question-file", default=None, help="any question file instead of the benchmarks (no truth)")
    group.add_argument("--image-folder", default=None, help="images of --question-file")
    group.add_argument("--limit", type=int, default=0, help="questions per benchmark, spread over it; 0: all of them")
    group = parser.add_argument_group("running")
    group.add_argument("--output-dir", type=OUTPUT, default=str(RESULTS / "compare"), help="answers, table, plot")
    group.add_argument("--conv-mode", default="vicuna_v1", help="name of the conversation template")
    group.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="tokens per answer at most")
    group.add_argument("--batch-size", type=int, default=8, help="questions per forward pass")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the answers that are already there; --no-resume starts over",
    )
    group.add_argument("--overwrite", dest="resume", action="store_false", help="start over")
    group.add_argument("--quiet", action="store_true", help="no progress, only what was skipped and the results")
    group.add_argument("--resamples", type=int, default=RESAMPLES, help="bootstrap samples of the intervals")
    group.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    group.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw compare.png")
    return parser


def run(args: argparse.Namespace) -> int:
    """Answers what is missing, then writes the tables; returns the exit status."""
    check_range("--batch-size", args.batch_size, 1)
    check_range("--limit", args.limit, 0)
    check_range("--resamples", args.resamples, 100, MAX_RESAMPLES)
    check_range("--seed", args.seed, 0)
    settings = available_settings(args)
    sets = chosen_sets(args)

    from llava.eval.answering.answerer import check_conv_mode
    from llava.eval.reports.experiment import Experiment
    from llava.mm_utils import get_model_name_from_path

    check_conv_mode(args.conv_mode)
    output = Path(args.output_dir)
    options = {"conv_mode": args.conv_mode, **asdict(GenerationOptions(max_new_tokens=args.max_new_tokens))}
    # New weights under an old name are another model.
    options["checkpoint"] = (checkpoint_fingerprint(args.model_path, args.model_base) or "")[:16]
    model_id = get_model_name_from_path(args.model_path)
    experiment = Experiment(settings, sets, output / "answers", model_id, options, args.resume)
    started = time.perf_counter()
    skipped = 0
    if experiment.pending:
        try:
            with Interrupts():
                skipped = answer_missing(args, experiment)
        except KeyboardInterrupt:
            print(
                f"interrupted: {experiment.pending} answers are still missing; run the same command again to continue",
                file=sys.stderr,
            )
            raise
    else:
        print("all answers are already there", file=sys.stderr)

    benchmarks = [
        collect(asked.name, asked.questions, [cell.path for cell in cells], asked.grade)
        for asked, cells in zip(sets, experiment.cells, strict=True)
    ]
    result = {
        "run": {
            **read_json(output / "run.json", "run description"),
            "budget": args.budget,
            "resamples": args.resamples,
            "seed": args.seed,
            "level": LEVEL,
        },
        "benchmarks": [
            {"name": b.name, "answered": len(b.questions), "available": s.available, "graded": b.grade is not None}
            for b, s in zip(benchmarks, sets, strict=True)
        ],
        "rows": make_rows(settings, benchmarks, args.resamples, args.seed),
    }
    write_results(result, credits_csv(settings, benchmarks), output, args)
    print(f"took {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return INCOMPLETE_STATUS if skipped else 0


def chosen_variants(args: argparse.Namespace) -> list[Variant]:
    """What --methods, --ablations and --variants name together; AutoPrune if they name nothing."""
    from llava.pruning import list_methods

    variants: list[Variant] = []
    if args.ablations is not None:
        variants += ablation_variants(split_names(args.ablations))
    if args.variants is not None:
        variants += read_variants(args.variants)
    methods = args.methods if args.methods is not None or variants else "autoprune"
    if methods is not None:
        names = list_methods() if methods == "all" else split_names(methods)
        if not names:
            raise UserError(f"--methods: names no method: {methods!r}")
        variants = [*(Variant(name, name) for name in names), *variants]
    return variants


def chosen_budgets(args: argparse.Namespace) -> list[Budget]:
    """What --budgets or --target-ratio names, or the default."""
    if args.target_ratio is not None:
        if args.budgets is not None:
            raise UserError("--budgets and --target-ratio are two ways to give the budgets: --budgets takes shares too")
        return parse_ratios(args.target_ratio)
    return list(DEFAULT_BUDGETS) if args.budgets is None else parse_budgets(args.budgets)


def available_settings(args: argparse.Namespace) -> list[Setting]:
    """The settings; ablations of options that AutoPrune does not have are left out, and named."""
    from llava.pruning import get_method

    variants = chosen_variants(args)
    if args.ablations is not None:
        known = set(get_method("autoprune").options())
        for variant in ablation_variants([]):
            if variant in variants and not set(variant.options) <= known:
                print(f"left out: {variant.label} (this version of AutoPrune has no such option)", file=sys.stderr)
                variants.remove(variant)
    return make_settings(variants, chosen_budgets(args), args.budget)


def chosen_sets(args: argparse.Namespace) -> list[Any]:
    """The benchmarks, or the question file, of the flags, as `QuestionSet`s."""
    from llava.eval.reports.experiment import QuestionSet

    limit = args.limit or None
    if args.question_file is not None:
        if args.benchmarks is not None:
            raise UserError("--question-file and --benchmarks exclude each other")
        questions = read_questions(args.question_file)
        folder = Path(args.image_folder or ".")
        if any(question.image is not None for question in questions):
            require_folder(folder, "image folder")
        name = Path(args.question_file).stem
        return [QuestionSet(name, name, spread(questions, limit), len(questions), folder)]
    make_benchmarks(args.data_dir)
    data_dir = require_folder(args.data_dir, "data folder")
    known = {task.key: task for task in COMPARED}
    if args.benchmarks is None:
        chosen = [task for task in COMPARED if task.questions_path(data_dir).is_file()]
        if not chosen:
            raise UserError(f"--data-dir: holds no benchmark in upstream's layout: {data_dir}")
    else:
        keys = list(dict.fromkeys(name.lower() for name in split_names(args.benchmarks)))
        unknown = [key for key in keys if key not in known]
        if unknown or not keys:
            raise UserError(f"--benchmarks: unknown benchmark {', '.join(unknown)!r}; known: {', '.join(known)}")
        chosen = [known[key] for key in keys]
    sets = []
    for task in chosen:
        asked = task.ask(data_dir)
        questions, available = spread(asked.questions, limit), len(asked.questions)
        folder, grade = task.images_path(data_dir), task.grader(data_dir)
        sets.append(QuestionSet(task.title, task.key, questions, available, folder, asked.answerer, grade))
    return sets


def answer_missing(args: argparse.Namespace, experiment: Any) -> int:
    """Loads the model and answers what the experiment lacks; returns the number of questions left out."""
    from llava.eval.answering.answerer import Answerer
    from llava.eval.reports.experiment import describe_conditions

    # One input for all settings: tiles are joined as pruning wants them, for dense too.
    args.method = next((s.method.name for s in experiment.settings if s.budget is not None), "dense")
    adapter = load_adapter(args, args.conv_mode)
    most = max((most_images(asked.questions) for asked in experiment.sets), default=1)
    for setting in experiment.settings:
        check_budget(setting.method, adapter.most_visual_tokens(), most, "--budgets")
    write_json(Path(args.output_dir) / "run.json", describe_conditions(args.model_path, args.batch_size, adapter.model))
    generation = GenerationOptions(max_new_tokens=args.max_new_tokens)
    make_answerer = partial(Answerer, adapter, generation=generation)
    return experiment.answer_missing(make_answerer, args.batch_size, args.quiet)


def write_results(result: Mapping[str, Any], credits: str, output: Path, args: argparse.Namespace) -> None:
    """compare.json, .md, .csv and .png and the credits of all questions; the table also on stdout."""
    report = markdown_report(result)
    print(f"\n{report}\n")
    write_json(output / "compare.json", result)
    write_text_atomic(output / "compare.md", report + "\n")
    write_text_atomic(output / "compare.csv", csv_table(result))
    write_text_atomic(credits_path(output / "compare.json"), credits)
    written = ["compare.json", "compare.md", "compare.csv", "compare.credits.csv"]
    if args.plot and len(result["rows"]) > 1:
        from llava.eval.reports.comparison_plots import plot_accuracy, plot_variants

        plot = plot_accuracy if args.ablations is None else plot_variants
        try:
            plot(result, output / "compare.png")
            written.append("compare.png")
        except UserError as error:  # no matplotlib: the figures are there all the same
            print(f"no plot: {error}", file=sys.stderr)
    for name in written:
        print(f"wrote {output / name}")
