"""One file under two names, two files under nearly one name: links, locks, metadata, doubles, changes from outside."""

import errno
import json
import os
import signal
import stat
import time

import numpy as np
import pytest

from llava.eval.answering import records
from llava.eval.answering.answer_file import AnswerFile
from llava.eval.answering.answerer import Answerer
from llava.eval.answering.records import RecordFile, doubled, whole_lines
from llava.eval.common import locking
from llava.eval.common.locking import FileLock
from llava.eval.common.paths import former_meta_path, meta_path, parts_folder
from llava.eval.common.questions import Question
from llava.eval.model_vqa_loader import main
from llava.utils import UserError
from tests.eval.helpers import fails_with_one_line, read_json, read_jsonl, write_jsonl
from tests.eval.processes import Child, needs_fork, wait_until

pytestmark = needs_fork


def names_of(path):
    """Other names of a file: a symbolic link, a hard link in another folder, a way around."""
    folder = path.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    (folder / "soft.jsonl").symlink_to(path)
    if path.exists():
        os.link(path, folder / "hard.jsonl")
        yield folder / "hard.jsonl"
    yield folder / "soft.jsonl"
    yield folder / ".." / path.name


def taken_by_child(path, log):
    """Whether another process gets the lock."""

    def take():
        try:
            FileLock(path, "answers file")
        except UserError as error:
            print(error)
            return 2
        return 0

    child = Child(take, log)
    return child.wait() == 0


@pytest.mark.parametrize("there", [False, True])
def test_a_lock_holds_under_every_name(tmp_path, there):
    path = tmp_path / "a.jsonl"
    if there:
        path.write_text("")
    lock = FileLock(path, "answers file")
    names = [path, *names_of(path)]
    for name in names:
        with pytest.raises(UserError, match="is being written by another run"):
            FileLock(name, "answers file")
        # The refusal has not given away what is held: POSIX locks end with any descriptor of their file.
        assert not any(taken_by_child(other, tmp_path / "log") for other in names)
    lock.release()
    for name in names:
        FileLock(name, "answers file").release()
    assert not list(tmp_path.rglob(".*"))


def test_a_file_that_comes_later_is_locked_as_well(tmp_path):
    file = RecordFile(tmp_path / "a.jsonl", "answers file")
    file.open(keep=True)
    os.link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert not taken_by_child(tmp_path / "b.jsonl", tmp_path / "log")
    pid = os.fork()
    if pid == 0:  # a worker that outlives its parent's run must not keep the lock
        signal.pause()
        os._exit(0)
    file.close()
    try:
        assert taken_by_child(tmp_path / "b.jsonl", tmp_path / "log")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys, number):
    def refuse(*args):
        raise OSError(getattr(errno, number), "no locks here")

    monkeypatch.setattr(locking.fcntl, "lockf", refuse)
    monkeypatch.setattr(locking.fcntl, "flock", refuse)
    monkeypatch.setattr(locking, "_told", set())
    (tmp_path / "a.jsonl").touch()
    for _ in range(2):
        FileLock(tmp_path / "a.jsonl", "answers file").release()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "cannot be locked" in told[0] and "a.jsonl" in told[0]
    assert not (tmp_path / ".a.jsonl.lock").exists()


