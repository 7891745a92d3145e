"""MMBench's rows as questions: prompts, rounds, images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llava.eval.common.questions import Question
from llava.eval.tasks.mmbench_data import OPTIONS, is_empty, read_table, row_index, row_options
from llava.utils import UserError

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


def with_instruction(instruction: str) -> Callable[[Question], str]:
    """The prompt of a question: its text and, if there is one, the instruction on a line of its own."""
    return lambda question: f"{question.text}\n{instruction}" if instruction else question.text
