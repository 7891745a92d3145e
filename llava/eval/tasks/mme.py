"""MME: per subtask 100 x accuracy over questions + 100 x accuracy over images (both questions of an image right).

Perception and cognition are sums over subtasks, computed without the official tool, whose input can be written too.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.eval.common.jsonio import read_records, read_text, require_folder, write_text_atomic
from llava.eval.common.outputs import OutputFolder, Text
from llava.eval.common.questions import Question
from llava.eval.tasks.join import QuestionIndex, join_answers, load_answers, require_joined, warn
from llava.eval.tasks.task import EVAL_ZIP, Answers, Column, Grader, Score, Task, Truths, covered, figure
from llava.schema import ID, TEXT, Fields
from llava.utils import UserError

_TOOL_FILE = Text("input of the official tool", r"[^\t\n]+\t[^\t\n]*\t[^\t\n]*\t")

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_LLAVA_INSTRUCTION = "Answer the question using a single word or phrase."
_MME_INSTRUCTION = "Please answer yes or no."
_BREAKS = re.compile(r"[\t\r\n]")


class Row(NamedTuple):
    """One question of a subtask: the image it is about, the true answer and the model's."""

    image: str
    truth: str
    prediction: str


TOOL_FOLDER = OutputFolder({f"{name}.txt": _TOOL_FILE for name in (*PERCEPTION, *COGNITION)})


def read_answer(text: str) -> str:
    """ "yes", "no" or "other", from the first four characters only, as the official tool reads answers.

    `Snow` and `None` are therefore "no".
    """
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def subtask_score(rows: Sequence[Row]) -> dict[str, float]:
    """`score` = 100 x accuracy + 100 x acc+, with both parts in percent.

    Rows of the same image are one image. acc+ counts the images with all questions right among the images
    that have both questions; "other" is wrong in both.
    """
    images: dict[str, list[bool]] = {}
    for row in rows:
        images.setdefault(row.image, []).append(read_answer(row.prediction) == row.truth.strip().lower())
    right = sum(sum(marks) for marks in images.values())
    pairs = [marks for marks in images.values() if len(marks) > 1]
    accuracy = right / len(rows) if rows else 0.0
    accuracy_plus = sum(all(marks) for marks in pairs) / len(pairs) if pairs else 0.0
    return {
        "score": 100 * accuracy + 100 * accuracy_plus,
        "accuracy": 100 * accuracy,
        "accuracy_plus": 100 * accuracy_plus,
        "questions": len(rows),
        "other": sum(read_answer(row.prediction) == "other" for row in rows),
    }


