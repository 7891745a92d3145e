"""MMBench accuracy where the tsv carries the answers: circular, single-pass, per row and by category.

    python -m llava.eval.eval_mmbench --annotation-file mmbench_dev_20230712.tsv --result-file answers.jsonl

Reads LLaVA answer files and the upload workbook. Reads answers by rule; the server's reading by ChatGPT of what
the rules do not understand is not imitated: such answers are wrong and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.eval.common.questions import Question
from llava.eval.tasks.join import (
    check_same_questions,
    join_answers,
    load_answers,
    percent,
    require_joined,
    shorten,
    warn,
)
from llava.eval.tasks.mmbench_data import (
    NOT_UPLOADED,
    OPTIONS,
    PREDICTION_PLACE,
    ROTATION,
    is_empty,
    is_workbook,
    read_table,
    read_workbook,
    row_index,
)
from llava.eval.tasks.mmbench_rows import SINGLE_PREDICTION, read_rows, with_instruction
from llava.eval.tasks.task import Answers, Asked, Column, Grader, Score, Task, Truths, figure
from llava.utils import UserError, visible

# The wide marks are those of Chinese text.
_LETTER = re.compile(r"[(（]([A-Z])[)）]|([A-Z])(?:[.:)．：）、](?![A-Za-z0-9])|$)")
MISSING = "of {expected} rows have no answer and count as wrong"
_CATEGORIES = {"category": "category", "l2": "l2-category"}  # key prefix -> column of the tsv


def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The option letter that an answer names, or None.

    Read are, with blanks around ignored: a letter of `options` alone; with a period, colon or parenthesis
    behind it (`A.`, `A. text`, `A) text`; not `A.M.`); in parentheses (`(A) text`); else the text of exactly one
    option, whatever the case and with or without a period at the end.
    """
    text = text.strip()
    match = _LETTER.match(text)
    if match:
        letter = match.group(1) or match.group(2)
        if letter in options:
            return letter
    wanted = _plain(text)
    matching = [letter for letter, option in options.items() if wanted and _plain(option) == wanted]
    return matching[0] if len(matching) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def read_answer(answer: Mapping[str, Any], row: Mapping[str, str]) -> str | None:
    """The letter, in terms of the row, that an answer of a LLaVA answer file chooses; None if it names none.

    An answer given with `--all-rounds` saw the options of its row rotated: its fields `options` (texts in
    the order shown, as A, B, ...) and `option_char` (their letters in the row) tell how.
    """
    shown, letters = answer.get("options"), answer.get("option_char")
    if not (isinstance(shown, list) and isinstance(letters, list) and len(shown) == len(letters)):
        return read_choice(answer["text"], _choices(row))
    choice = read_choice(answer["text"], dict(zip(OPTIONS, map(str, shown), strict=False)))
    return None if choice is None else str(letters[OPTIONS.index(choice)])


