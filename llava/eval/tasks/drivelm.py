"""DriveLM: questions about six views that build on one another, scored without asking a GPT model.

The first question of a frame asks for its important objects. Those of the truth that the answer names make up the
*graph*; a later question that mentions an object outside it is not scored at all. Four figures, by the tag of a
question: accuracy (0, exact string), GPT's grade (1), language (2, BLEU, ROUGE-L and CIDEr), match (3, F1 of the
objects, averaged with GPT's grade). Without grades there is no final score, and none is printed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.common.jsonio import read_json
from llava.eval.common.questions import Question
from llava.eval.tasks.join import join_answers, load_answers, percent, require_joined
from llava.eval.tasks.task import Task, covered, id_of
from llava.schema import TEXT, Fields, ListOf, MapOf, between, check, one_of
from llava.utils import UserError

GROUPS = ("perception", "prediction", "planning", "behavior")
"""In the order in which the questions of a frame are numbered."""
ACCURACY, GPT, LANGUAGE, MATCH = range(4)
NEAR = 16.0
"""Pixels, in sum over both axes, within which a place is that of the truth."""
WEIGHTS = {"gpt": 0.4, "language": 0.2, "match": 0.2, "accuracy": 0.2}
_ENTRY = Fields({"Q": TEXT, "A": TEXT, "tag": ListOf(one_of(ACCURACY, GPT, LANGUAGE, MATCH))})
_FRAME = Fields({"QA": Fields({group: ListOf(_ENTRY) for group in GROUPS})})
TRUTH = MapOf(Fields({"key_frames": MapOf(_FRAME)}), least=1)
_DECIMAL = re.compile(r"\d+\.\d+")

Place = tuple[float, float]


@dataclass(frozen=True)
class Asked:
    """A question of a frame: its id, `SCENE_FRAME_NUMBER`, text, true answer and tags."""

    id: str
    text: str
    answer: str
    tags: tuple[int, ...]


def questions_of_frame(scene: str, frame: str, content: Mapping[str, Any]) -> list[Asked]:
    """The questions of a frame, numbered over all groups."""
    entries = [entry for group in GROUPS for entry in content["QA"][group]]
    return [
        Asked(f"{scene}_{frame}_{i}", entry["Q"], entry["A"], tuple(entry["tag"])) for i, entry in enumerate(entries)
    ]


def frames(truth: Mapping[str, Any]) -> Iterator[list[Asked]]:
    """The questions, frame by frame."""
    for scene, content in truth.items():
        for frame, inner in content["key_frames"].items():
            yield questions_of_frame(scene, frame, inner)


def places(text: str) -> list[Place]:
    """Pairs of decimal numbers of a text, in order; a number left over belongs to none."""
    numbers = [float(number) for number in _DECIMAL.findall(text)]
    return list(zip(numbers[::2], numbers[1::2], strict=False))


def match_places(answer: str, truth: str) -> tuple[list[Place], float]:
    """The places of the truth that an answer finds, and F1 of all places (0 to 1; 0 if either has none).

    Each place of the answer, in order, takes the nearest one of the truth that is left, if it is near enough.
    """
    said, left = places(answer), places(truth)
    number = len(said) + len(left)
    found = []
    for x, y in said:
        distances = [abs(x - u) + abs(y - v) for u, v in left]
        if distances and min(distances) < NEAR:
            found.append(left.pop(distances.index(min(distances))))
    return found, 2 * len(found) / number if number else 0.0


@dataclass
class Collected:
    """What the scored questions gave. graded: the ids that want a GPT grade, by tag; in_graph: of later questions,
    those scored; objects: of all objects in the truth of first questions, those found.
    """

    accuracy: list[bool] = field(default_factory=list)
    language: list[tuple[str, str]] = field(default_factory=list)
    match: list[float] = field(default_factory=list)
    graded: dict[int, list[str]] = field(default_factory=lambda: {GPT: [], MATCH: []})
    in_graph: list[bool] = field(default_factory=list)
    objects: list[bool] = field(default_factory=list)

    def add(self, question: Asked, answer: str) -> None:
        if ACCURACY in question.tags:
            self.accuracy.append(answer == question.answer)
        if LANGUAGE in question.tags:
            self.language.append((answer, question.answer))
        if MATCH in question.tags:
            self.match.append(match_places(answer, question.answer)[1])
        for tag, ids in self.graded.items():
            if tag in question.tags:
                ids.append(question.id)


def evaluate_drivelm(
    truth: Mapping[str, Any], answers: Sequence[dict[str, Any]], grades: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The figures over the answered questions.

    truth: the challenge's form, with tags; answers: `question_id` and `text`; grades: question id -> GPT's grade, 0 to
    100. Percent: `accuracy`, `match_f1`, `graph_questions` (later questions that are scored), `graph_objects` (objects
    of first questions that are found), with grades `gpt` and `match`; from 0 to 1: `language`, its parts, and either
    `local`, the sum of what is known (language 0.2, accuracy 0.2, match F1 0.1, so 0.5 at most), or `final`.

    Raises:
        UserError: grades are given but a question that needs one has none.
    """
    known = {question.id: question for frame in frames(truth) for question in frame}
    found, coverage = join_answers(known, answers, lambda answer: str(answer["question_id"]))
    collected = Collected()
    for frame in frames(truth):
        graph: list[Place] = []
        for number, question in enumerate(frame):
            answer = found.get(question.id)
            if number == 0 and answer is not None:
                graph, _ = match_places(answer, question.answer)
                objects = len(places(question.answer))
                collected.objects += [i < len(graph) for i in range(objects)]
            if answer is None:
                continue
            reached = number == 0 or all(place in graph for place in places(question.text))
            if number:
                collected.in_graph.append(reached)
            if reached:
                collected.add(question, answer)
    return {**_figures(collected, grades), "samples": len(found), "coverage": coverage}


