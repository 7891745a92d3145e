#!/usr/bin/env python
"""ScienceQA's problems as LLaVA's conversations, one JSON list: BASE_DIR/llava_SPLIT_FORMAT.json.

    python scripts/convert_sqa_to_llava.py --base-dir scienceqa --split test --prompt-format CQM-A

A format is what the question consists of and, behind the dash, the answer: C context (the hint; no line where there is
none), Q question, M lettered options, L lecture, E explanation, A answer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.arguments import Parser
from llava.eval.convert import write_upload
from llava.eval.eval_science_qa import OPTIONS, load_problems
from llava.utils import UserError, cli_main


def parts_of(problem: Mapping[str, Any]) -> dict[str, str]:
    """Letter of the format -> text of a problem; empty where the problem has none."""
    options = [f"{letter}. {text}" for letter, text in zip(OPTIONS, problem["choices"], strict=False)]
    hint = str(problem.get("hint") or "").strip()
    return {
        "C": f"Context: {hint}" if hint else "",
        "Q": str(problem.get("question", "")).strip(),
        "M": "\n".join(options),
        "L": str(problem.get("lecture") or "").strip(),
        "E": str(problem.get("solution") or "").strip(),
        "A": f"The answer is {OPTIONS[problem['answer']]}.",
    }


def conversation(key: str, problem: Mapping[str, Any], prompt_format: str) -> dict[str, Any]:
    """One entry of the list; the image stands behind the text, its path is ID/name."""
    parts = parts_of(problem)
    asked, answered = (
        "\n".join(parts[letter] for letter in letters if parts[letter]) for letters in prompt_format.split("-")
    )
    entry: dict[str, Any] = {"id": key}
    if problem.get("image"):
        entry["image"] = f"{key}/{problem['image']}"
        asked = f"{asked}\n{DEFAULT_IMAGE_TOKEN}"
    entry["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return entry


def check_format(prompt_format: str) -> None:
    """Raises `UserError` unless it is letters, a dash, letters."""
    asked, dash, answered = prompt_format.partition("-")
    if not (dash and asked and answered and set(asked) <= set("CQMLE") and set(answered) <= set("ALE")):
        raise UserError(f"--prompt-format: {prompt_format!r} is not like CQM-A (letters CQMLE, dash, letters ALE)")


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="ScienceQA's problems as LLaVA's conversations.")
    parser.add_argument("command", nargs="?", choices=("convert_to_llava",), help="accepted for old command lines")
    parser.add_argument("--base-dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--split", default="test", help="split of pid_splits.json")
    parser.add_argument("--prompt-format", default="QCM-LEA", help="parts of question and answer, such as CQM-A")
    args = parser.parse_args(argv)
    check_format(args.prompt_format)
    problems, ids = load_problems(args.base_dir, args.split)
    entries = [conversation(key, problems[key], args.prompt_format) for key in ids]
    target = Path(args.base_dir) / f"llava_{args.split}_{args.prompt_format}.json"
    write_upload(target, entries, indent=2)
    print(f"{len(entries)} problems written to {target}")


if __name__ == "__main__":
    main()
