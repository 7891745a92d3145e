"""Question and answer files of any length: what is held is one small object per question, bytes per answer."""

import json
import os

import numpy as np
import pytest

from llava.eval.answering.answer_file import AnswerFile
from llava.eval.answering.records import key_hash, match
from llava.eval.common.questions import chunk, read_questions
from tests.eval.processes import Child, needs_fork

LINES = 100_000


@needs_fork
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the size of a process from /proc")
def test_memory_grows_with_questions_alone(tmp_path):
    path = tmp_path / "q.jsonl"
    with open(path, "w") as file:
        for i in range(LINES):
            text = f"What is the color of object {i}, and where does it stand in the picture?"
            file.write(json.dumps({"question_id": i, "image": f"{i // 5}.png", "text": text}) + "\n")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def work():
        before = resident()
        questions = read_questions(path)
        part = chunk(questions[: LINES - 1], 2, 1)
        answers = AnswerFile(tmp_path / "a.jsonl", "m", {})
        pending = answers.pending(part)
        assert len(pending) == LINES // 2 - 1 and pending[0].id == LINES // 2
        answers.open()
        for number, question in enumerate(pending):
            if number % 100 == 0:
                answers.append(question, "yes")
        answers.close(part)
        (tmp_path / "grown").write_text(str(resident() - before))

    assert Child(work, tmp_path / "log").wait() == 0
    # A question is about half a kilobyte: all of VQAv2 test-dev 60 MB, beside a model of gigabytes.
    assert int((tmp_path / "grown").read_text()) < 800 * LINES


def test_match_against_a_naive_loop():
    draw = np.random.default_rng(0)
    for _ in range(50):
        asked = [key_hash(int(i), "?") for i in draw.integers(0, 8, draw.integers(0, 20))]
        found = [key_hash(int(i), "?") for i in draw.integers(0, 10, draw.integers(0, 20))]
        free = list(enumerate(asked))
        expected = []
        for key in found:
            place = next((i for i, other in free if other == key), -1)
            expected.append(place)
            free = [(i, other) for i, other in free if i != place]
        assert match(asked, found).tolist() == expected
