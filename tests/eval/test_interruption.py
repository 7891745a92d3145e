"""Runs that are killed, interrupted or out of disk space: nothing is lost, and the rerun ends like an unbroken run."""

import json
import os
import random
import resource
import signal
import time

import pytest

from llava.eval.answering import loading
from llava.eval.answering.answer_file import AnswerFile
from llava.eval.answering.answerer import Answerer
from llava.eval.model_vqa_loader import main
from tests.eval.helpers import read_json, read_jsonl, write_jsonl
from tests.eval.processes import Child, needs_fork, wait_until

pytestmark = needs_fork

KILLS = 30


@pytest.fixture
def many(data):
    """Forty questions of different lengths, some without image."""
    words = ["what", "color", "is", "the", "star", "left", "of", "a", "circle", "here"]
    write_jsonl(
        data / "q.jsonl",
        [
            {"question_id": i // 2, "text": f"{' '.join(words[: 1 + i % 9])} {i}?"}
            | ({"image": f"{i % 4}.png"} if i % 5 else {})
            for i in range(40)
        ],
    )
    return data


def size(path):
    # Looking first would race with a run that removes what it made to see whether it can write.
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_killed_at_random_moments_the_run_ends_like_an_unbroken_one(argv, many, preloaded, batch_size):
    flags = ("--batch-size", batch_size, "--max-new-tokens", 2)
    assert main(argv(*flags, "--quiet", "--trace-file", many / "t0.jsonl", answers="whole.jsonl")) == 0
    whole = (many / "whole.jsonl").read_bytes()
    lines = set(whole.splitlines())
    draw = random.Random(batch_size)
    path = many / "a.jsonl"
    killed = 0
    while killed < KILLS:
        child = Child(lambda: main(argv(*flags, "--trace-file", many / "t.jsonl")), many / "log")
        # Some more bytes, up to a third of the file, and then at once or a moment later.
        enough = size(path) + draw.randint(0, len(whole) // 3)
        wait_until(lambda enough=enough: size(path) >= min(enough, len(whole)), child)
        time.sleep(draw.random() * 0.01)
        status = child.kill()
        kept = path.read_bytes() if path.exists() else b""
        end = kept.rfind(b"\n") + 1
        assert set(kept[:end].splitlines()) <= lines, "a line that is whole is an answer of the unbroken run"
        if status == -signal.SIGKILL:
            killed += 1
        else:
            assert status == 0, child.text()
            assert kept == whole
            for file in (path, many / "a.meta.json", many / "t.jsonl"):
                file.unlink()
    assert Child(lambda: main(argv(*flags, "--trace-file", many / "t.jsonl")), many / "log").wait() == 0
    assert path.read_bytes() == whole
    assert read_json(many / "a.meta.json")["complete"]
    # Each sample has one trace, in question order, whatever was answered twice.
    traces, expected = read_jsonl(many / "t.jsonl"), read_jsonl(many / "t0.jsonl")
    for mine, theirs in zip(traces, expected, strict=True):
        for key in ("question_id", "prompt", "tokens_out", "flops"):
            assert mine[key] == theirs[key]
        assert mine.get("slope", 0) == pytest.approx(theirs.get("slope", 0), rel=1e-4)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_run_cleanly(argv, many, preloaded, monkeypatch, number, status):
    answer = Answerer.answer

    def slow(self, samples, run):
        time.sleep(0.02)  # so that the run is not over before the signal is sent
        return answer(self, samples, run)

    monkeypatch.setattr(Answerer, "answer", slow)
    child = Child(lambda: main(argv()), many / "log")
    wait_until(lambda: size(many / "a.jsonl") > 0, child)
    child.signal(number)
    assert child.wait() == status
    text = child.text()
    name = signal.Signals(number).name
    assert f"interrupted by {name}" in text and "run the same command again" in text and "Traceback" not in text
    kept = read_jsonl(many / "a.jsonl")
    assert 0 < len(kept) < 40 and f"{len(kept)} of 40 answers" in text
    meta = read_json(many / "a.meta.json")
    assert not meta["complete"] and meta["finished"] is None and meta["counts"]["answered"] == len(kept)
    assert not list(many.glob(".a.jsonl*")), "no lock, no temporary file"
    assert main(argv()) == 0
    assert main(argv(answers="whole.jsonl")) == 0
    assert (many / "a.jsonl").read_bytes() == (many / "whole.jsonl").read_bytes()


def test_signal_while_the_model_is_loading(argv, many, monkeypatch):
    def load(args):
        (many / "loading").touch()
        time.sleep(60)

    monkeypatch.setattr(loading, "load_model", load)
    child = Child(lambda: main(argv()), many / "log")
    wait_until((many / "loading").exists, child)
    time.sleep(0.2)  # until it sleeps: an exception raised in a finalizer that happens to run would be lost
    child.signal(signal.SIGTERM)
    assert child.wait(20) == 143 and "0 of 40 answers" in child.text()


def test_second_run_on_the_same_file_is_refused(argv, many, preloaded):
    first = Child(lambda: main(argv()), many / "log")
    assert wait_until(lambda: size(many / "a.jsonl") > 0, first)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = Child(lambda: main(argv()), many / "second")
        assert second.wait() == 2
        assert "being written by another run" in second.text() and f"process {first.pid}" in second.text()
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0 and len(read_jsonl(many / "a.jsonl")) == 40


@pytest.mark.parametrize("trace", [False, True])
def test_full_disk_keeps_what_is_done(argv, many, preloaded, trace):
    """A limit on file sizes stands for the full disk: the write fails in the middle of a line in the same way."""
    flags = ("--trace-file", many / "t.jsonl") if trace else ()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        return main(argv(*flags))

    child = Child(limited, many / "log")
    assert child.wait() == 2
    errors = [line for line in child.text().splitlines() if line.startswith("error: ")]
    # Which of the two files is full first depends on how long their lines are.
    full = ("t.jsonl", "a.jsonl") if trace else ("a.jsonl",)
    assert len(errors) == 1 and any(name in errors[0] for name in full) and "make room" in errors[0]
    assert "Traceback" not in child.text()
    kept = (many / "a.jsonl").read_bytes()
    assert kept.endswith(b"\n") and len(kept) <= 10_000 and len(kept.splitlines()) > 3
    assert main(argv(*flags)) == 0
    assert main(argv(answers="whole.jsonl")) == 0
    assert (many / "a.jsonl").read_bytes() == (many / "whole.jsonl").read_bytes()


def test_disk_full_when_the_lines_are_put_in_order(argv, data, preloaded, monkeypatch):
    questions = read_jsonl(data / "q.jsonl")
    main(argv())
    whole = (data / "a.jsonl").read_bytes()
    (data / "a.jsonl").write_bytes(b"".join(reversed(whole.splitlines(keepends=True))))

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit) as exit_info:
            main(argv())
    assert exit_info.value.code == 2 and len(read_jsonl(data / "a.jsonl")) == len(questions)
    assert main(argv()) == 0
    assert (data / "a.jsonl").read_bytes() == whole


def test_output_that_cannot_be_written(argv, data, capsys):
    for path in ("/proc/a.jsonl", "/dev/full/a.jsonl"):
        if not os.path.exists(os.path.dirname(path)):
            continue
        with pytest.raises(SystemExit) as exit_info:
            main(argv("--answers-file", path))
        assert exit_info.value.code == 2
        assert f"cannot write answers file {path}" in capsys.readouterr().err


def test_run_killed_between_its_last_answer_and_the_sorting(argv, many, preloaded, monkeypatch):
    main(argv("--batch-size", 4, answers="whole.jsonl"))
    whole = (many / "whole.jsonl").read_bytes()

    def die(self, questions=()):
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "finish", die)
        assert Child(lambda: main(argv("--batch-size", 4)), many / "log").wait() == 9
    unsorted = (many / "a.jsonl").read_bytes()
    assert unsorted != whole and sorted(unsorted.splitlines()) == sorted(whole.splitlines())
    monkeypatch.setattr(loading, "load_model", None)
    assert main(argv("--batch-size", 4)) == 0
    assert (many / "a.jsonl").read_bytes() == whole
    assert json.loads((many / "a.meta.json").read_text())["complete"]
