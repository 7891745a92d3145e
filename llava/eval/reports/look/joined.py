"""Runs joined question by question, as the page's data: small, and ready to be drawn.

The first run that is dense, or else the first one, is what the others are compared with when the page opens.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from llava.eval.answering.sums import FAILED, TOKENS
from llava.eval.common.questions import spread
from llava.eval.reports.look.pictures import Pictures
from llava.eval.reports.look.traces import Looked, packed
from llava.utils import UserError, visible

if TYPE_CHECKING:
    from llava.eval.reports.look.sources import AnswerSet

LONGEST_TEXT = 4000
MOST_PICTURE_BYTES = 12 * 2**20


@dataclass(frozen=True)
class Entry:
    """One question of a benchmark. sets: per run the answers that have it, None where the run has not."""

    benchmark: str
    key: int
    sets: Sequence[AnswerSet | None]

    @property
    def answers(self) -> list[Mapping[str, Any] | None]:
        """Per run the answer."""
        return [None if own is None else own.answers[self.key] for own in self.sets]

    @property
    def first(self) -> tuple[AnswerSet, Mapping[str, Any]]:
        """Any run's answer: question and picture are the same for all."""
        own = next(own for own in self.sets if own is not None)
        return own, own.answers[self.key]

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the question's pictures."""
        question = self.first[0].truth.questions.get(self.key)
        return () if question is None else question.images


@dataclass
class Joined:
    """All runs and benchmarks. entries: questions, benchmark by benchmark, in the order of the answer files."""

    runs: list[str]
    sets: list[AnswerSet]
    entries: list[Entry] = field(default_factory=list)

    def of_run(self, run: str) -> list[AnswerSet]:
        """The answer sets of one run."""
        return [own for own in self.sets if own.run == run]


def join(sets: Sequence[AnswerSet]) -> Joined:
    """Joins answer sets on benchmark, id and prompt; dense runs first.

    Answers of which nobody knows the benchmark belong to one that has the same questions.

    Raises:
        UserError: a run has two files of one benchmark.
    """
    runs = list(dict.fromkeys(own.run for own in sets))
    runs.sort(key=lambda run: next(own.method for own in sets if own.run == run) != "dense")
    joined = Joined(runs, list(sets))
    for own in sets:
        if own.truth.task is None:
            alike = next(
                (other for other in sets if other.truth.task and own.answers.keys() & other.answers.keys()), own
            )
            own.benchmark, own.truth = alike.benchmark, alike.truth
    for benchmark in dict.fromkeys(own.benchmark for own in sets):
        by_run: dict[str, AnswerSet] = {}
        for own in sets:
            if own.benchmark == benchmark and by_run.setdefault(own.run, own) is not own:
                raise UserError(
                    f"{own.path}: run {own.run!r} has answers to {benchmark} already ({by_run[own.run].path}); "
                    "give the runs names: NAME=PATH"
                )
        columns = [by_run.get(run) for run in runs]
        keys = dict.fromkeys(key for own in columns if own is not None for key in own.answers)
        joined.entries += [
            Entry(benchmark, key, [own if own is not None and key in own.answers else None for own in columns])
            for key in keys
        ]
    return joined


def choose(entries: Sequence[Entry], limit: int) -> list[Entry]:
    """About `limit` entries (0: all), spread evenly over each benchmark."""
    if not limit or len(entries) <= limit:
        return list(entries)
    chosen: list[Entry] = []
    for benchmark in dict.fromkeys(entry.benchmark for entry in entries):
        own = [entry for entry in entries if entry.benchmark == benchmark]
        chosen += spread(own, max(round(limit * len(own) / len(entries)), 1))
    return chosen


# --- the page's data ---------------------------------------------------------------------------------------------