def _figures(collected: Collected, grades: Mapping[str, float] | None) -> dict[str, Any]:
    parts = language_scores(*([list(side) for side in zip(*collected.language, strict=True)] or [[], []]))
    bleu = sum(parts[f"bleu_{n}"] for n in range(1, 5)) / 4
    language = (bleu + parts["rouge_l"] + parts["cider"] / 10) / 3
    figures = {
        "accuracy": percent(collected.accuracy),
        "language": language,
        **parts,
        "match_f1": percent(collected.match),
        "graph_questions": percent(collected.in_graph),
        "graph_objects": percent(collected.objects),
    }
    accuracy, f1 = figures["accuracy"] / 100, figures["match_f1"] / 100
    known = WEIGHTS["language"] * language + WEIGHTS["accuracy"] * accuracy
    if grades is None:
        return figures | {"local": known + WEIGHTS["match"] / 2 * f1}
    means = {}
    for tag, ids in collected.graded.items():
        if missing := [key for key in ids if key not in grades]:
            raise UserError(f"{len(missing)} of {len(ids)} scored questions have no GPT grade: {missing[0]}, ...")
        means[tag] = sum(grades[key] for key in ids) / max(len(ids), 1)
    match = (100 * f1 + means[MATCH]) / 2
    final = known + WEIGHTS["gpt"] * means[GPT] / 100 + WEIGHTS["match"] * match / 100
    return figures | {"gpt": means[GPT], "match": match, "final": final}


# --- language ---------------------------------------------------------------------------------------------------
#
# BLEU over a corpus without smoothing (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr-D (Vedantam et al. 2015),
# with one reference each, as the evaluation of image captions defines them. Words are found by an expression of our own
# where the usual tools start a Java program, so that figures can differ a little from published ones.


MOST = 4
"""Longest n-grams."""
_WORD = re.compile(r"\w+(?:[.'-]\w+)*")
_BETA = 1.2  # weight of recall in ROUGE-L
_SIGMA = 6.0  # words of difference in length that CIDEr-D forgives


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation around them."""
    return _WORD.findall(text.lower())


def language_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`bleu_1` ... `bleu_4`, `rouge_l` (0 to 1) and `cider` (0 to 10) of a corpus; 0 where it is empty.

    CIDEr weighs words by how few references have them: in a corpus of one pair, or of equal references, it is 0.
    """
    pairs = [(words(answer), words(reference)) for answer, reference in zip(answers, references, strict=True)]
    scores = {f"bleu_{n}": value for n, value in enumerate(_bleu(pairs), 1)}
    rouge = [_rouge_l(*pair) for pair in pairs]
    return {**scores, "rouge_l": sum(rouge) / max(len(rouge), 1), "cider": _cider(pairs)}


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _bleu(pairs: Sequence[tuple[list[str], list[str]]]) -> list[float]:
    said = sum(len(answer) for answer, _ in pairs)
    wanted = sum(len(reference) for _, reference in pairs)
    brevity = math.exp(min(0.0, 1 - wanted / said)) if said else 0.0
    product, scores = 1.0, []
    for n in range(1, MOST + 1):
        matched = sum((_grams(answer, n) & _grams(reference, n)).total() for answer, reference in pairs)
        total = sum(max(len(answer) - n + 1, 0) for answer, _ in pairs)
        product *= matched / total if total else 0.0
        scores.append(product ** (1 / n) * brevity)
    return scores


