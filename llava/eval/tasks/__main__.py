"""The paths of a benchmark, for shell scripts: `eval "$(python -m llava.eval.tasks textvqa)"`.

Prints one shell assignment a line: FOLDER, QUESTION_FILE, IMAGE_FOLDER, TRUTH (an array), TOOL, SPLIT, MERGED.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from llava.eval.common.arguments import Parser
from llava.eval.tasks.registry import TASKS, get_task
from llava.utils import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.eval.tasks", description="Print the paths of a benchmark.")
    parser.add_argument("benchmark", help=f"one of: {', '.join(task.name for task in TASKS)}")
    task = get_task(parser.parse_args(argv).benchmark)
    values = {
        "FOLDER": task.folder, "QUESTION_FILE": task.question_file, "IMAGE_FOLDER": task.image_folder or "",
        "TOOL": task.tool, "SPLIT": task.split, "MERGED": "1" if task.merged else "",
    }  # fmt: skip
    for name, value in values.items():
        print(f"{name}={shlex.quote(value)}")
    print(f"TRUTH=({' '.join(map(shlex.quote, task.truth))})")


if __name__ == "__main__":
    main()
