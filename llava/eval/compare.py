"""Many methods and budgets on the miniature benchmarks or on any question file: one model, one table, one plot.

    python -m llava.eval.compare --methods autoprune,fastv,random --budgets 192,128,64 --output-dir results/compare
    python -m llava.eval.compare --ablations --budgets 128,64 --output-dir results/ablations
    python -m llava.eval.compare --methods fastv --budgets 64 --question-file q.jsonl --image-folder images

Knows the command line; answers are kept in `cells`, turns taken in `turns`, figures computed in `compare_report`.
Exit status: 0 all answered, 2 wrong input, 3 some images could not be read.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.eval.answering import load_model, max_visual_tokens
from llava.eval.arguments import GenerationOptions, Parser, add_model_arguments, check_budget
from llava.eval.benchmarks import COMPARED, Asked, spread
from llava.eval.bootstrap import LEVEL, RESAMPLES
from llava.eval.cells import Cell, Task, file_name
from llava.eval.compare_differences import credits_path
from llava.eval.compare_report import collect, credits_csv, csv_table, make_rows, markdown_report
from llava.eval.demo import DEFAULT_BUDGETS, MAX_NEW_TOKENS, ROOT, describe_run, parse_budgets
from llava.eval.evaluation import INCOMPLETE_STATUS
from llava.eval.interrupts import Interrupts
from llava.eval.jsonio import read_json, require_folder, write_json, write_text_atomic
from llava.eval.progress import Progress
from llava.eval.questions import Question, read_questions
from llava.eval.run_metadata import checkpoint_fingerprint
from llava.eval.variants import Setting, Variant, ablation_variants, make_settings, read_variants
from llava.utils import UserError, cli_main

CACHED_IMAGES = 256


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = Parser(
        prog="python -m llava.eval.compare",
        description="Many pruning methods and budgets on the same questions: one table with intervals, one plot.",
    )
    tiny = ROOT / "playground" / "tiny"
    add_model_arguments(parser, default=str(tiny / "models" / "tiny-llava-v1.5"))
    group = parser.add_argument_group("settings")
    group.add_argument("--methods", default=None, help="pruning methods by commas, or all; dense is always there")
    group.add_argument(
        "--ablations", nargs="?", const="", default=None, metavar="GROUPS",
        help="ready variants of AutoPrune: groups by commas (parts, x0, k0, gamma), all if none is named",
    )  # fmt: skip
    group.add_argument("--variants", default=None, metavar="FILE", help="JSON or YAML list of label, method, options")
    group.add_argument("--budgets", default=",".join(map(str, DEFAULT_BUDGETS)), help="target tokens, by commas")
    group.add_argument(
        "--budget", choices=("nominal", "processed"), default="nominal", help="which mean of tokens meets the budget"
    )
    group = parser.add_argument_group("questions")
    names = ", ".join(benchmark.key for benchmark in COMPARED)
    group.add_argument("--data-dir", default=str(tiny / "data" / "eval"), help="benchmark data, upstream's layout")
    group.add_argument("--benchmarks", default=None, help=f"by commas: {names}; default: those that are there")
    group.add_argument("--question-file", default=None, help="any question file instead of the benchmarks (no truth)")
    group.add_argument("--image-folder", default=None, help="images of --question-file")
    group.add_argument("--limit", type=int, default=0, help="questions per benchmark, spread over it; 0: all of them")
    group = parser.add_argument_group("running")
    group.add_argument("--output-dir", default=str(ROOT / "results" / "compare"), help="answers, table, plot")
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


def chosen_variants(args: argparse.Namespace) -> list[Variant]:
    """What --methods, --ablations and --variants name together; AutoPrune if they name nothing."""
    from llava.pruning import list_methods

    variants: list[Variant] = []
    if args.ablations is not None:
        variants += ablation_variants([part.strip() for part in args.ablations.split(",") if part.strip()])
    if args.variants is not None:
        variants += read_variants(args.variants)
    methods = args.methods if args.methods is not None or variants else "autoprune"
    if methods is not None:
        names = list_methods() if methods == "all" else [part.strip() for part in methods.split(",") if part.strip()]
        if not names:
            raise UserError(f"--methods: names no method: {methods!r}")
        variants = [*(Variant(name, name) for name in names), *variants]
    return variants


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
    return make_settings(variants, parse_budgets(args.budgets), args.budget)


def chosen_tasks(args: argparse.Namespace) -> list[Task]:
    """The benchmarks, or the question file, of the flags."""
    if args.question_file is not None:
        if args.benchmarks is not None:
            raise UserError("--question-file and --benchmarks exclude each other")
        questions = read_questions(args.question_file)
        folder = Path(args.image_folder or ".")
        if any(question.image is not None for question in questions):
            require_folder(folder, "image folder")
        name = Path(args.question_file).stem
        return [Task(name, name, spread(questions, args.limit or None), len(questions), folder)]
    data_dir = require_folder(args.data_dir, "data folder")
    known = {benchmark.key: benchmark for benchmark in COMPARED}
    if args.benchmarks is None:
        chosen = [b for b in COMPARED if (data_dir / b.question_file).is_file()]
        if not chosen:
            raise UserError(f"--data-dir: holds no benchmark in upstream's layout: {data_dir}")
    else:
        keys = list(dict.fromkeys(part.strip().lower() for part in args.benchmarks.split(",") if part.strip()))
        unknown = [key for key in keys if key not in known]
        if unknown or not keys:
            raise UserError(f"--benchmarks: unknown benchmark {', '.join(unknown)!r}; known: {', '.join(known)}")
        chosen = [known[key] for key in keys]
    tasks = []
    for b in chosen:
        asked: Asked = b.ask(data_dir)
        questions = spread(asked.questions, args.limit or None)
        folder = data_dir / b.image_folder
        tasks.append(Task(b.name, b.key, questions, len(asked.questions), folder, asked.answerer, b.grader(data_dir)))
    return tasks


def make_cells(args: argparse.Namespace, settings: Sequence[Setting], tasks: Sequence[Task]) -> list[list[Cell]]:
    """Task by task, a cell per setting; refuses answers of another run and folders that cannot be written."""
    from llava.mm_utils import get_model_name_from_path

    options = {"conv_mode": args.conv_mode, **asdict(GenerationOptions(max_new_tokens=args.max_new_tokens))}
    # New weights under an old name are another model.
    options["checkpoint"] = (checkpoint_fingerprint(args.model_path, args.model_base) or "")[:16]
    model_id = get_model_name_from_path(args.model_path)
    names = [file_name(setting.label) for setting in settings]
    if len(set(names)) < len(names):
        raise UserError("two variants have labels that give the same file name; change one of them")
    folder = Path(args.output_dir) / "answers"
    return [
        [
            Cell(setting, task, folder / task.key / f"{name}.jsonl", model_id, options, args.resume)
            for setting, name in zip(settings, names, strict=True)
        ]
        for task in tasks
    ]


class _Once(logging.Filter):
    """Lets every message through once: methods are attached anew for each batch and would repeat themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.seen
        self.seen.add(message)
        return new


