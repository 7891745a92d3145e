"""Answers as the benchmark servers take them: pure functions, one for each format, and lenient reading.

Knows LLaVA answer files and upload formats; the command lines are in `scripts/convert_*.py`, workbooks in
`mmbench_data`. What the functions return is dumped with the json module's defaults, as upstream does, so that the
files agree byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import parse_line, read_json, read_records, require_file, write_text_atomic
from llava.eval.eval_gqa import to_prediction
from llava.eval.tasks.mmbench_data import NOT_UPLOADED, PREDICTION_PLACE, row_index
from llava.eval.tasks.scoring import Coverage, as_answer, join_answers, shorten, warn
from llava.eval.tasks.vqa_text import normalize_answer
from llava.schema import ID, TEXT, WHOLE, Fields, ListOf, MapOf, check, optional
from llava.utils import INCOMPLETE_STATUS, UserError

_SEED = Fields(
    {
        "questions": ListOf(
            Fields({"question_id": ID, "question_type_id": WHOLE, "answer": TEXT, "data_type?": optional(TEXT)}),
            least=1,
        ),
        "question_type": MapOf(WHOLE),
    }
)


def load_questions(path: str, with_image: bool = False) -> list[dict[str, Any]]:
    """The records of a question file (JSON lines), each with `question_id` and, if asked for, `image`; at least one."""
    shape = Fields({"question_id": ID, "image": TEXT} if with_image else {"question_id": ID})
    questions = read_records(path, "question file", shape)
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions


def load_whole_answers(path: str) -> tuple[list[dict[str, Any]], int]:
    """Answers of an answer file, and the number of lines that are none (cut off by a kill or a full disk).

    A file without a single answer is an error.
    """
    lines = require_file(path, "answer file").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    answers, bad = [], 0
    for line in lines:
        try:
            record = parse_line(line, path, "answer file")
            if record is not None:
                answers.append(as_answer(record, path))
        except UserError:
            bad += 1
    if not answers:
        raise UserError(f"{path}: holds no answer" + (f" ({bad} malformed lines)" if bad else ""))
    return answers, bad


def join(
    questions: Sequence[Mapping[str, Any]], answers: Sequence[dict[str, Any]], where: str
) -> tuple[dict[str, str], Coverage]:
    """Texts by question id (as a string: numbers and strings are alike) and coverage; `UserError` if nothing joins."""
    ids = [str(question["question_id"]) for question in questions]
    texts, coverage = join_answers(ids, answers, lambda answer: str(answer["question_id"]))
    if not texts:
        raise UserError(f"{where}: no answer belongs to a question of the question file")
    return texts, coverage


def require_all(coverage: Coverage, upload: str) -> None:
    """Raises `UserError` if questions have no answer, for servers that refuse such an upload."""
    if coverage.missing:
        raise UserError(
            f"{len(coverage.missing)} of {coverage.expected} questions have no answer ({shorten(coverage.missing)}); "
            f"finish the run first; {upload} is not written"
        )


def report_bad_lines(bad: int, path: str | Path) -> int:
    """Says that `bad` lines of an answer file were no answers; the exit status that goes with it."""
    if not bad:
        return 0
    warn(f"{bad} lines of {path} are no answers and are left out; run the answering tool again for their questions")
    return INCOMPLETE_STATUS


def vqav2_upload(questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """One entry for each question of the whole test split; an empty string where there is no answer."""
    ids = [question["question_id"] for question in questions]
    return [{"question_id": key, "answer": normalize_answer(texts.get(str(key), ""))} for key in ids]


def vizwiz_upload(questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """`image` and normalized answer in question order; every question needs its answer in `texts`."""
    return [
        {"image": question["image"], "answer": normalize_answer(texts[str(question["question_id"])])}
        for question in questions
    ]


def mmvet_answers(texts: Mapping[str, str]) -> dict[str, str]:
    """`v1_<question_id>` -> text, as MM-Vet's evaluator reads it."""
    return {f"v1_{key}": text for key, text in texts.items()}


def gqa_predictions(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`questionId` and prediction for GQA's evaluator: trailing periods off, lower case, nothing else."""
    return [{"questionId": answer["question_id"], "prediction": to_prediction(answer["text"])} for answer in answers]


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


def load_seed(path: str) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Questions and the names of the question types (by id) of `SEED-Bench.json`."""
    content = read_json(path, "annotation file")
    if not isinstance(content, dict) or not {"questions", "question_type"} <= set(content):
        raise UserError(f"{path}: not SEED-Bench.json (needs 'questions' and 'question_type')")
    check(content, _SEED, path)
    names = {number: name for name, number in content["question_type"].items()}
    for index, question in enumerate(content["questions"]):
        if question["question_type_id"] not in names:
            number = question["question_type_id"]
            raise UserError(f"{path}: questions[{index}]: question_type_id {number} has no name")
    return content["questions"], names


def seed_upload(questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """`question_id` and `prediction` for each question of SEED-Bench; every question needs its answer."""
    return [
        {"question_id": question["question_id"], "prediction": texts[str(question["question_id"])]}
        for question in questions
    ]


def seed_accuracy(
    questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str], names: Mapping[Any, str]
) -> dict[str, tuple[int, int]]:
    """Name -> (right, all): by question type in the order of type ids, then `Total`, `image` and `video`.

    The text has to equal the answer letter; a question without an answer is wrong. names: type id -> name.
    """
    groups: dict[str, list[bool]] = {names[kind]: [] for kind in sorted(names)}
    groups |= {"Total": [], "image": [], "video": []}
    for question in questions:
        right = texts.get(str(question["question_id"])) == question["answer"]
        groups[names[question["question_type_id"]]].append(right)
        groups["Total"].append(right)
        if question.get("data_type") in ("image", "video"):
            groups[question["data_type"]].append(right)
    return {name: (sum(values), len(values)) for name, values in groups.items() if values}


def write_upload(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Writes JSON as `json.dump` does with its defaults (escaped, no line break at the end), whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=indent))