@pytest.mark.parametrize("plant", ["soft", "hard", "pipe", "folder"])
def test_a_planted_lock_file_is_refused_and_its_target_kept(tmp_path, plant):
    victim, lock = tmp_path / "victim", tmp_path / ".a.jsonl.lock"
    victim.write_text("precious")
    {
        "soft": lambda: lock.symlink_to(victim),
        "hard": lambda: os.link(victim, lock),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[plant]()
    with pytest.raises((UserError, IsADirectoryError)):
        FileLock(tmp_path / "a.jsonl", "answers file")
    assert victim.read_text() == "precious"


@pytest.fixture
def slow(monkeypatch):
    answer = Answerer.answer

    def slowly(self, samples, run):
        time.sleep(0.03)
        return answer(self, samples, run)

    monkeypatch.setattr(Answerer, "answer", slowly)


@pytest.mark.parametrize("link", ["soft", "hard"])
def test_two_runs_through_a_link_cannot_both_write(argv, data, preloaded, slow, link):
    write_jsonl(data / "q.jsonl", [{"question_id": i, "text": f"{i}?"} for i in range(40)])
    (data / "a.jsonl").touch()
    (data / "b.jsonl").symlink_to("a.jsonl") if link == "soft" else os.link(data / "a.jsonl", data / "b.jsonl")
    first = Child(lambda: main(argv()), data / "log")
    wait_until(lambda: (data / "a.jsonl").stat().st_size > 0, first)
    second = Child(lambda: main(argv(answers="b.jsonl")), data / "second")
    assert second.wait() == 2 and "is being written by another run" in second.text()
    assert first.wait() == 0
    assert [r["question_id"] for r in read_jsonl(data / "a.jsonl")] == list(range(40))
    # Afterwards either name does: nothing is asked again, and the link is still one.
    assert main(argv(answers="b.jsonl")) == 0
    assert [r["question_id"] for r in read_jsonl(data / "b.jsonl")] == list(range(40))
    assert (data / "b.jsonl").is_symlink() == (link == "soft")


def test_a_sorted_file_keeps_link_and_permissions(argv, data, preloaded):
    (data / "real").mkdir()
    (data / "a.jsonl").symlink_to(data / "real" / "answers")
    assert main(argv("--batch-size", 4)) == 0
    real = data / "real" / "answers"
    real.chmod(0o600)
    whole = real.read_bytes()
    real.write_bytes(b"".join(reversed(whole.splitlines(keepends=True))))
    assert main(argv("--batch-size", 4)) == 0
    assert (data / "a.jsonl").is_symlink() and real.read_bytes() == whole
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


# --- metadata ---


def test_names_do_not_share_metadata_or_parts():
    names = ["run.64", "run.128", "run.jsonl", "run.64.txt", "d.trace", "d.jsonl", "run.JSONL"]
    for function in (meta_path, parts_folder):
        assert len({function(name) for name in names}) == len(names)
    assert meta_path("x/a.jsonl").name == "a.meta.json" and parts_folder("a.v1.jsonl").name == "a.v1.parts"


def test_two_budgets_behind_the_last_dot(argv, data, preloaded, capsys):
    for budget in (4, 8):
        assert main(argv("--target-token-num", budget, "--limit", 3, answers=f"run.{budget}")) == 0
    for budget in (4, 8):
        assert main(argv("--target-token-num", budget, answers=f"run.{budget}")) == 0
        meta = read_json(data / f"run.{budget}.meta.json")
        assert meta["options"]["target_tokens"] == budget and meta["counts"]["answered"] == 7
    # `run.4` and `run.4.jsonl` would share their metadata: whoever comes second is refused, also when starting over.
    for flags in ((), ("--overwrite",)):
        fails = argv("--target-token-num", 4, *flags, answers="run.4.jsonl")
        capsys.readouterr()
        fails_with_one_line(main, fails, capsys, "run.4.meta.json", "the metadata of run.4,")
    assert read_json(data / "run.4.meta.json")["counts"]["answered"] == 7


def test_a_run_with_its_metadata_under_the_former_name_goes_on(argv, data, preloaded, capsys):
    assert main(argv("--limit", 3, answers="run.64")) == 0
    (data / "run.64.meta.json").rename(former_meta_path(data / "run.64"))
    capsys.readouterr()
    fails_with_one_line(main, argv("--dtype", "float16", answers="run.64"), capsys, "dtype")
    # Another run under that name does not take them away.
    assert main(argv("--limit", 2, answers="run.jsonl")) == 0
    assert read_json(data / "run.64.meta.json")["counts"]["total"] == 3
    assert main(argv(answers="run.64")) == 0
    meta = read_json(data / "run.64.meta.json")
    assert meta["counts"]["answered"] == 7 and meta["timing"]["samples"] == 7
    assert read_json(data / "run.meta.json")["counts"]["total"] == 2


def test_a_copied_run_keeps_its_metadata(argv, data, preloaded):
    assert main(argv("--limit", 3)) == 0
    for suffix in ("jsonl", "meta.json"):
        (data / f"b.{suffix}").write_bytes((data / f"a.{suffix}").read_bytes())
    assert main(argv(answers="b.jsonl")) == 0
    assert read_json(data / "b.meta.json")["timing"]["samples"] == 7


# --- a finished run ---


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ((), ("--dtype", "bfloat16"), "dtype 'float32', now 'bfloat16'"),
        (("--dtype", "bfloat16"), (), "dtype 'bfloat16', now 'float32'"),
        ((), ("--attn-implementation", "eager"), "attn_implementation 'sdpa', now 'eager'"),
        (("--attn-implementation", "eager"), (), "attn_implementation 'eager', now 'sdpa'"),
        ((), ("--method", "fastv"), "method 'autoprune', now 'fastv'"),
    ],
)
def test_a_finished_run_is_checked_too(argv, data, capsys, before, after, difference):
    assert main(argv(*before)) == 0
    kept = (data / "a.jsonl").read_bytes()
    capsys.readouterr()
    fails_with_one_line(main, argv(*after), capsys, difference, "--overwrite")
    assert (data / "a.jsonl").read_bytes() == kept
    assert main(argv(*before)) == 0