def answer_missing(args: argparse.Namespace, table: Sequence[Sequence[Cell]]) -> int:
    """Answers what the cells lack; returns the number of questions that could not be asked."""
    from llava.eval.answerers import VariedAnswerer
    from llava.eval.turns import take_turns

    # One input for all settings: tiles are joined as pruning wants them, for dense too.
    args.method = next((cell.method.name for cell in table[0] if cell.setting.budget is not None), "dense")
    tokenizer, model, image_processor, _ = load_model(args)
    for cell in table[0]:
        check_budget(cell.method, max_visual_tokens(model), "--budgets")
    write_json(Path(args.output_dir) / "run.json", describe_run(args, model))
    logging.getLogger("llava.pruning.run").addFilter(_Once())
    skipped: set[tuple[str, int]] = set()
    peaks: dict[str, int | None] = {}
    total = sum(cell.pending for cells in table for cell in cells)
    with Progress(total, "", args.quiet, what="answers") as progress:
        for cells in table:
            task = cells[0].task
            todo = [cell for cell in cells if cell.pending]
            if not todo:
                continue
            answerer = VariedAnswerer(
                tokenizer,
                model,
                image_processor,
                task.image_folder,
                args.conv_mode,
                GenerationOptions(max_new_tokens=args.max_new_tokens),
                image_cache=CACHED_IMAGES,
                **task.answerer,
            )

            def skip(question: Question, reason: str, task: Task = task) -> None:
                if (task.key, question.index) not in skipped:
                    skipped.add((task.key, question.index))
                    progress.message(f"skipped {question.source}: {reason}")

            progress.relabel(task.name)
            new = [cell for cell in todo if cell.setting.label not in peaks]
            peaks |= measure_memory(answerer, task.questions[: args.batch_size], new)
            with ExitStack() as files:
                for cell in todo:
                    cell.peak_bytes = peaks.get(cell.setting.label)
                    cell.start()
                    files.callback(cell.finish)
                take_turns(answerer, task.questions, todo, args.batch_size, skip, progress)
    return len(skipped)


