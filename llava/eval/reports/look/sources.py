"""Runs as a report reads them: answers, and what belongs to them by their metadata: traces, questions, pictures, truth.

A folder stands for the answer files below it, as the demo and the comparison leave them: `SET/SETTING.jsonl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.answering.metadata import read_metadata
from llava.eval.answering.records import key_hash
from llava.eval.answering.sums import FAILED, TOKENS
from llava.eval.common.jsonio import iter_jsonl, require_folder
from llava.eval.common.questions import Question
from llava.eval.reports.look.traces import Looked, read_line
from llava.eval.tasks.join import load_answers
from llava.eval.tasks.readers import images_of_run, questions_of_run
from llava.eval.tasks.registry import TASKS, get_task
from llava.eval.tasks.task import Grader, Task, Truths
from llava.schema import NUMBER, Fields, at_least, optional
from llava.utils import UserError

_COUNT = optional(at_least(0, NUMBER))
_COUNTS = Fields(
    {f"{name}?": _COUNT for name in ("visual", "nominal", "processed", "flops", "dense_flops", "prefill_ms")}
)


@dataclass(frozen=True)
class Where:
    """What the flags say instead of the metadata of runs; None: nothing."""

    data_dir: Path | None = None
    question_file: str | None = None
    image_folder: Path | None = None
    benchmark: str | None = None


@dataclass
class Truth:
    """What is known about the questions of a benchmark beside the answers. data_dir: None where only the questions are
    known; problems: why something is not known.
    """

    task: Task | None = None
    data_dir: Path | None = None
    grade: Grader | None = None
    truth: Truths | None = None
    questions: Mapping[int, Question] = field(default_factory=dict)
    image_folder: Path | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def credit(self, answer: Mapping[str, Any]) -> float | None:
        """From 0 to 1; None without truth."""
        return None if self.grade is None else _told(self.grade, answer)

    def words(self, answer: Mapping[str, Any]) -> str | None:
        """What would have been right."""
        return None if self.truth is None else _told(self.truth, answer)


def _told(tell: Callable[[Mapping[str, Any]], Any], answer: Mapping[str, Any]) -> Any:
    try:
        return tell({"prompt": "", **answer})
    except (ValueError, KeyError, IndexError):  # an id or a text that this benchmark cannot have
        return None


@dataclass
class AnswerSet:
    """The answers of a run to one benchmark, by the hash of id and prompt; so are the traces.

    Attributes:
        run: name of the run.
        benchmark: title of the benchmark.
        options: of the method, as the answers carry them.
        model: name of the checkpoint.
    """

    run: str
    benchmark: str
    path: Path
    answers: Mapping[int, Mapping[str, Any]]
    traces: Mapping[int, Looked]
    options: Mapping[str, Any]
    model: str
    truth: Truth

    @property
    def method(self) -> str:
        """Name of the method; empty for answers of another program."""
        return str(self.options.get("method") or "")


def hash_of(record: Mapping[str, Any]) -> int:
    """What an answer, a trace or a question is recognized by."""
    return key_hash(record["question_id"], record.get("prompt") or "")


def expand(arguments: Sequence[str]) -> list[tuple[str | None, Path]]:
    """`[NAME=]PATH` arguments as names (None: not given) and answer files; a folder becomes the files below it."""
    found: list[tuple[str | None, Path]] = []
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        named = bool(equals and name and rest) and not Path(argument).exists()
        path = Path(rest if named else argument)
        files = [path]
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*.jsonl")) if is_answers(file)]
            if not files:
                raise UserError(f"{path}: holds no answer file")
        found += [(name if named else None, file) for file in files]
    return found


def is_answers(path: Path) -> bool:
    """Whether a file of JSON lines is one of answers: traces and questions have other keys."""
    try:
        _, first = next(iter_jsonl(path, "answer file"))
    except (StopIteration, UserError):
        return False
    return {"question_id", "prompt", "text", "metadata"} <= set(first)


def answers_of(path: Path) -> tuple[dict[int, dict[str, Any]], dict[str, Any], str]:
    """The answers of a file by hash, the options of their run, and the name of the model."""
    records = load_answers(str(path), keep_torn=True)
    if not records:
        raise UserError(f"{path}: holds no answer")
    answers = {hash_of(record): _checked(record, str(path)) for record in records}
    first = _object(records[0], "metadata")
    options = {key: value for key, value in first.items() if key not in (TOKENS, FAILED)}
    return answers, options, str(records[0].get("model_id") or "")


class Reader:
    """Reads answer files; what several of them share, a benchmark's truth say, is read once."""

    def __init__(self, where: Where, traces: Mapping[str | None, Sequence[str]]) -> None:
        self.where, self._traces = where, traces
        self._truths: dict[tuple[Any, ...], Truth] = {}

    def read(self, path: Path, name: str | None) -> AnswerSet:
        """One answer file."""
        answers, options, model = answers_of(path)
        arguments = _object(read_metadata(path) or {}, "arguments")
        truth = self._truth(path, arguments, options)
        run = name or _run_name(path, options)
        return AnswerSet(
            run,
            truth.task.title if truth.task else self._benchmark(path, arguments),
            path,
            answers,
            self._looked(path, name, arguments),
            options,
            model,
            truth,
        )

    def _benchmark(self, path: Path, arguments: Mapping[str, Any]) -> str:
        file = self.where.question_file or arguments.get("question_file")
        return Path(str(file)).stem if file else path.parent.name or "answers"

    def _looked(self, path: Path, name: str | None, arguments: Mapping[str, Any]) -> dict[int, Looked]:
        """Traces of a run: those that are named for it, or what its own --trace-file has left."""
        files = list(self._traces.get(name, ()))
        if not files and name is not None:
            files = list(self._traces.get(None, ()))
        own = arguments.get("trace_file")
        if not files and isinstance(own, str) and own:
            # A folder of results may have been moved as a whole.
            files = [str(file) for file in (Path(own), path.with_name(Path(own).name)) if file.is_file()][:1]
        looked = {}
        for file in files:
            for number, line in iter_jsonl(file, "trace file"):
                trace = read_line(line, f"{file}:{number}")
                looked[hash_of(line)] = trace
        return looked

    def _truth(self, path: Path, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Truth:
        where = self.where
        file = where.question_file or arguments.get("question_file")
        file = str(file) if isinstance(file, str) and file else None
        task, data_dir = _task_of(where.benchmark, file, path)
        data_dir = where.data_dir or data_dir
        if task is not None and data_dir is not None and not (file and Path(file).is_file()):
            file = str(task.questions_path(data_dir))
        folder = where.image_folder or arguments.get("image_folder")
        shape = tuple(options.get(name) for name in ("all_rounds", "single_pred_prompt"))
        key = (task, data_dir, file, str(folder), shape)
        if key not in self._truths:
            self._truths[key] = self._read_truth(task, data_dir, file, folder, options)
        return self._truths[key]

    def _read_truth(
        self, task: Task | None, data_dir: Path | None, file: str | None, folder: Any, options: Mapping[str, Any]
    ) -> Truth:
        known = Truth(task)
        if file is None or not Path(file).is_file():
            what = f"the question file {file} is not there" if file else "give --question-file or --data-dir"
            known.problems.append(f"no pictures: {what}")
            return known
        if task is not None and task.tool == "model_vqa_mmbench" and "all_rounds" not in options:
            options = {**options, "all_rounds": False}
        if task is not None and task.tool == "model_vqa_science" and "single_pred_prompt" not in options:
            questions: Sequence[Question] = [] if data_dir is None else task.ask(data_dir).questions
        else:
            questions = questions_of_run(file, options)
        known.questions = {key_hash(question.id, question.text): question for question in questions}
        known.images = images_of_run(file, options)
        known.image_folder = Path(str(folder)) if folder else None
        if task is not None and data_dir is not None:
            known.data_dir = data_dir
            if known.image_folder is None or not known.image_folder.is_dir():
                known.image_folder = task.images_path(data_dir)
            try:
                known.grade, known.truth = task.grader(data_dir), task.truths(data_dir)
            except UserError as error:
                known.problems.append(f"no truth of {task.title}: {error}")
        return known


def _object(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _checked(record: dict[str, Any], path: str) -> dict[str, Any]:
    """The answer with its token counts, as far as they are numbers."""
    metadata = record.get("metadata")
    tokens = metadata.get(TOKENS) if isinstance(metadata, dict) else None
    if tokens is not None and _COUNTS.problem(tokens) is not None:
        raise UserError(f"{path}: question {record['question_id']}: 'tokens' in the metadata are no token counts")
    failed = metadata.get(FAILED) if isinstance(metadata, dict) else None
    return {**record, TOKENS: tokens or {}, FAILED: failed}


def _run_name(path: Path, options: Mapping[str, Any]) -> str:
    method = options.get("method")
    if not method:
        return path.stem
    budget = options.get("target_tokens") or options.get("target_ratio")
    return str(method) if method == "dense" or budget is None else f"{method} {budget}"


def _task_of(wanted: str | None, file: str | None, answers: Path) -> tuple[Task | None, Path | None]:
    """The benchmark of a question file, by its name and folder, and the data folder above it."""
    if wanted is not None:
        task: Task | None = get_task(wanted)
    else:
        names = [answers.parent.name]  # as the demo and the comparison leave answers
        task = next((task for task in TASKS if task.key in names), None)
        if file is not None:
            place = Path(file).parts
            task = next((t for t in TASKS if place[-len(p := _place(t)) :] == p), task)
    if task is None or file is None:
        return task, None
    inside = _place(task)
    whole = Path(file).parts
    return task, Path(*whole[: -len(inside)]) if whole[-len(inside) :] == inside else None


def _place(task: Task) -> tuple[str, ...]:
    return (Path(task.folder) / task.question_file).parts


# --- flags -----------------------------------------------------------------------------------------------------------


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Where questions, pictures and truth are, where the metadata of the runs do not say it (or say it wrongly)."""
    group = parser.add_argument_group("sources")
    group.add_argument(
        "--traces", nargs="+", default=[], metavar="[NAME=]PATH",
        help="trace files of the runs; default: what the runs' own --trace-file has left",
    )  # fmt: skip
    group.add_argument(
        "--data-dir", default=None, help="benchmark data in upstream's layout: questions, pictures, truth"
    )
    group.add_argument("--benchmark", default=None, help="benchmark of the answers; default: by the question file")
    group.add_argument("--question-file", default=None, help="question file; default: by the metadata of the runs")
    group.add_argument("--image-folder", default=None, help="folder of the pictures; default: by the metadata")


def read_sets(args: argparse.Namespace, arguments: Sequence[str]) -> list[AnswerSet]:
    """The answer sets that `arguments` name, with what the source flags say of them."""
    found = expand(arguments)
    names = {name for name, _ in found}
    reader = Reader(_where(args), _traces(args.traces, names, len(found)))
    return [reader.read(path, name) for name, path in found]


def _where(args: argparse.Namespace) -> Where:
    folders = {
        name: None if value is None else require_folder(value, what)
        for name, value, what in (
            ("data_dir", args.data_dir, "data folder"),
            ("image_folder", args.image_folder, "image folder"),
        )
    }
    return Where(folders["data_dir"], args.question_file, folders["image_folder"], args.benchmark)


def _traces(arguments: Iterable[str], names: set[str | None], files: int) -> Mapping[str | None, Sequence[str]]:
    """Trace files by the name of the run; one without a name belongs to the one answer file that there is."""
    found: dict[str | None, list[str]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            if files > 1:
                raise UserError(f"--traces {argument}: whose? name the runs, and give NAME={argument}")
            found.setdefault(None, []).append(argument)
        elif name not in names:
            raise UserError(f"--traces {argument}: no run has the name {name!r}; give runs as NAME=ANSWERS")
        else:
            found.setdefault(name, []).append(path)
    return found