def test_the_same_said_otherwise_is_no_difference(argv, preloaded):
    assert main(argv()) == 0
    assert main(argv("--dtype", "float32", "--attn-implementation", "sdpa")) == 0


def test_chunks_need_files_of_their_own(argv, data, preloaded, capsys):
    assert main(argv("--num-chunks", 2, "--chunk-idx", 0)) == 0
    kept = (data / "a.jsonl").read_bytes()
    capsys.readouterr()
    for flags in ((), ("--limit", 6)):
        command = argv("--num-chunks", 2, "--chunk-idx", 1, *flags)
        fails_with_one_line(main, command, capsys, "answers to questions of another chunk", "merge_answers")
    assert (data / "a.jsonl").read_bytes() == kept
    assert main(argv("--num-chunks", 2, "--chunk-idx", 0)) == 0
    # The whole continues a chunk, and is right.
    assert main(argv()) == 0 and main(argv(answers="whole.jsonl")) == 0
    assert (data / "a.jsonl").read_bytes() == (data / "whole.jsonl").read_bytes()
    assert read_json(data / "a.meta.json")["counts"]["answered"] == 7


# --- doubles, tails, changes from outside ---


def test_doubled_marks_the_earlier_records():
    asked, found = [1, 2, 2, 3], [2, 9, 1, 2, 1, 2, 9, 3]
    assert doubled(asked, found).tolist() == [True, False, True, False, False, False, False, False]
    draw = np.random.default_rng(0)
    for _ in range(50):
        asked, found = (draw.integers(0, 6, draw.integers(0, 12)).tolist() for _ in range(2))
        slow = [v in asked and found[i + 1 :].count(v) >= asked.count(v) for i, v in enumerate(found)]
        assert doubled(asked, found).tolist() == slow


@pytest.mark.parametrize("finished", [False, True])
def test_doubles_are_told_and_mended(argv, data, preloaded, capsys, finished):
    assert main(argv(answers="whole.jsonl")) == 0
    whole = (data / "whole.jsonl").read_bytes()
    assert main(argv(*([] if finished else ["--limit", 5]))) == 0
    lines = (data / "a.jsonl").read_bytes().splitlines(keepends=True)
    other = json.loads(lines[0]) | {"text": "an accident"}
    (data / "a.jsonl").write_bytes(json.dumps(other).encode() + b"\n" + b"".join([*lines, *lines[2:4]]))
    capsys.readouterr()
    assert main(argv()) == 0
    assert "3 answers repeat a question; the last one of each is kept" in capsys.readouterr().err
    assert (data / "a.jsonl").read_bytes() == whole
    meta, expected = read_json(data / "a.meta.json"), read_json(data / "whole.meta.json")
    assert meta["complete"] and all(meta[key] == expected[key] for key in ("counts", "tokens", "flops_ratio"))
    assert main(argv()) == 0 and "repeat" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 300_000, b"\0\0\0\n", b'{"question_id": 1, "pr\0\0\0\0', b'{"question_id": 9\0\0\n\0\0\n\0', b'{"q'],
)
def test_a_tail_that_a_power_cut_left_is_repaired(argv, data, preloaded, tail):
    assert main(argv()) == 0
    whole = (data / "a.jsonl").read_bytes()
    keep = whole.splitlines(keepends=True)[:3]
    (data / "a.jsonl").write_bytes(b"".join(keep) + tail)
    assert whole_lines(data / "a.jsonl") == len(b"".join(keep))
    assert main(argv()) == 0 and (data / "a.jsonl").read_bytes() == whole
    # Nothing pending: mended all the same.
    (data / "a.jsonl").write_bytes(whole + tail)
    assert main(argv()) == 0 and (data / "a.jsonl").read_bytes() == whole