def measure_memory(answerer: Any, questions: Sequence[Question], cells: Sequence[Cell]) -> dict[str, int | None]:
    """Peak memory of each cell's setting on one batch, by label; untimed, so that it also warms up."""
    from llava.eval.memory import PeakMemory
    from llava.eval.runner import SampleError
    from llava.eval.turns import Encodings

    samples = []
    for question in questions:
        try:
            samples.append(answerer.prepare(question))
        except SampleError:
            continue  # reported when it is its turn
    peaks: dict[str, int | None] = {}
    if not samples or not cells:
        return peaks
    encodings = Encodings(answerer)
    # The very first pass pays for what the libraries set up; its figure is overwritten.
    for cell in [cells[0], *cells]:
        with cell.method.attach(answerer.model) as run:
            encoded = encodings.of(samples, run)
            with PeakMemory(answerer.model.device) as peak:
                answerer.generate(encoded, run)
        peaks[cell.setting.label] = peak.bytes
    return peaks


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for flag, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--limit", args.limit, 0),
        ("--resamples", args.resamples, 100),
    ):
        if value < least:
            raise UserError(f"{flag} must be at least {least}, got {value}")
    settings = available_settings(args)
    tasks = chosen_tasks(args)
    from llava.eval.runner import check_conv_mode

    check_conv_mode(args.conv_mode)
    table = make_cells(args, settings, tasks)
    output = Path(args.output_dir)
    started = time.perf_counter()
    skipped = 0
    if any(cell.pending for cells in table for cell in cells):
        try:
            with Interrupts():
                skipped = answer_missing(args, table)
        except KeyboardInterrupt:
            missing = sum(cell.pending for cells in table for cell in cells)
            print(
                f"interrupted: {missing} answers are still missing; run the same command again to continue",
                file=sys.stderr,
            )
            raise
    else:
        print("all answers are already there", file=sys.stderr)

    benchmarks = [
        collect(task.name, task.questions, [cell.path for cell in cells], task.grade)
        for task, cells in zip(tasks, table, strict=True)
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
            {"name": b.name, "answered": len(b.questions), "available": t.available, "graded": b.grade is not None}
            for b, t in zip(benchmarks, tasks, strict=True)
        ],
        "rows": make_rows(settings, benchmarks, args.resamples, args.seed),
    }
    write_results(result, credits_csv(settings, benchmarks), output, args)
    print(f"took {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return INCOMPLETE_STATUS if skipped else 0


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
        from llava.eval.compare_plots import plot_accuracy, plot_variants

        try:
            if args.ablations is not None:
                plot_variants(result, output / "compare.png")
            else:
                plot_accuracy(result, output / "compare.png")
            written.append("compare.png")
        except UserError as error:  # no matplotlib: the figures are there all the same
            print(f"no plot: {error}", file=sys.stderr)
    for name in written:
        print(f"wrote {output / name}")


if __name__ == "__main__":
    main()
