"""The way from a line of a question file to a line of the answer file enters few files of `eval`."""

from __future__ import annotations

import sys
from pathlib import Path

from llava.eval.model_vqa_loader import main
from tests.eval.helpers import ROOT, read_jsonl, write_jsonl

MOST = 9
EVAL = str(ROOT / "llava" / "eval")


def test_one_question_enters_nine_files(argv, data, preloaded):
    """What a second question runs that a first one has not: files whose functions are called once more for it."""
    counts = []
    lines = read_jsonl(data / "q.jsonl")[:4]
    for number in (3, 4):
        write_jsonl(data / f"q{number}.jsonl", lines[:number])
        calls: dict[str, int] = {}

        def note(frame, event, argument, calls=calls):
            name = frame.f_code.co_filename
            if event == "call" and name.startswith(EVAL):
                calls[name] = calls.get(name, 0) + 1

        sys.setprofile(note)
        try:
            main(argv("--question-file", data / f"q{number}.jsonl", answers=f"{number}.jsonl"))
        finally:
            sys.setprofile(None)
        assert len(read_jsonl(data / f"{number}.jsonl")) == number
        counts.append(calls)
    entered = sorted(Path(name).name for name, calls in counts[1].items() if calls > counts[0].get(name, 0))
    assert 4 < len(entered) <= MOST, entered
