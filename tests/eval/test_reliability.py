"""Runs that die or find no space at any call that changes files: the figures of docs/reliability.md.

pytest -s tests/eval/test_reliability.py                            # a sample of the places, under a minute
LLAVA_THOROUGH=1 pytest -s tests/eval/test_reliability.py           # all of them, and more kills
"""

import errno
import os
import random
import signal
import time

import pytest

from llava.eval.answering.answerer import Answerer
from llava.eval.model_vqa_loader import main
from tests.eval.helpers import read_json, read_jsonl, write_jsonl
from tests.eval.processes import Child, needs_fork
from tests.eval.test_waiting import launch

pytestmark = needs_fork
THOROUGH = bool(os.environ.get("LLAVA_THOROUGH"))
CALLS = ("open", "write", "ftruncate", "fsync", "fchmod", "replace", "unlink", "mkdir", "close")
QUESTIONS = 5


class Trouble:
    """Counts the calls that touch files below a folder, and lets trouble come at one of them.

    partial: a write puts half of its bytes into the file first.
    """

    def __init__(self, folder, at, happen, names=CALLS):
        self.folder, self.at, self.happen = str(folder), at, happen
        self.count = 0
        self.names = names

    def install(self):
        self.descriptors = set()
        for name in self.names:
            setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, call):
        def wrapped(*args, **kwargs):
            place = args[0] if args else None
            ours = place in self.descriptors if isinstance(place, int) else str(place).startswith(self.folder)
            if ours:
                self.count += 1
                if self.count == self.at:
                    if name == "write":
                        call(args[0], bytes(args[1])[: len(args[1]) // 2])
                    self.happen()
            result = call(*args, **kwargs)
            if name == "open" and ours:
                self.descriptors.add(result)
            if name == "close":
                self.descriptors.discard(place)
            return result

        return wrapped


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def few(data):
    write_jsonl(data / "q.jsonl", [{"question_id": i, "text": f"{'word ' * (i % 3)}{i}?"} for i in range(QUESTIONS)])
    return data


@pytest.fixture
def command(argv, few):
    def build(name):
        flags = ("--max-new-tokens", 1, "--batch-size", 2, "--trace-file", few / f"{name}.trace")
        return argv(*flags, answers=f"{name}.jsonl")

    return build


def count_calls(command, few, names):
    """How many such calls a whole run makes."""
    found = few / "count"

    def run():
        trouble = Trouble(few, None, None, names)
        trouble.install()
        status = main(command("counted"))
        found.write_text(str(trouble.count))
        return status

    assert Child(run, few / "log").wait() == 0, (few / "log").read_text()
    return int(found.read_text())


def places(count):
    step = 1 if THOROUGH else max(1, count // 25)
    return range(1, count + 1, step)


def rerun_equals(command, few, name, whole):
    """The same command ends like an unbroken run; every sample has one trace."""
    child = Child(lambda: main(command(name)), few / "again")
    assert child.wait() == 0, child.text()
    assert (few / f"{name}.jsonl").read_bytes() == whole
    assert read_json(few / f"{name}.meta.json")["complete"]
    assert len(read_jsonl(few / f"{name}.trace")) == QUESTIONS


@pytest.mark.parametrize("kind", ["kill", "disk"])
def test_trouble_at_every_call_that_touches_files(command, few, preloaded, kind):
    assert main(command("whole")) == 0
    whole = (few / "whole.jsonl").read_bytes()
    lines = set(whole.splitlines())
    names = CALLS if kind == "kill" else tuple(name for name in CALLS if name not in ("close", "unlink"))
    count = count_calls(command, few, names)
    tried = told = 0
    for place in places(count):
        name = f"r{place}"

        def run(place=place, name=name):
            Trouble(few, place, die if kind == "kill" else no_space, names).install()
            return main(command(name))

        child = Child(run, few / f"log{place}")
        status = child.wait()
        assert "Traceback" not in child.text(), child.text()
        assert status == (-signal.SIGKILL if kind == "kill" else status) and status in (0, 2, -signal.SIGKILL)
        errors = [line for line in child.text().splitlines() if line.startswith("error: ")]
        assert len(errors) == (status == 2), child.text()
        kept = (few / f"{name}.jsonl").read_bytes() if (few / f"{name}.jsonl").exists() else b""
        assert set(kept[: kept.rfind(b"\n") + 1].splitlines()) <= lines
        if status == 0:
            assert kept == whole
        rerun_equals(command, few, name, whole)
        tried, told = tried + 1, told + (status == 2)
    what = "kills" if kind == "kill" else "full disks"
    print(
        f"\n{tried} {what} at {tried} of {count} calls that touch files: {told} told, 0 answers lost, all reruns whole"
    )


def test_kills_of_distributed_runs(command, few, preloaded, monkeypatch):
    """Now and then one of two processes dies, or both; the same command with one to three processes goes on."""
    answer = Answerer.answer

    def slowly(self, samples, run):
        time.sleep(0.02)
        return answer(self, samples, run)

    monkeypatch.setattr(Answerer, "answer", slowly)
    write_jsonl(few / "q.jsonl", [{"question_id": i, "text": f"{i}?"} for i in range(30)])
    assert main(command("whole")) == 0
    whole = (few / "whole.jsonl").read_bytes()
    draw = random.Random(0)
    wanted, kills, runs = 60 if THOROUGH else 5, 0, 0
    while kills < wanted:
        runs += 1
        name = f"d{runs}"
        done = False
        while not done:
            children = launch(command(name), draw.randint(2, 3), few, name=f"{name}-log")
            victims = draw.sample(children, draw.choice([1, 1, 2]))
            late = draw.random() * 1.5
            time.sleep(late)
            for victim in victims:
                kills += victim.running() and victim.kill() == -signal.SIGKILL
            statuses = [child.wait(60) for child in children]
            assert set(statuses) <= {0, 2, -signal.SIGKILL}, [child.text() for child in children]
            assert not any("Traceback" in child.text() for child in children), [child.text() for child in children]
            done = (few / f"{name}.jsonl").exists() and (few / f"{name}.jsonl").read_bytes() == whole
            if kills >= wanted and not done:
                last = launch(command(name), 2, few, name=f"{name}-log")
                assert [child.wait(60) for child in last] == [0, 0], [child.text() for child in last]
                done = (few / f"{name}.jsonl").read_bytes() == whole
        assert len(read_jsonl(few / f"{name}.trace")) == 30
        if (few / f"{name}.parts").exists():  # killed behind the last answer, in front of cleaning up
            last = launch(command(name), 2, few, name=f"{name}-log")
            assert [child.wait(60) for child in last] == [0, 0], [child.text() for child in last]
        assert not (few / f"{name}.parts").exists() and (few / f"{name}.jsonl").read_bytes() == whole
    print(f"\n{kills} kills in {runs} distributed runs: 0 answers lost, all reruns whole")
