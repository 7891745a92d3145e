"""One run shared by several processes, on one machine or many.

The processes talk to each other once, at the start: process 0 sees what is answered, deals out the rest and tells the
others. From then on each works alone on a file of its own, so the death of one costs no other anything; who finishes
last merges. The files must lie where all processes see them.

The environment is that of torchrun and `accelerate launch`: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llava.eval.answering.answer_file import AnswerFile
from llava.eval.answering.dealing import crop_counter, deal, question_costs
from llava.eval.answering.loop import Evaluation, other_chunk
from llava.eval.answering.merging import check_same_run, merge, read_part
from llava.eval.answering.metadata import RunMetadata, describe_run, make_room, read_metadata
from llava.eval.answering.peers import Peers
from llava.eval.answering.records import RecordFile, match, question_hashes, read_hashes
from llava.eval.common.jsonio import write_json, write_lines_atomic
from llava.eval.common.locking import FileLock
from llava.eval.common.outputs import TRACES
from llava.eval.common.paths import meta_path, part_path, parts_folder
from llava.eval.common.questions import Question
from llava.utils import INCOMPLETE_STATUS, UserError

_LEAVING = 5.0  # seconds that process 0 waits for the others to have heard the result
_MERGE_WAIT = 600.0  # seconds to wait for another process that merges
_PLAN = "plan.json"


@dataclass(frozen=True)
class World:
    """Which process this is (from 0), of how many, and its number on this machine.

    The variables are those that accelerate's `PartialState` reads, which is not used because it also opens a process
    group: where a process never comes, the others wait in it for half an hour (measured with a limit of 20 s: 21 s) and
    end in a `DistStoreError`, and a death later on stops all that still talk to each other. Nothing here needs
    collectives; processes agree once and then work alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """What the launcher says; one process without a launcher.

        Raises:
            UserError: the variables contradict each other.
        """
        try:
            size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
            local = int(os.environ.get("LOCAL_RANK", rank))
        except ValueError:
            raise UserError("RANK, WORLD_SIZE and LOCAL_RANK must be numbers; start with accelerate launch") from None
        if size > 1 and "RANK" not in os.environ:
            raise UserError("WORLD_SIZE is set but RANK is not; start with accelerate launch, or unset WORLD_SIZE")
        if not 0 <= rank < size:
            raise UserError(f"RANK {rank} does not fit WORLD_SIZE {size}")
        return cls(rank, size, local)

    def device(self) -> str | None:
        """The device of this process where the user names none: one GPU each; None leaves the choice to the loader."""
        import torch

        if self.size == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"


def existing_parts(path: str | os.PathLike[str]) -> list[Path]:
    """Parts that earlier or present processes have written."""
    return sorted(parts_folder(path).glob("part-*.jsonl"))


def all_parts(path: str | os.PathLike[str]) -> list[Path]:
    """The same with those that a process has locked and not written yet."""
    locked = [
        lock.with_name(lock.name[1:].removesuffix(".lock")) for lock in parts_folder(path).glob(".part-*.jsonl.lock")
    ]
    return sorted({*existing_parts(path), *locked})


def is_shared(path: str | os.PathLike[str]) -> bool:
    """Whether several processes write a file, or have left parts of it."""
    return bool(all_parts(path)) or (parts_folder(path) / _PLAN).exists()