def mme_scores(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """subtask -> rows, to {"perception", "cognition", "subtasks": {name: `subtask_score`}}.

    A total is the sum over the subtasks that are present.
    """
    unknown = sorted(set(rows) - set(PERCEPTION) - set(COGNITION))
    if unknown:
        raise UserError(f"unknown MME subtask {unknown[0]!r}; known: {', '.join(PERCEPTION + COGNITION)}")
    subtasks = {name: subtask_score(rows[name]) for name in PERCEPTION + COGNITION if rows.get(name)}
    return {
        "perception": sum(subtasks[name]["score"] for name in PERCEPTION if name in subtasks),
        "cognition": sum(subtasks[name]["score"] for name in COGNITION if name in subtasks),
        "subtasks": subtasks,
    }


def read_tool_rows(lines: Iterable[str], where: str = "answer file") -> list[Row]:
    """Rows of one text file of the official tool: image, question, true answer, prediction between tabs.

    The official tool pairs consecutive lines, so an image whose lines are not neighbours is an error.
    """
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            continue
        cells = line.split("\t", 3)
        if len(cells) != 4:
            raise UserError(f"{where}:{number}: needs four cells separated by tabs, found {len(cells)}")
        rows.append(Row(cells[0], cells[2], cells[3]))
    for first, second in zip(rows[::2], [*rows[1::2], None], strict=False):
        if second is None or first.image != second.image:
            raise UserError(f"{where}: image {first.image} does not have two consecutive lines")
    return rows


def question_key(question_id: str, prompt: str) -> tuple[str, str, str]:
    """(subtask, image name without ending, question) with the instruction removed and blanks made single.

    Undoes LLaVA's exchange of the instruction; a few questions of the release have two blanks before it.
    """
    category, _, image = question_id.partition("/")
    text = prompt.replace(_LLAVA_INSTRUCTION, "").replace(_MME_INSTRUCTION, "")
    return category, Path(image).stem, " ".join(text.split())


class Lookup:
    """Finds the question of the release that a question or an answer is about. known: `question_key`s."""

    def __init__(self, known: Iterable[tuple[str, str, str]]) -> None:
        self._index = QuestionIndex((key[:2], key[2]) for key in known)

    def question(self, item: Mapping[str, Any]) -> tuple[str, str, str]:
        """Key of an entry with `question_id` and `text`; `UserError` if the release does not have it."""
        key = self.find(str(item["question_id"]), item["text"])
        if key is None:
            text = question_key(str(item["question_id"]), item["text"])[2]
            raise UserError(f"no ground truth for question {item['question_id']!r}: {text!r}")
        return key

    def answer(self, item: Mapping[str, Any]) -> tuple[str, str, str] | None:
        """Key of an entry with `question_id` and `prompt`; None if the release does not have it."""
        return self.find(str(item["question_id"]), str(item.get("prompt", "")))

    def find(self, question_id: str, prompt: str) -> tuple[str, str, str] | None:
        """The known key of that image whose question `prompt` asks."""
        category, image, text = question_key(question_id, prompt)
        found = self._index.find((category, image), text)
        return None if found is None else (category, image, found)


def evaluate_mme(
    truth: Mapping[tuple[str, str, str], str],
    questions: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Joins answers to questions and to the ground truth and scores them.

    truth: `question_key` -> Yes/No; questions: `question_id` ("category/image.png") and `text`; answers:
    `question_id`, `prompt`, `text`. Both questions of an image have the same id, so the text is in the key.
    """
    lookup = Lookup(truth)
    expected = [lookup.question(item) for item in questions]
    found, coverage = join_answers(expected, answers, lookup.answer)
    rows: dict[str, list[Row]] = {}
    for key, text in found.items():
        rows.setdefault(key[0], []).append(Row(key[1], truth[key], text))
    return {**mme_scores(rows), "coverage": coverage}


def load_release(folder: str) -> dict[tuple[str, str, str], tuple[str, str]]:
    """`MME_Benchmark_release_version`: `question_key` -> question as it stands there, and "Yes" or "No".

    Text files lie in `<category>/questions_answers_YN/` if that exists, in `<category>/` otherwise.
    """
    truth = {}
    for category in sorted(path for path in require_folder(folder, "annotation folder").iterdir() if path.is_dir()):
        nested = category / "questions_answers_YN"
        for path in sorted((nested if nested.is_dir() else category).glob("*.txt")):
            for number, line in enumerate(read_text(path, "annotation file").splitlines(), start=1):
                if not line.strip():
                    continue
                question, tab, answer = line.rpartition("\t")
                if not tab or answer.strip().lower() not in ("yes", "no"):
                    raise UserError(f"{path}:{number}: needs a question, a tab and Yes or No")
                truth[question_key(f"{category.name}/{path.name}", question)] = (question, answer.strip())
    if not truth:
        raise UserError(f"{folder}: holds no <category>/*.txt with questions and answers")
    return truth


def load_truth(folder: str) -> dict[tuple[str, str, str], str]:
    """Ground truth of `MME_Benchmark_release_version`: `question_key` -> "Yes" or "No"."""
    return {key: answer for key, (_, answer) in load_release(folder).items()}


def tool_files(
    release: Mapping[tuple[str, str, str], tuple[str, str]],
    questions: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
) -> tuple[dict[str, str], int]:
    """Input of the official tool: subtask -> content of its text file, and how many images were left out.

    A line is image, question of the release, truth and answer between tabs, two lines an image. The tool pairs
    consecutive lines, so an image without both answers would shift all that follow: it is left out. Each line break or
    tab in an answer becomes one blank and nothing else changes: the tool reads the first four characters, as
    `read_answer` does.
    """
    lookup = Lookup(release)
    expected = [lookup.question(item) for item in questions]
    found, _ = join_answers(expected, answers, lookup.answer)
    images: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for key in dict.fromkeys(expected):
        images.setdefault(key[:2], []).append(key)
    content: dict[str, str] = {}
    left_out = 0
    for (category, image), keys in images.items():
        if len(keys) != 2 or not all(key in found for key in keys):
            left_out += 1
            continue
        for key in keys:
            question, truth = release[key]
            cells = (f"{image}.txt", question, truth, _BREAKS.sub(" ", found[key]))
            content[category] = content.get(category, "") + "\t".join(cells) + "\n"
    return content, left_out


def load_questions(path: str) -> list[dict[str, Any]]:
    """LLaVA's MME question file; `question_id` and `text` are needed."""
    return read_records(path, "question file", Fields({"question_id": ID, "text": TEXT}))


def score_files(annotation_dir: str, question_file: str, result_file: str) -> dict[str, Any]:
    """`evaluate_mme` on files; raises `UserError` when no answer belongs to a question."""
    answers = load_answers(result_file, keep_torn=True)
    result = evaluate_mme(load_truth(annotation_dir), load_questions(question_file), answers)
    require_joined(len(result["subtasks"]), result_file, f"a question of {Path(question_file).name}")
    return result


def write_tool_files(folder: str, annotation_dir: str, question_file: str, result_file: str) -> None:
    """`tool_files` into `folder`/<subtask>.txt; says how many images were left out."""
    with contextlib.redirect_stderr(io.StringIO()):  # what there is to say of the answers has been said by the scorer
        answers = load_answers(result_file, keep_torn=True)
    content, left_out = tool_files(load_release(annotation_dir), load_questions(question_file), answers)
    for category, text in content.items():
        write_text_atomic(Path(folder) / f"{category}.txt", text)
    if left_out:
        warn(f"{left_out} images without two answers are left out of {folder}")


def flat_result(result: dict[str, Any]) -> dict[str, Any]:
    """perception, cognition and one key per subtask."""
    subtasks = {name: scores["score"] for name, scores in result["subtasks"].items()}
    others = sum(scores["other"] for scores in result["subtasks"].values())
    return {
        "perception": result["perception"],
        "cognition": result["cognition"],
        **subtasks,
        "other": others,
    }


def print_scores(result: dict[str, Any]) -> None:
    """The lines of the official tool."""
    for title, names in (("Perception", PERCEPTION), ("Cognition", COGNITION)):
        print(f"=========== {title} ===========")
        print(f"total score: {result[title.lower()]} \n")
        for name in names:
            if name in result["subtasks"]:
                print(f"\t {name}  score: {result['subtasks'][name]['score']}")
        print("\n")


class Mme(Task):
    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        truth = load_truth(str(folder / self.truth[0]))
        lookup = Lookup(truth)
        return covered(truth, questions, lambda q: lookup.find(str(q.id), q.text), self.truth[0])

    def grader(self, data_dir: Path) -> Grader:
        """Yes or no; all subtasks alike."""
        truth = load_truth(str(self.truth_path(data_dir)))

        def grade(answer: Mapping[str, Any]) -> float | None:
            key = question_key(str(answer["question_id"]), answer["prompt"])
            return float(read_answer(answer["text"]) == truth[key].strip().lower()) if key in truth else None

        return grade

    def truths(self, data_dir: Path) -> Truths:
        truth = load_truth(str(self.truth_path(data_dir)))
        return lambda answer: truth.get(question_key(str(answer["question_id"]), answer["prompt"]))

    def score(self, data_dir: Path, answers: Answers) -> Score:
        truth = load_truth(str(self.truth_path(data_dir)))
        result = evaluate_mme(truth, load_questions(str(self.questions_path(data_dir))), answers)
        subtasks = result["subtasks"].values()
        samples = sum(s["questions"] for s in subtasks)
        accuracy = sum(s["accuracy"] * s["questions"] for s in subtasks) / max(samples, 1)
        return Score(result["perception"] + result["cognition"], accuracy, samples)


TASK = Mme(
    name="mme",
    title="MME",
    folder="MME",
    question_file="llava_mme.jsonl",
    image_folder="MME_Benchmark_release_version",
    truth=("MME_Benchmark_release_version",),
    source=f"question file: {EVAL_ZIP}; the rest: MME_Benchmark_release_version from MME's authors",
    metric="perception + cognition",
    columns=(
        Column("mme_total", "MME (perception + cognition)", lambda r: r["perception"] + r["cognition"], 0),
        Column("mme_perception", "MME (perception)", figure("perception")),
    ),
)
