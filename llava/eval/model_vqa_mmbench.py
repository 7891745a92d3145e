"""Answers MMBench with LLaVA under a pruning method.

    python -m llava.eval.model_vqa_mmbench --model-path CKPT --question-file mmbench_dev_20230712.tsv \\
        --answers-file A.jsonl --single-pred-prompt --target-token-num 64

Images are in the tsv, so there is no image folder. Exit status: 0 all questions answered, 2 wrong input, 3 some samples
were skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava.eval.answering.command import run_questions
from llava.eval.common.questions import Question, chunk
from llava.eval.model_vqa import MAX_NEW_TOKENS
from llava.eval.model_vqa_loader import build_parser as build_loader_parser
from llava.eval.tasks.mmbench_data import OPTIONS, is_empty, read_table, row_index, row_options
from llava.utils import UserError, cli_main, visible

SINGLE_PREDICTION = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}


def row_prompts(row: Mapping[str, str], all_rounds: bool = False) -> list[tuple[str, list[str], list[str]]]:
    """(prompt, option texts as shown, their letters in the row) of each round of a row.

    The prompt is the hint, if there is one, the question, and a line `A. text` for each option. In every further round
    the options move up by one place and the first becomes the last; the letters shown stay A, B, ...
    """
    options = row_options(row)
    texts, letters = list(options.values()), list(options)
    question = row["question"] if is_empty(row.get("hint")) else f"{row['hint']}\n{row['question']}"
    rounds = []
    for _ in range(max(len(texts), 1) if all_rounds else 1):
        lines = [f"{letter}. {text}" for letter, text in zip(OPTIONS, texts, strict=False)]
        rounds.append(("\n".join([question, *lines]), texts, letters))
        texts, letters = texts[1:] + texts[:1], letters[1:] + letters[:1]
    return rounds


def read_rows(
    path: str, all_rounds: bool = False, warn: Callable[[str], None] | None = None
) -> tuple[list[list[Question]], dict[str, str]]:
    """The questions of each row, one for each round, and the images: name -> base64.

    A row's image is named by its index; a cell that holds a number instead of an image names the row whose image
    it is. warn: told of rows whose right option is not among those that are asked.
    """
    rows: list[list[Question]] = []
    cells: dict[str, str] = {}
    count = 0
    for number, row in read_table(path, ("index", "question", "A", "B", "image")):
        source = f"{path}:{number}"
        index = row_index(row["index"], source)
        if str(index) in cells:
            raise UserError(f"{source}: index {index} occurs twice")
        cells[str(index)] = row["image"].strip()
        problem = "the cell of the question is empty" if is_empty(row["question"]) else None
        if not cells[str(index)]:
            problem = f"image of row {index} is missing: the cell is empty"
        options, right = row_options(row), row.get("answer", "").strip()
        if warn is not None and right in OPTIONS and right not in options:
            last = OPTIONS[len(options)]
            warn(
                f"{source}: the right option {right} of row {index} is not asked: options end before {last}, "
                f"{row.get(last, '')!r}, which counts as a missing value as in LLaVA's tool"
            )
        questions = []
        for round_id, (prompt, texts, letters) in enumerate(row_prompts(row, all_rounds)):
            fields = {"round_id": round_id, "options": texts, "option_char": letters}
            questions.append(Question(count, source, index, prompt, (str(index),), fields, problem))
            count += 1
        rows.append(questions)
    if not rows:
        raise UserError(f"{path}: holds no question")
    return rows, {name: cells.get(cell, cell) for name, cell in cells.items()}


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = build_loader_parser()
    parser.prog = "python -m llava.eval.model_vqa_mmbench"
    parser.description = "Answer MMBench with LLaVA under a visual-token pruning method."
    parser.set_defaults(max_new_tokens=MAX_NEW_TOKENS, question_file="tables/question.tsv")
    group = parser.add_argument_group("prompt")
    group.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter and no more")
    group.add_argument("--all-rounds", action="store_true", help="ask each row once for every rotation of its options")
    group.add_argument("--lang", choices=tuple(SINGLE_PREDICTION), default="en", help="language of the instruction")
    return parser


def eval_model(args: argparse.Namespace) -> int:
    """Runs what the flags say; returns the exit status."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")

    def warn(text: str) -> None:
        print(f"warning: {visible(text)}", file=sys.stderr)

    rows, images = read_rows(args.question_file, args.all_rounds, warn)
    rows = chunk(rows[: args.limit], args.num_chunks, args.chunk_idx)
    instruction = f"\n{SINGLE_PREDICTION[args.lang]}" if args.single_pred_prompt else ""

    def prompt_text(question: Question) -> str:
        return question.text + instruction

    def answerer(*parts: Any) -> Any:
        from llava.eval.answering.varied import VariedAnswerer  # imports torch: not for --help and wrong flags

        return VariedAnswerer(*parts, prompt_text=prompt_text, images=images)

    return run_questions(
        args,
        [question for row in rows for question in row],
        answerer,
        metadata={"single_pred_prompt": args.single_pred_prompt, "lang": args.lang, "all_rounds": args.all_rounds},
        prompt_text=prompt_text,
        images_are_files=False,
    )


@cli_main
def main(argv: Sequence[str] | None = None) -> int:
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