def remove_parts(path: str | os.PathLike[str]) -> None:
    """Removes the parts of a file, their metadata and the plan; whatever else lies in the folder stays."""
    folder = parts_folder(path)
    for part in existing_parts(path):
        part.unlink(missing_ok=True)
        meta_path(part).unlink(missing_ok=True)
    (folder / _PLAN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


# --- the one conversation --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What a process has to do: its questions, and the number of the plan they belong to."""

    questions: Sequence[Question]
    plan: str


@dataclass
class Look:
    """What process 0 has seen: positions without an answer, their costs, and the answer file, which stays locked."""

    positions: np.ndarray
    costs: np.ndarray
    answers: AnswerFile


class Work(Protocol):
    """What `begin` returns: the share, with the lock on its part."""

    def release(self) -> None: ...


def share_work(
    world: World,
    questions: Sequence[Question],
    answers_file: str | os.PathLike[str],
    look: Callable[[], Look],
    begin: Callable[[Share], Work],
) -> tuple[Share, Any]:
    """Agrees with the other processes on who answers what; returns the share and what `begin` made of it.

    look: called in process 0 only. begin: locks the part of this process. Process 0 keeps the answer file locked until
    all have theirs, so that of two launches one goes on whole and one is refused whole.

    Raises:
        UserError: some process found something wrong, is missing or gone, or they do not share the folder.
    """
    if world.size == 1:
        with _planned(world, questions, answers_file, look) as plans:
            if "error" in plans[0]:
                raise UserError(plans[0]["error"])
            share = _share(questions, plans[0])
            return share, begin(share)
    work: Work | None = None
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(Peers(world.rank, world.size))
        others = range(1, world.size)
        try:
            if world.rank == 0:
                peers.hear({f"join/{rank}": rank for rank in others})
                plans = stack.enter_context(_planned(world, questions, answers_file, look))
                for rank in others:
                    peers.say(f"plan/{rank}", plans[rank])
                plan = plans[0]
            else:
                peers.say(f"join/{world.rank}", True)
                plan = peers.hear({f"plan/{world.rank}": 0})[f"plan/{world.rank}"]
            problem = plan.get("error") or _sees_plan(answers_file, plan["plan"])
            if not problem:
                share = _share(questions, plan)
                try:
                    work = begin(share)
                except UserError as error:
                    problem = str(error)
            if world.rank == 0:
                verdicts = peers.hear({f"verdict/{rank}": rank for rank in others})
                problem = next(filter(None, [problem, *verdicts.values()]), None)
                peers.say("result", problem)
                peers.hear({f"left/{rank}": rank for rank in others}, patience=_LEAVING)
            else:
                peers.say(f"verdict/{world.rank}", problem)
                problem = peers.hear({"result": 0})["result"]
                peers.say(f"left/{world.rank}", True)
            if problem:
                raise UserError(problem)
            return share, work
        except BaseException as error:
            if world.rank == 0:
                peers.say("result", str(error) or "process 0 was interrupted")
            if work is not None:
                work.release()
            raise


def _share(questions: Sequence[Question], plan: Mapping[str, Any]) -> Share:
    return Share([questions[i] for i in plan["positions"]], plan["plan"])


@contextlib.contextmanager
def _planned(
    world: World,
    questions: Sequence[Question],
    answers_file: str | os.PathLike[str],
    look: Callable[[], Look],
) -> Iterator[list[dict[str, Any]]]:
    """What every process has to be told. The answer file stays locked inside."""
    try:
        seen = look()
    except UserError as error:
        yield [{"error": str(error)}] * world.size
        return
    try:
        todo = [questions[i] for i in seen.positions.tolist()]
        dealt = deal(todo, seen.costs, world.size)
        plan = uuid.uuid4().hex
        write_json(parts_folder(answers_file) / _PLAN, {"plan": plan, "processes": world.size})
        plans = [{"plan": plan, "positions": seen.positions[part].tolist()} for part in dealt]
    except UserError as error:
        seen.answers.close()
        yield [{"error": str(error)}] * world.size
        return
    try:
        yield plans
    finally:
        seen.answers.close()


def _sees_plan(answers_file: str | os.PathLike[str], plan: str) -> str | None:
    folder = parts_folder(answers_file)
    try:
        seen = json.loads((folder / _PLAN).read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError):
        seen = None
    return None if seen == plan else f"not all processes see {folder}: answers must lie on a file system they share"


def look_at_answers(
    questions: Sequence[Question],
    args: Any,
    model_id: str,
    options: Mapping[str, Any],
    check: Callable[[dict[str, Any] | None], None],
    costs: Callable[[Sequence[Question]], np.ndarray],
) -> Look:
    """Which questions have an answer neither in the file nor in a part.

    args: the tools' flags; without `resume` what earlier runs have left is removed. check: refuses metadata of another
    run.

    Raises:
        UserError: the answers are of another run or another chunk, or another run is writing them.
    """
    answers_file = Path(args.answers_file)
    answers = AnswerFile(answers_file, model_id, options, args.resume)
    try:
        make_room(answers_file)
        for path in all_parts(answers_file):  # refuses if one of them is being written
            RecordFile(path, "answers file").close()
        if not args.resume:
            _start_over(answers, args.trace_file)
        if answers.has_answers:
            check(read_metadata(answers_file))
        hashes = [answers.found]
        for path in existing_parts(answers_file):
            part = AnswerFile(path, model_id, options)
            try:
                if part.has_answers:
                    check(read_metadata(path))
                hashes.append(part.found)
            finally:
                part.close()
        found = np.concatenate([np.asarray(part, dtype=np.uint64) for part in hashes])
        places = match(question_hashes(questions), found)
        if getattr(args, "num_chunks", 1) > 1 and (others := answers.others(questions)):
            raise UserError(other_chunk(answers_file, others))
        todo = np.ones(len(questions), dtype=bool)
        todo[places[places >= 0]] = False
        positions = np.flatnonzero(todo)
        return Look(positions, costs([questions[i] for i in positions.tolist()]), answers)
    except BaseException:
        answers.close()
        raise


def _start_over(answers: AnswerFile, trace_file: str | None) -> None:
    """Empties what earlier runs have left; a link stays one."""
    remove_parts(answers.path)
    answers.clear()
    meta_path(answers.path).unlink(missing_ok=True)
    if trace_file is not None:
        traces = RecordFile(trace_file, "trace file", TRACES)
        try:
            remove_parts(trace_file)
            if traces.path.exists():
                traces.open(keep=False)
        finally:
            traces.close()


# --- the end ---------------------------------------------------------------------------------------------------


def finish_together(
    world: World, share: Share, questions: Sequence[Question], answers_file: Path, trace_file: str | None
) -> dict[str, int] | None:
    """Called by every process that has done its share: the last one merges.

    Returns the counts of the merged metadata, or None if other processes are still at work (or ended before they were
    done; the same command then finishes it).
    """
    lock = FileLock(answers_file, "answers file", wait=_MERGE_WAIT)
    try:
        plan = parts_folder(answers_file) / _PLAN
        if not plan.exists() or json.loads(plan.read_text(encoding="utf-8"))["plan"] != share.plan:
            meta = read_metadata(answers_file)  # another process was the last one and has merged
            return None if meta is None else meta["counts"]
        for rank in range(world.size):
            meta = read_metadata(part_path(answers_file, rank))
            if meta is None or not meta["complete"] or meta.get("plan") != share.plan:
                return None
        own = [answers_file] if answers_file.exists() else []
        parts = [read_part(path, unfinished=True) for path in [*own, *existing_parts(answers_file)]]
        check_same_run(parts, unfinished=True)
        merge(answers_file, questions, parts, allow_missing=True, keep_others=True)
        if trace_file is not None:
            _merge_traces(Path(trace_file), questions)
        merged = read_metadata(answers_file)
        assert merged is not None  # just written
        remove_parts(answers_file)
        return merged["counts"]
    finally:
        lock.release()


def _merge_traces(target: Path, questions: Sequence[Question]) -> None:
    """One line per question, in order, of the trace file and its parts."""
    paths = [path for path in [target, *existing_parts(target)] if path.exists()]
    read = [read_hashes(path) for path in paths]
    places = match(question_hashes(questions), np.concatenate([hashes for hashes, _ in read]))
    owner = np.concatenate([np.full(len(hashes), i) for i, (hashes, _) in enumerate(read)])
    starts = np.concatenate([starts for _, starts in read])
    chosen = np.flatnonzero(places >= 0)
    chosen = chosen[np.argsort(places[chosen], kind="stable")]

    def lines() -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb")) for path in paths]
            for i in chosen:
                files[owner[i]].seek(int(starts[i]))
                yield files[owner[i]].readline()

    write_lines_atomic(target, lines())
    remove_parts(target)


class Whole:
    """A run as a whole, of which this process may do only a part.

    Use: construct, `own_share`, and `merge_if_last` when the share is done.

    Attributes:
        share: what is dealt out to this process; None if it does everything.
    """

    def __init__(
        self, args: argparse.Namespace, questions: Sequence[Question], model_id: str, options: Mapping[str, Any]
    ) -> None:
        self.args, self.questions, self.model_id, self.options = args, questions, model_id, options
        self.share: Share | None = None

    def own_share(self, world: World, image_folder: Path) -> Evaluation:
        """The evaluation of what this process has to do: everything, if it is the only one and nobody left parts."""
        if world.size == 1 and not is_shared(self.args.answers_file):
            return Evaluation(self.args, self.questions, self.model_id, self.options)
        args = self.args
        crops = crop_counter(args.model_path)
        described = describe_run(args, self.model_id, self.options, len(self.questions))

        def look() -> Look:
            return look_at_answers(
                self.questions,
                args,
                self.model_id,
                self.options,
                lambda meta: RunMetadata(args.answers_file, described).continue_from(meta),
                lambda questions: question_costs(questions, image_folder, crops),
            )

        own = {"answers_file": str(part_path(args.answers_file, world.rank)), "resume": True}
        if args.trace_file is not None:
            own["trace_file"] = str(part_path(args.trace_file, world.rank))
        part_args = argparse.Namespace(**{**vars(args), **own})
        process = (world.rank, world.size)

        def begin(share: Share) -> Evaluation:
            extra = {"plan": share.plan}
            return Evaluation(part_args, share.questions, self.model_id, self.options, process, extra)

        self.share, evaluation = share_work(world, self.questions, args.answers_file, look, begin)
        return evaluation

    def merge_if_last(self, world: World, status: int) -> int:
        """Merges if all other processes are done as well; returns the exit status, `status` if there is no other."""
        args = self.args
        if self.share is None:
            return status
        counts = finish_together(world, self.share, self.questions, Path(args.answers_file), args.trace_file)
        if counts is None:
            if not args.quiet:
                print(
                    f"process {world.rank + 1} of {world.size} is done; the last one merges into {args.answers_file}. "
                    "If another one ended early, run the same command again: what is answered is kept",
                    file=sys.stderr,
                )
            return status
        if not args.quiet:
            print(
                f"{counts['answered']} of {counts['total']} questions are answered in {args.answers_file}",
                file=sys.stderr,
            )
        return INCOMPLETE_STATUS if counts["skipped"] or counts["failed"] else 0
