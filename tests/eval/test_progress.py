"""Progress on a terminal, in a log file, and where it shall be quiet."""

import io
import re
import sys

import pytest

from llava.eval.answering import progress
from llava.eval.answering.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def advance(bar, samples):
    with bar:
        for number in range(samples):
            bar.advance(64.0 - number)


def test_a_log_file_gets_whole_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    advance(Progress(3, "autoprune"), 3)
    text = capsys.readouterr().err
    assert "\r" not in text and "\x1b" not in text
    pattern = r"autoprune: (\d)/3 questions, \d+\.\d\d questions/s, \d\d:\d\d left, (\d\d\.0) tokens/layer"
    found = [re.fullmatch(pattern, line).groups() for line in text.splitlines()]
    assert found == [("1", "64.0"), ("2", "63.0"), ("3", "62.0")]


def test_lines_are_rare_and_the_last_one_always_comes(capsys):
    advance(Progress(500, "dense", process=(1, 3)), 500)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dense [2/3]: 500/500 questions")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_prints_messages_only(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    bar = Progress(2, "dense", quiet=True)
    advance(bar, 2)
    bar.message("skipped q.jsonl:1: no such image")
    assert sys.stderr.getvalue() == "skipped q.jsonl:1: no such image\n"


def test_a_terminal_gets_a_bar_and_messages_stay_whole(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(4, "autoprune", process=(1, 2)) as bar:
        assert bar._bar.pos == -1, "below the bar of process 0"
        bar.advance(64.0)
        bar.message("failed q.jsonl:7")
        bar._bar.refresh()
        text = sys.stderr.getvalue()
    assert "autoprune [2/2]" in text and "1/4" in text and "64.0 tokens/layer" in text and "q/s" in text
    assert "failed q.jsonl:7" in re.split(r"[\r\n]|\x1b\[A", text)


def test_parts_of_one_run_are_named(capsys):
    """As the comparison does: batches at once, a new name per benchmark."""
    with Progress(4, "", what="answers") as bar:
        bar.relabel("GQA")
        bar.advance(count=3)
        bar.advance()
    assert capsys.readouterr().err.startswith("GQA: 4/4 answers, ")