def evaluate_mmbench(rows: Mapping[int, Mapping[str, str]], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracies in percent over the rows that have an `answer`; rows without a prediction count as wrong.

    rows: index -> row of the tsv; answers: `question_id` (the index), `text`, and from `--all-rounds` runs
    `round_id`, `options`, `option_char`. circular: questions (rows of the same index modulo 1,000,000) with
    every rotation and every round right; single_pass: rows with index below 1,000,000, first round;
    per_row: all rows, each of its rounds counted.
    """
    scored = {index: row for index, row in rows.items() if not is_empty(row.get("answer"))}
    # Answers to rows without ground truth are legitimate, they just do not count.
    relevant = [answer for answer in answers if answer["question_id"] in scored or answer["question_id"] not in rows]
    found, coverage = join_answers(
        [_place(answer) for answer in relevant if answer["question_id"] in scored],
        [{**answer, "text": read_answer(answer, scored.get(answer["question_id"], {})) or ""} for answer in relevant],
        _place,
    )
    rounds: dict[int, dict[int, bool]] = {}
    for (index, number), choice in found.items():
        rounds.setdefault(index, {})[number] = choice == scored[index]["answer"].strip()
    coverage.missing = [str(index) for index in scored if index not in rounds]
    coverage.expected, coverage.scored = len(scored), len(rounds)
    unread = [str(index) for (index, _), choice in found.items() if not choice]

    questions: dict[int, list[bool]] = {}
    base: dict[int, bool] = {}
    every: list[bool] = []
    for index in scored:
        results = rounds.get(index, {0: False})
        questions.setdefault(index % ROTATION, []).extend(results.values())
        every.extend(results.values())
        if index < ROTATION:
            base[index] = results.get(0, False)
    circular = {index: all(results) for index, results in questions.items()}
    return {
        "circular": percent(circular.values()),
        "single_pass": percent(base.values()),
        "per_row": percent(every),
        "questions": len(circular),
        "rows": len(scored),
        "groups": {prefix: _by_group(circular, scored, column) for prefix, column in _CATEGORIES.items()},
        "unread": unread,
        "coverage": coverage,
    }


def _place(answer: Mapping[str, Any]) -> tuple[Any, int]:
    return answer["question_id"], answer.get("round_id") or 0


def _choices(row: Mapping[str, str]) -> dict[str, str]:
    # Not `row_options`: its prompt leaves out an option that reads "None", which can still be the right one.
    return {letter: row[letter] for letter in OPTIONS if row.get(letter, "").strip()}


def _by_group(
    circular: Mapping[int, bool], rows: Mapping[int, Mapping[str, str]], column: str
) -> dict[str, tuple[float, int]]:
    """Group -> (circular accuracy, number of questions), by the value of `column` in a question's first row."""
    names: dict[int, str] = {}
    for index in sorted(rows):
        if not is_empty(rows[index].get(column)):
            names.setdefault(index % ROTATION, rows[index][column].strip())
    groups: dict[str, list[bool]] = {}
    for index, name in names.items():
        groups.setdefault(name, []).append(circular[index])
    return {name: (percent(values), len(values)) for name, values in sorted(groups.items())}


def load_rows(path: str) -> dict[int, dict[str, str]]:
    """index -> row of the tsv, without the images; an index must not repeat, and some rows must have answers."""
    rows: dict[int, dict[str, str]] = {}
    for number, row in read_table(path, required=("index", "A", "B"), drop=("image",)):
        where = f"{path}:{number}"
        index = row_index(row["index"], where)
        if index in rows:
            raise UserError(f"{where}: index {index} occurs twice")
        answer = row["answer"] = row.get("answer", "").strip()
        if not is_empty(answer) and answer not in _choices(row):
            raise UserError(f"{where}: answer {answer[:40]!r} is none of the row's options")
        rows[index] = row
    if not any(not is_empty(row.get("answer")) for row in rows.values()):
        raise UserError(f"{path}: no row has an answer (a test split?); upload the workbook to the server instead")
    return rows


def load_results(path: str) -> list[dict[str, Any]]:
    """Answers with `question_id` as a number and `text`, from a LLaVA answer file or an upload workbook."""
    if not is_workbook(path):
        answers = load_answers(path, keep_torn=True)
        for answer in answers:
            answer["question_id"] = _index_or_text(answer["question_id"])
            if not isinstance(answer.get("round_id") or 0, int):
                raise UserError(f"{path}: question {answer['question_id']}: round_id must be a whole number")
        return answers
    answers = []
    for number, row in enumerate(read_workbook(path), start=2):
        for column in ("index", "prediction"):
            if column not in row:
                raise UserError(f"{path}: column {column!r} is missing; it has: {', '.join(map(str, row))}")
        if row["prediction"] is not None:  # an empty cell is a question without an answer
            index = row_index(row["index"], f"{path}: row {number}")
            answers.append({"question_id": index, "text": _cell_text(row["prediction"])})
    return answers


def _cell_text(value: Any) -> str:
    # Spreadsheets keep whole numbers as floats.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _index_or_text(value: Any) -> Any:
    # An id that is no index belongs to another benchmark: reported as unmatched.
    try:
        return row_index(value, "")
    except UserError:
        return str(value)


def score_files(annotation_file: str, result_file: str) -> dict[str, Any]:
    """`evaluate_mmbench` on files; raises `UserError` when no answer belongs to a row."""
    rows, answers = load_rows(annotation_file), load_results(result_file)
    texts = {str(index): row.get("question", "") for index, row in rows.items()}
    check_same_questions(result_file, texts, answers)
    result = evaluate_mmbench(rows, answers)
    require_joined(result["coverage"].scored, result_file, f"a row of {annotation_file} that has an answer")
    return result


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """Flat keys: circular, single_pass, per_row, category_<name>, l2_<name> (percent, circular); counts."""
    flat = {name: result[name] for name in ("circular", "single_pass", "per_row", "questions", "rows")}
    for prefix, groups in result["groups"].items():
        flat |= {f"{prefix}_{name}": percent for name, (percent, _) in groups.items()}
    return {**flat, "unread": len(result["unread"])}


def mmbench_sheet(
    rows: Sequence[Mapping[str, str]], predictions: Mapping[int, str]
) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of the upload workbook: the tsv without hints, images and categories, plus `prediction`.

    predictions: index -> text; the cell stays empty where there is none.
    """
    columns = [name for name in rows[0] if name not in NOT_UPLOADED]
    header = [*columns[:PREDICTION_PLACE], "prediction", *columns[PREDICTION_PLACE:]]
    table = []
    for number, row in enumerate(rows, start=1):
        index = row_index(row["index"], f"row {number}")
        values = {**row, "index": index, "prediction": predictions.get(index)}
        table.append([values[name] for name in header])
    return header, table


def first_round_texts(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers of the first round only: later rounds of an `--all-rounds` run saw the options rotated."""
    return [dict(answer) for answer in answers if not answer.get("round_id")]


def warn_unread(result: dict[str, Any]) -> None:
    """Says how many answers name no option."""
    if result["unread"]:
        warn(f"{len(result['unread'])} answers name no option and count as wrong")


def print_scores(result: dict[str, Any]) -> None:
    """The accuracies in percent: whole, then by category and by group of categories."""
    print(f"Circular: {result['circular']:.2f}% ({result['questions']} questions)")
    print(f"Single pass: {result['single_pass']:.2f}%")
    print(f"Per row: {result['per_row']:.2f}% ({result['rows']} rows)")
    for groups in result["groups"].values():
        if groups:
            print()
        for name, (value, count) in groups.items():
            print(f"  {visible(name)}: {value:.2f}% ({count} questions)")


@dataclass(frozen=True, kw_only=True)
class MmBench(Task):
    """language: of the instruction to answer with a letter."""

    language: str = "en"

    def read_questions(self, path: str | Path) -> Sequence[Question]:
        rows, images = read_rows(str(path))
        blind = [name for name, cell in images.items() if not cell]
        if blind:
            raise UserError(f"{path}: {len(blind)} rows have no image ({shorten(blind)})")
        return [question for row in rows for question in row]

    def ask(self, data_dir: Path) -> Asked:
        rows, images = read_rows(str(self.questions_path(data_dir)))
        prompt_text = with_instruction(SINGLE_PREDICTION[self.language])
        return Asked([question for row in rows for question in row], {"prompt_text": prompt_text, "images": images})

    def grader(self, data_dir: Path) -> Grader:
        """The option's letter or text, each row by itself (not circular)."""
        rows = load_rows(str(self.questions_path(data_dir)))

        def grade(answer: Mapping[str, Any]) -> float | None:
            row = rows.get(int(answer["question_id"]))
            if row is None or is_empty(row.get("answer")):
                return None
            return float(read_answer(answer, row) == row["answer"].strip())

        return grade

    def truths(self, data_dir: Path) -> Truths:
        rows = load_rows(str(self.questions_path(data_dir)))

        def truth(answer: Mapping[str, Any]) -> str | None:
            row = rows.get(int(answer["question_id"]))
            if row is None or is_empty(row.get("answer")):
                return None
            letter = row["answer"].strip()
            return f"{letter}. {row[letter]}" if row.get(letter) else letter

        return truth

    def score(self, data_dir: Path, answers: Answers) -> Score:
        answered = {answer["question_id"] for answer in answers}
        rows = load_rows(str(self.questions_path(data_dir)))
        result = evaluate_mmbench({index: row for index, row in rows.items() if index in answered}, answers)
        return Score(result["circular"], result["per_row"], result["rows"])


ENGLISH = MmBench(
    name="mmbench",
    title="MMBench",
    folder="mmbench",
    question_file="mmbench_dev_20230712.tsv",
    image_folder=None,
    tool="model_vqa_mmbench",
    split="mmbench_dev_20230712",
    source="OpenMMLab's download page of MMBench",
    server="MMBench's server (dev is also scored here)",
    metric="circular",
    columns=(Column("mmbench", "MMBench (circular)", figure("circular")),),
)

CHINESE = replace(
    ENGLISH,
    name="mmbench_cn",
    title="MMBench-CN",
    folder="mmbench_cn",
    question_file="mmbench_dev_cn_20231003.tsv",
    split="mmbench_dev_cn_20231003",
    language="cn",
    columns=(Column("mmbench_cn", "MMBench-CN (circular)", figure("circular")),),
)
