"""One process per output file; the lock dies with its process, and forked children neither have nor keep it."""

import os
import signal

import pytest

from llava.eval.answering.answer_file import AnswerFile
from llava.eval.common.locking import FileLock
from llava.utils import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(function):
    """Runs `function` in a forked child; returns (process id, end of a pipe that gets what it returns)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(function()).encode())
            os.close(writer)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    return child, reader


def result_of(child, reader):
    text = b""
    while piece := os.read(reader, 4096):
        text += piece
        if child is not None:
            break
    return text.decode()


def finish(child, reader, number=signal.SIGKILL):
    os.close(reader)
    os.kill(child, number)
    os.waitpid(child, 0)


def take(path):
    """What a second run sees: "taken", or the refusal."""
    try:
        FileLock(path, "answers file")
    except UserError as error:
        return str(error)
    return "taken"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.jsonl"


def test_second_process_is_refused_until_the_first_dies(path):
    locks = []
    child, reader = in_child(lambda: locks.append(FileLock(path, "answers file")))
    result_of(child, reader)
    message = take(path)
    assert "a.jsonl is being written by another run" in message and f"process {child}" in message
    finish(child, reader)
    assert take(path) == "taken"


def test_released_lock_leaves_no_file(path):
    lock = FileLock(path, "answers file")
    assert "is being written" in take(path)  # within one process as well
    lock.release()
    lock.release()
    assert list(path.parent.iterdir()) == []
    assert take(path) == "taken"


def test_forked_child_cannot_free_or_keep_the_lock(path):
    lock = FileLock(path, "answers file")
    child, reader = in_child(lambda: (lock.release(), lock.path.exists())[1])
    assert result_of(child, reader) == "True"
    other, second = in_child(lambda: take(path))
    assert "is being written" in result_of(other, second)
    lock.release()
    assert take(path) == "taken", "the child with the inherited file is still alive"
    finish(child, reader)
    finish(other, second)


def test_answer_file_is_locked_from_its_checks_to_its_end(path):
    answers = AnswerFile(path, "m", {})
    with pytest.raises(UserError, match="is being written by another run"):
        AnswerFile(path, "m", {})
    answers.open()
    with pytest.raises(UserError, match="is being written by another run"):
        AnswerFile(path, "m", {}, resume=False)
    answers.close()
    AnswerFile(path, "m", {}).close()
    path.write_text("{oops\n")
    for _ in range(2):  # a file that is refused is not kept locked
        with pytest.raises(UserError, match="a.jsonl:1"):
            AnswerFile(path, "m", {})
