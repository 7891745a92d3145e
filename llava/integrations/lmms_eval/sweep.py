"""Many methods and budgets on tasks of lmms-eval with one loaded model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from llava.eval.common.arguments import Parser, check_range, split_names
from llava.eval.common.budgets import BUDGETS_HELP, parse_budgets
from llava.eval.common.jsonio import write_json
from llava.eval.common.outputs import JsonObject
from llava.eval.common.tables import markdown_table
from llava.utils import UserError

RESULT = JsonObject("results of a sweep over lmms-eval", ("model_args", "settings"))


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = Parser(
        prog="python -m llava.integrations.lmms_eval",
        description="Many methods and budgets on tasks of lmms-eval, with one loaded model.",
    )
    parser.add_argument("--base", required=True, help="name of a model of lmms-eval: llava, llava_hf, qwen2_5_vl, ...")
    parser.add_argument("--model-args", default="", metavar="K=V,...", help="arguments of that model, as lmms-eval's")
    parser.add_argument("--methods", required=True, help="pruning methods by commas; dense is asked once")
    parser.add_argument("--budgets", required=True, help=BUDGETS_HELP)
    parser.add_argument("--tasks", required=True, help="tasks of lmms-eval, by commas")
    parser.add_argument("--include-path", default=None, help="folder with further tasks")
    parser.add_argument("--output", type=RESULT, default=None, help="JSON file, written after each setting")
    parser.add_argument("--limit", type=int, default=None, help="only the first LIMIT questions of each task")
    parser.add_argument("--batch-size", type=int, default=1, help="questions per forward pass, where the base can")
    parser.add_argument("--device", default=None, help="what lmms-eval takes; default: the base's")
    parser.add_argument("--force-simple", action="store_true", help="simple prompts where the base has a chat wrapper")
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluates every setting, prints a table and writes the results."""
    check_range("--limit", args.limit, 1)
    check_range("--batch-size", args.batch_size, 1)
    settings = list(methods_of(args.methods, args.budgets))
    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lmms-eval cannot be imported ({error}): pip install lmms-eval") from error
    from llava.integrations.lmms_eval.model import Pruned, PrunedChat

    kind = Pruned if args.force_simple else PrunedChat
    arguments = ",".join(filter(None, (f"base={args.base}", args.model_args)))
    model = kind.create_from_arg_string(arguments, {"batch_size": args.batch_size, "device": args.device})
    model.stays = True
    manager = TaskManager(include_path=args.include_path, model_name=args.base)
    rows: list[dict[str, Any]] = []
    for method in settings:
        model.begin(method)
        found = simple_evaluate(
            model=model, model_args=arguments, tasks=split_names(args.tasks), limit=args.limit, task_manager=manager,
            batch_size=args.batch_size, log_samples=False, bootstrap_iters=0, force_simple=args.force_simple,
        )  # fmt: skip
        if found is None:  # another process than the first
            continue
        rows.append({**model.measured(), "results": found["results"]})
        if args.output is not None:
            write_json(args.output, {"model_args": arguments, "tasks": split_names(args.tasks), "settings": rows})
    if rows:
        print(table(rows))
    return 0


def methods_of(names: str, budgets: str) -> Any:
    """The methods with every budget, dense once and first if it is named; `UserError` for one that does not exist."""
    from llava.pruning import build_method

    chosen = split_names(names)
    if not chosen:
        raise UserError("--methods names no method")
    given = parse_budgets(budgets)
    if "dense" in chosen:
        yield build_method("dense")
    for name in chosen:
        for budget in given if name != "dense" else ():
            yield build_method(name, {"target_tokens" if isinstance(budget, int) else "target_ratio": budget})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per setting: mean tokens, and every figure that lmms-eval gives for a task."""
    names = [
        (task, figure)
        for task, figures in rows[0]["results"].items()
        for figure, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in figure
    ]
    header = ["method", "target", "tokens, nominal", "tokens, processed"]
    header += [f"{task} {figure.partition(',')[0]}" for task, figure in names]
    lines = []
    for row in rows:
        target = row["options"].get("target_tokens") or row["options"].get("target_ratio") or "-"
        means = [f"{row[key]:.1f}" if key in row else "-" for key in ("tokens_nominal", "tokens_processed")]
        figures = [f"{row['results'][task][figure]:.4g}" for task, figure in names]
        lines.append([row["method"], str(target), *means, *figures])
    return markdown_table(header, lines)
