#!/usr/bin/env python
"""ScienceQA's problems as LLaVA's conversations, one JSON list: BASE_DIR/llava_SPLIT_FORMAT.json.

    python scripts/convert_sqa_to_llava.py convert_to_llava --base-dir scienceqa --split train --prompt-format QCM-LEPA
    python scripts/convert_sqa_to_llava.py --base-dir scienceqa --split test --prompt-format CQM-A-lettered \\
        --output-file scienceqa/llava_test_CQM-A.json

`convert_to_jsonl` writes BASE_DIR/scienceqa_SPLIT_FORMAT.jsonl instead: JSON lines with `instruction` and `output`.

A format says what the question consists of and, behind the dash, the answer: Q question, C context, M options,
L lecture, E explanation (ScienceQA's `solution`), A answer, P parts under headings. The layouts themselves are in
`llava.eval.tasks.science_prompts`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from llava.eval.common.arguments import Parser
from llava.eval.common.jsonio import write_text_atomic
from llava.eval.common.outputs import JsonLines, JsonList, Kind
from llava.eval.tasks.science_prompts import check_format, conversation, instruction
from llava.eval.tasks.science_qa import load_problems
from llava.eval.tasks.upload import write_upload
from llava.utils import cli_main

CONVERSATIONS = JsonList("LLaVA's conversations", ("id", "conversations"), only=False)
INSTRUCTIONS = JsonLines("instructions as JSON lines", ("instruction", "output"))


class _Converted(Kind):
    """Either of the two."""

    def holds(self, path: Path) -> bool:
        return CONVERSATIONS.holds(path) or INSTRUCTIONS.holds(path)


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="ScienceQA's problems as LLaVA's conversations.")
    parser.add_argument(
        "command", nargs="?", choices=("convert_to_llava", "convert_to_jsonl"), default="convert_to_llava",
        help="one JSON list of conversations, or JSON lines of instructions",
    )  # fmt: skip
    parser.add_argument("--base-dir", "--base_dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--split", default="test", help="split of pid_splits.json")
    parser.add_argument(
        "--prompt-format", "--prompt_format", default="QCM-LEPA",
        help="parts of question and answer; CQM-A-lettered: the layout of LLaVA's evaluation file",
    )  # fmt: skip
    parser.add_argument(
        "--output-file",
        type=_Converted("conversations or instructions"),
        help="written; default: BASE_DIR/llava_SPLIT_FORMAT.json",
    )
    args = parser.parse_args(argv)
    check_format(args.prompt_format)
    as_lines = args.command == "convert_to_jsonl"
    name = f"scienceqa_{args.split}_{args.prompt_format}.jsonl"
    if not as_lines:
        name = f"llava_{args.split}_{args.prompt_format}.json"
    target = args.output_file or Path(args.base_dir) / name
    read = [Path(args.base_dir) / source for source in ("problems.json", "pid_splits.json")]
    (INSTRUCTIONS if as_lines else CONVERSATIONS).check(target, reading=read)
    problems, ids = load_problems(args.base_dir, args.split)
    if as_lines:
        lines = [json.dumps(instruction(key, problems[key], args.prompt_format)) + "\n" for key in ids]
        write_text_atomic(Path(target), "".join(lines))
    else:
        write_upload(target, [conversation(key, problems[key], args.prompt_format) for key in ids], indent=2)
    print(f"Number of samples: {len(ids)}")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