def page_data(joined: Joined, entries: Sequence[Entry], title: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the page shows. preset: filters that are set when it opens.

    `problems` says what is missing in it, `notes` that and how many questions are shown.
    """
    pictures, rasters = Pictures(MOST_PICTURE_BYTES), Numbered()
    benchmarks = list(dict.fromkeys(entry.benchmark for entry in joined.entries))
    questions = [
        _question(entry, benchmarks.index(entry.benchmark), pictures, rasters)
        for entry in tqdm(entries, unit="question", leave=False, disable=None)
    ]
    notes, problems = [], []
    if len(entries) < len(joined.entries):
        notes.append(f"{len(entries)} of {len(joined.entries)} questions are shown; the scores are of all of them.")
    if pictures.problems:
        problems.append(f"{len(pictures.problems)} pictures cannot be read, the first: {pictures.problems[0]}")
    problems += dict.fromkeys(problem for own in joined.sets for problem in own.truth.problems)
    return {
        "title": title,
        "runs": [_run(run, joined.of_run(run)) for run in joined.runs],
        "benchmarks": benchmarks,
        "summary": summary(joined, benchmarks),
        "notes": [*notes, *map(visible, problems)],
        "problems": problems,
        "preset": dict(preset),
        "rasters": rasters.values,
        "pictures": pictures.as_json(),
        "questions": questions,
    }


class Numbered:
    """Values that are the same for many questions, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[str, int] = {}

    def number(self, value: Any) -> int:
        """The place of a value among `values`."""
        text = json.dumps(value, sort_keys=True)
        if text not in self._numbers:
            self._numbers[text] = len(self.values)
            self.values.append(value)
        return self._numbers[text]


def _run(name: str, sets: Sequence[AnswerSet]) -> dict[str, Any]:
    own = sets[0]
    options = {key: value for key, value in own.options.items() if value is not None}
    return {"name": name, "method": own.method, "model": own.model, "options": {k: str(v) for k, v in options.items()}}


def _question(entry: Entry, benchmark: int, pictures: Pictures, rasters: Numbered) -> dict[str, Any]:
    own, answer = entry.first
    numbers = [pictures.add((str(own.truth.image_folder), name), _loader(own, name)) for name in entry.images]
    return {
        "b": benchmark,
        "id": str(answer["question_id"]),
        "q": _cut(str(answer.get("prompt") or "")),
        "p": numbers,
        "y": _cut_or_none(own.truth.words(answer)),
        "a": [_answer(entry, own, answer, rasters) for own, answer in zip(entry.sets, entry.answers, strict=True)],
    }


def _loader(own: AnswerSet, name: str) -> Any:
    def load() -> Image.Image:
        import io

        from llava.eval.answering.answerer import SampleError, decode_image, open_image

        if name in own.truth.images:
            data = own.truth.images[name]
            return decode_image(lambda: io.BytesIO(base64.b64decode(data)), f"of row {name}")
        if own.truth.image_folder is None:
            raise SampleError(f"image {name}: no image folder is known, give --image-folder")
        return open_image(own.truth.image_folder, name)

    return load


def _answer(
    entry: Entry, own: AnswerSet | None, answer: Mapping[str, Any] | None, rasters: Numbered
) -> dict[str, Any] | None:
    if own is None or answer is None:
        return None
    looked = own.traces.get(entry.key)
    tokens = answer[TOKENS]
    flops, dense = tokens.get("flops"), tokens.get("dense_flops")
    visual, nominal, processed = (tokens.get(name) for name in ("visual", "nominal", "processed"))
    if looked is not None:
        visual = looked.visual if visual is None else visual
        flops, dense = (looked.flops, looked.dense_flops) if flops is None else (flops, dense)
        if nominal is None and looked.counts:
            nominal = statistics.fmean(looked.counts)
    return {
        "t": _cut(answer["text"]),
        "c": own.truth.credit(answer),
        "n": [visual, nominal, processed],
        "f": [flops, dense],
        "ms": tokens.get("prefill_ms"),
        "x": _cut_or_none(answer[FAILED]),
        "r": None if looked is None else _trace(looked, rasters),
    }


def _trace(looked: Looked, rasters: Numbered) -> dict[str, Any]:
    number = None if looked.rasters is None else rasters.number([dict(raster) for raster in looked.rasters])
    return packed(looked, number)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def _cut_or_none(text: Any) -> str | None:
    return None if text is None else _cut(str(text))


# --- the summary -------------------------------------------------------------------------------------------------


def summary(joined: Joined, benchmarks: Sequence[str]) -> list[dict[str, Any]]:
    """Per run: scores by benchmark, what is retained of the dense (or first) run's, mean costs."""
    rows = []
    for run in joined.runs:
        sets = {own.benchmark: own for own in joined.of_run(run)}
        scores = {name: _score(sets[name]) for name in benchmarks if name in sets}
        rows.append({"scores": [scores.get(name) for name in benchmarks], **_costs(list(sets.values()))})
    for row in rows:
        shares = [
            own["score"] / first["score"]
            for own, first in zip(row["scores"], rows[0]["scores"], strict=True)
            if own is not None and first is not None and own["score"] is not None and first["score"]
        ]
        row["retained"] = 100 * statistics.fmean(shares) if shares else None
    return rows


def _score(own: AnswerSet) -> dict[str, Any]:
    credits = [credit for answer in own.answers.values() if (credit := own.truth.credit(answer)) is not None]
    accuracy = 100 * statistics.fmean(credits) if credits else None
    task, data_dir = own.truth.task, own.truth.data_dir
    score, metric = accuracy, "right answers, %"
    if credits and task is not None and task.metric is not None and data_dir is not None:
        score, metric = task.score(data_dir, list(own.answers.values())).score, task.metric
    return {"score": score, "accuracy": accuracy, "metric": metric, "answers": len(own.answers), "graded": len(credits)}


def _costs(sets: Sequence[AnswerSet]) -> dict[str, Any]:
    tokens = [answer[TOKENS] for own in sets for answer in own.answers.values()]
    seen = [entry for entry in tokens if entry.get("visual")]
    means: dict[str, Any] = {
        name: statistics.fmean(values) if (values := [e[name] for e in seen if e.get(name) is not None]) else None
        for name in ("visual", "nominal", "processed")
    }
    dense = sum(entry.get("dense_flops") or 0 for entry in tokens)
    means["flops"] = sum(entry.get("flops") or 0 for entry in tokens) / dense if dense else None
    times = [t.seconds[1] for own in sets for t in own.traces.values() if t.seconds[1] is not None]
    measured = [entry["prefill_ms"] for entry in tokens if entry.get("prefill_ms") is not None]
    measured = measured or [1000 * seconds for seconds in times]
    means["prefill_ms"] = statistics.median(measured) if measured else None
    return means