def test_answers_in_another_encoding_are_no_tail(tmp_path):
    """Every second byte of them is NUL, and nothing of them is cut off."""
    path = tmp_path / "a.jsonl"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        content = "".join(f'{{"question_id": {i}, "prompt": "?", "text": "x"}}\n' for i in range(3)).encode(encoding)
        path.write_bytes(content)
        with pytest.raises(UserError):
            AnswerFile(path, "m", {})
        assert path.read_bytes() == content


CHANGES = {
    "appended": lambda path: path.open("ab").write(b'{"question_id": 5, "prompt": "x", "text": "y"}\n'),
    "emptied": lambda path: path.write_bytes(b""),
    "replaced": lambda path: (path.with_suffix(".new").write_bytes(b""), path.with_suffix(".new").replace(path)),
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_suffix(".moved")),
}


@pytest.mark.parametrize("when", [2, 7])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_from_outside_is_noticed(argv, data, preloaded, monkeypatch, capsys, change, when):
    """After the second answer, or after the last one."""
    append = records.RecordFile.append
    count = []

    def changing(self, record):
        append(self, record)
        count.append(1)
        if len(count) == when:
            CHANGES[change](data / "a.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(records.RecordFile, "append", changing)
        with pytest.raises(SystemExit) as exit_info:
            main(argv("--quiet"))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "a.jsonl was changed by another program during the run" in error, error
    assert not read_json(data / "a.meta.json")["complete"]
    if change == "removed":
        assert len(read_jsonl(data / "a.jsonl")) == when, "what was answered is back"
    if change == "appended":
        assert len(read_jsonl(data / "a.jsonl")) == when + 1, "nothing is cut off"
        (data / "a.jsonl").write_bytes(b"".join((data / "a.jsonl").read_bytes().splitlines(keepends=True)[:when]))
    assert main(argv()) == 0 and main(argv(answers="whole.jsonl")) == 0
    assert (data / "a.jsonl").read_bytes() == (data / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("option", ["--answers-file", "--trace-file"])
def test_an_output_that_is_a_pipe_hangs_nobody(argv, data, capsys, option):
    os.mkfifo(data / "pipe")
    fails_with_one_line(main, argv(option, data / "pipe"), capsys, "is a pipe, socket or device")
    with pytest.raises(UserError, match="is a pipe"):
        AnswerFile(data / "pipe", "m", {})


@pytest.mark.parametrize("option", ["--question-file", "--model-path"])
def test_an_input_that_is_a_pipe_hangs_nobody(argv, data, capsys, option):
    os.mkfifo(data / "pipe")
    fails_with_one_line(main, argv(option, data / "pipe"), capsys, "pipe")


def test_overwriting_through_the_library_needs_answers_too(tmp_path):
    path = tmp_path / "notes.txt"
    for resume in (True, False):
        path.write_text("Remember the milk")
        answers = AnswerFile(path, "m", {}, resume=resume)
        with pytest.raises(UserError, match="not a file of answers"):
            answers.open()
        answers.close()
        assert path.read_text() == "Remember the milk"
    question = Question(0, "q:1", 1, "What?")
    answers = AnswerFile(tmp_path / "new.jsonl", "m", {})
    answers.open()
    answers.append(question, "red")
    answers.close([question])
    assert len(read_jsonl(tmp_path / "new.jsonl")) == 1
