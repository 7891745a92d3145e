"""Where the files of each benchmark lie below a data folder (upstream's layout), and one score per benchmark.

Knows layouts and which scorer belongs to which benchmark; the metrics are in the `eval_*` modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval import eval_gqa, eval_mme, eval_pope, eval_textvqa
from llava.eval.questions import Question


@dataclass(frozen=True)
class Score:
    """The published figure of a benchmark, and the share of right answers in percent.

    The two differ for POPE (F1) and MME (a sum of accuracies); TextVQA's accuracy is the soft one.
    """

    score: float
    accuracy: float
    samples: int


@dataclass(frozen=True)
class Benchmark:
    """Paths are relative to the data folder; `score(data_dir, answers)` scores whatever was answered."""

    name: str
    metric: str
    question_file: str
    image_folder: str
    score: Callable[[Path, Sequence[dict[str, Any]]], Score]


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


BENCHMARKS = (
    Benchmark("TextVQA", "accuracy", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/train_images", _textvqa),
    Benchmark("POPE", "mean F1", "pope/llava_pope_test.jsonl", "pope/val2014", _pope),
    Benchmark("GQA", "accuracy", "gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/images", _gqa),
    Benchmark("MME", "perception + cognition", "MME/llava_mme.jsonl", "MME/MME_Benchmark_release_version", _mme),
)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """About `limit` questions (all for None), spread evenly over the file, images kept whole.

    Consecutive questions about one image stay together: MME scores images by both of their questions, and the
    categories of POPE follow one another in the file, so its first questions would be one category only.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    groups: list[list[Question]] = []
    for question in questions:
        if groups and question.image is not None and groups[-1][0].image == question.image:
            groups[-1].append(question)
        else:
            groups.append([question])
    wanted = max(1, round(limit * len(groups) / len(questions)))
    chosen = [groups[i * len(groups) // wanted] for i in range(wanted)]
    return [question for group in chosen for question in group]
