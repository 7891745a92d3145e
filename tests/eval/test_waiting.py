"""Processes that wait for each other: they hear signals, they notice who is gone, and two launches do not mix."""

import json
import os
import signal
import socket
import time

import pytest

from llava.eval.answering import parallel as sharding
from llava.eval.answering import peers
from llava.eval.answering.answerer import Answerer
from llava.eval.answering.parallel import World
from llava.eval.answering.peers import Peers
from llava.eval.model_vqa_loader import main
from llava.utils import UserError
from tests.eval.helpers import read_json, read_jsonl, write_jsonl
from tests.eval.processes import Child, needs_fork, wait_until

pytestmark = needs_fork
WITHIN = 2.0  # seconds in which a signal has to take effect


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank, size, port):
    return {
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def launch(command, size, folder, port=None, name="log"):
    port = port or free_port()
    return [
        Child(lambda: main(command), folder / f"{name}{rank}", environment(rank, size, port)) for rank in range(size)
    ]


def seconds_to_end(child):
    started = time.monotonic()
    status = child.wait(30)
    return status, time.monotonic() - started


@pytest.fixture
def many(data):
    write_jsonl(data / "q.jsonl", [{"question_id": i, "text": f"{i}?"} for i in range(24)])
    return data


@pytest.fixture
def waiting(monkeypatch, tmp_path):
    """Process 0 looks at the answers for a long time."""

    def look(*args):
        (tmp_path / "looking").touch()
        time.sleep(60)

    monkeypatch.setattr(sharding, "look_at_answers", look)
    return tmp_path / "looking"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("alone", [True, False])
def test_a_waiting_process_hears_signals(argv, many, preloaded, waiting, number, status, alone):
    """Whether process 0 has not come yet, or is busy."""
    port = free_port()
    children = [Child(lambda: main(argv()), many / "log1", environment(1, 2, port))]
    if alone:
        time.sleep(1.0)
    else:
        children.append(Child(lambda: main(argv()), many / "log0", environment(0, 2, port)))
        wait_until(waiting.exists, children[1])
    for child in children:
        child.signal(number)
        found, seconds = seconds_to_end(child)
        print(f"{signal.Signals(number).name}: ended with {found} after {seconds:.2f} s")
        assert found == status and seconds < WITHIN and "Traceback" not in child.text()


def test_a_process_hears_signals_while_process_0_is_stopped(argv, many, preloaded, waiting):
    first, second = launch(argv(), 2, many)
    wait_until(waiting.exists, first)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        time.sleep(0.5)
        second.signal(signal.SIGTERM)
        status, seconds = seconds_to_end(second)
        assert status == 143 and seconds < WITHIN
    finally:
        first.kill()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_gives_up_when_its_peer_is_gone(argv, many, preloaded, waiting, monkeypatch, gone):
    monkeypatch.setattr(peers, "SILENCE_SECONDS", 1.5)
    if gone == 1:  # it dies when it has been told its share, and process 0 waits for its verdict
        begin = sharding._sees_plan
        monkeypatch.undo()
        monkeypatch.setattr(peers, "SILENCE_SECONDS", 1.5)
        monkeypatch.setattr("llava.eval.answering.loading.load_model", None)

        def die(*args):
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return begin(*args)

        monkeypatch.setattr(sharding, "_sees_plan", die)
    children = launch(argv(), 2, many)
    if gone == 0:
        wait_until(waiting.exists, children[0])
        children[0].kill()
    assert children[gone].wait() == -signal.SIGKILL
    status, seconds = seconds_to_end(children[1 - gone])
    text = children[1 - gone].text()
    assert status == 2 and seconds < 10 and "could not share out the work" in text and "Traceback" not in text
    assert not list(many.glob(".*")) and not list(many.glob("a.parts/.*")), "nothing stays locked"


def in_child(check, log):
    """Runs `check` in a process of its own: forks beside the store's threads, of other tests, would not be safe."""
    child = Child(check, log)
    assert child.wait(60) == 0, child.text()


def test_a_process_that_never_comes_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "JOIN_SECONDS", 0.5)

    def check():
        os.environ.update(environment(0, 2, free_port()))
        with Peers(0, 2) as ours, pytest.raises(UserError, match="process 1 of 2 has not started"):
            ours.hear({"join/1": 1})
        with Peers(1, 2) as ours, pytest.raises(UserError, match="nobody answers|has not started"):
            ours.hear({"plan/1": 0})
        del os.environ["MASTER_PORT"]
        with pytest.raises(UserError, match="MASTER_PORT"):
            Peers(0, 2)

    in_child(check, tmp_path / "log")


