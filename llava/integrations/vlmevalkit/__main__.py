"""Runs VLMEvalKit's run.py with pruned variants of its models in the table.

    python -m llava.integrations.vlmevalkit --methods autoprune,divprune --budgets 64 VLMEvalKit/run.py -- \\
        --data MME --model llava_v1.5_7b-autoprune-64
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from llava.eval.common.arguments import Parser, split_names
from llava.eval.common.budgets import BUDGETS_HELP, parse_budgets
from llava.integrations.vlmevalkit import register, report
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.integrations.vlmevalkit", description="VLMEvalKit's run.py, with pruning.")
    parser.add_argument("--methods", default="autoprune", help="pruning methods by commas")
    parser.add_argument("--budgets", default="64", help=BUDGETS_HELP)
    parser.add_argument("script", help="VLMEvalKit's run.py; its own flags follow, after --")
    parser.add_argument("flags", nargs="*", help="flags of run.py")
    args = parser.parse_args(argv)
    for budget in parse_budgets(args.budgets):
        for method in split_names(args.methods):
            option = "target_tokens" if isinstance(budget, int) else "target_ratio"
            register(None, **{"method": method, option: budget})
    sys.argv[:] = [args.script, *args.flags]
    runpy.run_path(args.script, run_name="__main__")
    print(report(), file=sys.stderr)


if __name__ == "__main__":
    main()