def _rouge_l(answer: list[str], reference: list[str]) -> float:
    common = _common(answer, reference)
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous = 0
        for i, other in enumerate(second, 1):
            previous, row[i] = row[i], previous + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]


def _cider(pairs: Sequence[tuple[list[str], list[str]]]) -> float:
    if not pairs:
        return 0.0
    total = 0.0
    for n in range(1, MOST + 1):
        counts = [(_grams(answer, n), _grams(reference, n)) for answer, reference in pairs]
        documents = Counter(gram for _, reference in counts for gram in reference)
        for (answer, reference), (said, wanted) in zip(counts, pairs, strict=True):
            weights = [
                {gram: times * math.log(len(pairs) / max(documents[gram], 1)) for gram, times in side.items()}
                for side in (answer, reference)
            ]
            total += _similarity(*weights) * math.exp(-((len(said) - len(wanted)) ** 2) / (2 * _SIGMA**2))
    return 10 * total / (MOST * len(pairs))


def _similarity(answer: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Cosine in which a gram said too often counts as often as in the reference."""
    product = sum(min(weight, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, weight in answer.items())
    norms = [math.sqrt(sum(weight**2 for weight in side.values())) for side in (answer, reference)]
    return product / (norms[0] * norms[1]) if all(norms) else 0.0


# --- files ------------------------------------------------------------------------------------------------------


def load_truth(path: str | Path) -> dict[str, Any]:
    """DriveLM's scenes with tagged questions."""
    content = read_json(path, "truth file", unique_keys=True)
    return check(content, TRUTH, str(path))


def load_grades(path: str) -> dict[str, float]:
    """Question id -> GPT's grade from 0 to 100."""
    return check(read_json(path, "grade file", unique_keys=True), MapOf(between(0, 100), least=1), path)


def score_files(truth: str, result_file: str, gpt_scores: str | None = None) -> dict[str, Any]:
    """`evaluate_drivelm` on files; raises `UserError` when no answer belongs to a question."""
    grades = load_grades(gpt_scores) if gpt_scores else None
    result = evaluate_drivelm(load_truth(truth), load_answers(result_file, keep_torn=True), grades)
    require_joined(result["samples"], result_file, f"a question of {Path(truth).name}")
    return result


PERCENT = ("accuracy", "match_f1", "match", "gpt", "graph_questions", "graph_objects")


def print_scores(result: Mapping[str, Any]) -> None:
    """One figure a line; `local` says that it is no final score."""
    for name, value in flat_result(result).items():
        if name in PERCENT:
            print(f"{name}: {value:.2f}%")
        elif name == "local":
            print(f"local: {value:.4f} of 0.5 (no final score: half of its weight needs GPT's grades)")
        elif name != "samples":
            print(f"{name}: {value:.4f}")


def flat_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures without the coverage."""
    return {name: value for name, value in result.items() if name != "coverage"}


class DriveLm(Task):
    def check_truth(self, folder: Path, questions: Sequence[Question]) -> str:
        known = {question.id for frame in frames(load_truth(folder / self.truth[0])) for question in frame}
        return covered(known, questions, id_of, self.truth[0])


TASK = DriveLm(
    name="drivelm",
    title="DriveLM",
    folder="drivelm",
    question_file="llava_drivelm.jsonl",
    image_folder="../nuscenes",
    truth=("drivelm_truth.json",),
    source="DriveLM-nuScenes v1.1 (train) through scripts/convert_drivelm_for_eval.py; images: nuScenes, nuscenes.org",
    server="DriveLM's server for the test split, with a GPT model; here accuracy, language and match",
)