@pytest.fixture
def slow(monkeypatch):
    answer = Answerer.answer

    def slowly(self, samples, run):
        time.sleep(0.05)
        return answer(self, samples, run)

    monkeypatch.setattr(Answerer, "answer", slowly)


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8, 1.5])
@pytest.mark.parametrize("same_port", [False, True])
def test_a_launch_started_twice_ends_in_one_file(argv, many, preloaded, slow, delay, same_port):
    main(argv(answers="whole.jsonl"))
    port = free_port()
    first = launch(argv(), 2, many, port)
    time.sleep(delay)
    second = launch(argv(), 2, many, port if same_port else free_port(), "again")
    statuses = [[child.wait(90) for child in children] for children in (first, second)]
    texts = [child.text() for child in (*first, *second)]
    assert not any("Traceback" in text for text in texts), texts
    if not same_port:
        # One launch goes on whole and the other is refused whole, or comes when all is done.
        assert sorted(map(set, statuses), key=sorted) in ([{0}, {2}], [{0}, {0}]), (statuses, texts)
    assert (many / "a.jsonl").exists(), (statuses, texts)
    assert (many / "a.jsonl").read_bytes() == (many / "whole.jsonl").read_bytes()
    assert read_json(many / "a.meta.json")["complete"]
    assert not (many / "a.parts").exists() and not list(many.glob(".a*")), texts


def test_one_process_beside_a_launch_is_refused(argv, many, preloaded, slow):
    children = launch(argv(), 2, many)
    wait_until(lambda: (many / "a.parts" / "plan.json").exists(), children[0])
    single = Child(lambda: main(argv()), many / "single")
    assert single.wait() == 2 and "is being written by another run" in single.text()
    assert [child.wait() for child in children] == [0, 0]
    assert len(read_jsonl(many / "a.jsonl")) == 24


def test_a_launch_beside_one_process_is_refused(argv, many, preloaded, slow):
    single = Child(lambda: main(argv()), many / "single")
    wait_until(lambda: (many / "a.jsonl").exists() and (many / "a.jsonl").stat().st_size > 0, single)
    children = launch(argv("--overwrite"), 2, many)
    assert [child.wait() for child in children] == [2, 2]
    assert all("is being written by another run" in child.text() for child in children)
    assert single.wait() == 0 and len(read_jsonl(many / "a.jsonl")) == 24


def test_answers_and_traces_of_one_stem(argv, many, preloaded):
    """`d.trace` and `d.jsonl` have folders of their own; other files in them stay."""
    main(argv("--trace-file", many / "whole.trace", answers="whole.jsonl"))
    (many / "d.parts").mkdir()
    (many / "d.parts" / "notes.txt").write_text("mine")
    for flags in ((), ("--overwrite",)):
        children = launch(argv("--trace-file", many / "d.trace", *flags, answers="d.jsonl"), 2, many)
        assert [child.wait() for child in children] == [0, 0], [child.text() for child in children]
        assert (many / "d.jsonl").read_bytes() == (many / "whole.jsonl").read_bytes()
        traces, expected = read_jsonl(many / "d.trace"), read_jsonl(many / "whole.trace")
        assert [t["prompt"] for t in traces] == [t["prompt"] for t in expected]
        assert [path.name for path in (many / "d.parts").iterdir()] == ["notes.txt"]
        assert not (many / "d.trace.parts").exists()


def test_messages_are_of_this_launch_only(monkeypatch, tmp_path):
    """Process 1 of another launch, at the same port, does not answer for ours."""
    monkeypatch.setattr(peers, "PORT_SECONDS", 0.5)
    monkeypatch.setattr(peers, "_numbers", iter([7, 7, 7]))

    def check():
        os.environ.update(environment(0, 2, free_port()))
        with Peers(0, 2) as zero, Peers(1, 2) as one:
            one.say("join/1", json.loads("[1, 2]"))
            assert zero.hear({"join/1": 1})["join/1"] == [1, 2]
            with Peers(1, 2) as stranger, pytest.raises(UserError, match="another launch"):
                zero.say("plan/1", None)
                stranger.hear({"plan/1": 0})
            assert one.hear({"plan/1": 0}) == {"plan/1": None}

    in_child(check, tmp_path / "log")


def test_the_world_of_one_needs_no_peers(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment().size == 1
