"""Where the files of each benchmark lie below a data folder (upstream's layout), how it is asked, and its score.

Knows layouts and which scorer belongs to which benchmark; the metrics are in the `eval_*` modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval import (
    eval_gqa,
    eval_mmbench,
    eval_mme,
    eval_pope,
    eval_science_qa,
    eval_textvqa,
    model_vqa_mmbench,
    model_vqa_science,
)
from llava.eval.common.questions import Question, read_questions
from llava.eval.tasks import graders
from llava.utils import UserError


@dataclass(frozen=True)
class Score:
    """The published figure of a benchmark, and the share of right answers in percent.

    The two differ for POPE (F1) and MME (a sum of accuracies); TextVQA's accuracy is the soft one.
    """

    score: float
    accuracy: float
    samples: int


@dataclass(frozen=True)
class Asked:
    """The questions of a benchmark, and what an answerer needs beside them (see `VariedAnswerer`)."""

    questions: list[Question]
    answerer: Mapping[str, Any] = field(default_factory=dict)


def _question_file(path: Path) -> Asked:
    return Asked(read_questions(path))


def _conversations(path: Path) -> Asked:
    questions = model_vqa_science.read_conversations(str(path), single_prediction=True)
    return Asked(questions, {"prompt_text": model_vqa_science.without_placeholder})


def _mmbench_rows(language: str) -> Callable[[Path], Asked]:
    instruction = model_vqa_mmbench.SINGLE_PREDICTION[language]

    def read(path: Path) -> Asked:
        rows, images = model_vqa_mmbench.read_rows(str(path))
        prompt = lambda question: f"{question.text}\n{instruction}"  # noqa: E731 - one expression, used once
        return Asked([question for row in rows for question in row], {"prompt_text": prompt, "images": images})

    return read


@dataclass(frozen=True)
class Benchmark:
    """Paths are relative to the data folder.

    score: `score(data_dir, answers)` scores whatever was answered, with the published metric. grader:
    `grader(data_dir)` gives the credit of single answers (None where the truth is not public and not there). read: the
    question file's reader.
    """

    name: str
    metric: str
    question_file: str
    image_folder: str
    score: Callable[[Path, Sequence[dict[str, Any]]], Score]
    grader: Callable[[Path], graders.Grader | None]
    read: Callable[[Path], Asked] = _question_file

    @property
    def key(self) -> str:
        """The name in options and file names."""
        return self.name.lower().replace("-", "_")

    def ask(self, data_dir: Path) -> Asked:
        """The questions; raises `UserError` if the file is missing or wrong."""
        return self.read(data_dir / self.question_file)


def _textvqa(data: Path, answers: Sequence[dict[str, Any]]) -> Score:
    annotations = eval_textvqa.load_annotations(str(data / "textvqa" / "TextVQA_0.5.1_val.json"))
    result = eval_textvqa.textvqa_accuracy(annotations, answers)
    return Score(result["accuracy"], result["accuracy"], result["samples"])


def _pope(data: Path, answers: Sequence[dict[str, Any]]) -> Score:
    folder = data / "pope"
    questions = eval_pope.load_questions(str(folder / "llava_pope_test.jsonl"))
    result = eval_pope.evaluate_pope(eval_pope.load_labels(str(folder / "coco")), questions, answers)
    categories = result["categories"].values()
    counts = [(s["tp"] + s["tn"], s["tp"] + s["tn"] + s["fp"] + s["fn"]) for s in categories]
    right, samples = sum(r for r, _ in counts), sum(n for _, n in counts)
    return Score(100 * result["f1_mean"], 100 * right / max(samples, 1), samples)


def _gqa(data: Path, answers: Sequence[dict[str, Any]]) -> Score:
    questions = eval_gqa.load_questions(str(data / "gqa" / "data" / "testdev_balanced_questions.json"))
    predictions = [{**answer, "text": eval_gqa.to_prediction(answer["text"])} for answer in answers]
    result = eval_gqa.gqa_accuracy(questions, predictions)
    return Score(result["accuracy"], result["accuracy"], result["samples"])


def _mme(data: Path, answers: Sequence[dict[str, Any]]) -> Score:
    folder = data / "MME"
    truth = eval_mme.load_truth(str(folder / "MME_Benchmark_release_version"))
    questions = eval_mme.load_questions(str(folder / "llava_mme.jsonl"))
    result = eval_mme.evaluate_mme(truth, questions, answers)
    subtasks = result["subtasks"].values()
    samples = sum(s["questions"] for s in subtasks)
    accuracy = sum(s["accuracy"] * s["questions"] for s in subtasks) / max(samples, 1)
    return Score(result["perception"] + result["cognition"], accuracy, samples)


def _science_qa(data: Path, answers: Sequence[dict[str, Any]]) -> Score:
    problems, ids = eval_science_qa.load_problems(str(data / "scienceqa"))
    answered = {str(answer["question_id"]) for answer in answers}
    # The scorer counts unanswered problems as wrong; of a subset, only what was asked counts.
    result = eval_science_qa.evaluate_science_qa(problems, [key for key in ids if key in answered], answers)
    return Score(result["accuracy"], result["accuracy"], result["total"])


def _mmbench_score(table: str) -> Callable[[Path, Sequence[dict[str, Any]]], Score]:
    def score(data: Path, answers: Sequence[dict[str, Any]]) -> Score:
        answered = {answer["question_id"] for answer in answers}
        rows = {index: row for index, row in eval_mmbench.load_rows(str(data / table)).items() if index in answered}
        result = eval_mmbench.evaluate_mmbench(rows, answers)
        return Score(result["circular"], result["per_row"], result["rows"])

    return score


def _mmbench(name: str, table: str, language: str) -> Benchmark:
    return Benchmark(
        name,
        "circular",
        table,
        str(Path(table).parent),
        _mmbench_score(table),
        lambda data: graders.mmbench(data / table),
        _mmbench_rows(language),
    )


def _vqa(name: str, questions: str, annotations: str, images: str) -> Benchmark:
    def score(data: Path, answers: Sequence[dict[str, Any]]) -> Score:
        grade = graders.vqa(data / annotations, data / questions)
        if grade is None:
            raise UserError(f"{data / annotations} is not there: {name} is scored by its server")
        credits = [credit for answer in answers if (credit := grade(answer)) is not None]
        accuracy = 100.0 * sum(credits) / max(len(credits), 1)
        return Score(accuracy, accuracy, len(credits))

    def grader(data: Path) -> graders.Grader | None:
        return graders.vqa(data / annotations, data / questions)

    return Benchmark(name, "accuracy", questions, images, score, grader)


BENCHMARKS = (
    Benchmark(
        "TextVQA",
        "accuracy",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "textvqa/train_images",
        _textvqa,
        graders.textvqa,
    ),
    Benchmark("POPE", "mean F1", "pope/llava_pope_test.jsonl", "pope/val2014", _pope, graders.pope),
    Benchmark("GQA", "accuracy", "gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/images", _gqa, graders.gqa),
    Benchmark(
        "MME",
        "perception + cognition",
        "MME/llava_mme.jsonl",
        "MME/MME_Benchmark_release_version",
        _mme,
        graders.mme,
    ),
)
"""The benchmarks of the demo."""

COMPARED = (
    *BENCHMARKS,
    _vqa(
        "VQAv2",
        "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        "vqav2/v2_mscoco_test-dev2015_annotations.json",
        "vqav2/test2015",
    ),
    _vqa("VizWiz", "vizwiz/llava_test.jsonl", "vizwiz/test.json", "vizwiz/test"),
    Benchmark(
        "ScienceQA",
        "accuracy",
        "scienceqa/llava_test_CQM-A.json",
        "scienceqa/images/test",
        _science_qa,
        graders.science_qa,
        _conversations,
    ),
    _mmbench("MMBench", "mmbench/mmbench_dev_20230712.tsv", "en"),
    _mmbench("MMBench-CN", "mmbench_cn/mmbench_dev_cn_20231003.tsv", "cn"),
)
"""The benchmarks that can be scored here, without a server or a grader model."""


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """About `limit` questions (all for None), spread evenly over the file, images kept whole.

    Consecutive questions about one image stay together: MME scores images by both of their questions, and the
    categories of POPE follow one another in the file, so its first questions would be one category only.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    groups: list[list[Question]] = []
    for question in questions:
        if groups and question.images and groups[-1][0].images == question.images:
            groups[-1].append(question)
        else:
            groups.append([question])
    wanted = max(1, round(limit * len(groups) / len(questions)))
    chosen = [groups[i * len(groups) // wanted] for i in range(wanted)]
    return [question for group in chosen for question in group]
