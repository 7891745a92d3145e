"""The benchmarks as tasks: the guide's example, and what every registered task promises."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from llava.eval.tasks import registry
from llava.eval.tasks.data_check import check_benchmark
from llava.eval.tasks.registry import COLUMNS, COMPARED, DEMO, TASKS, get_task
from llava.utils import UserError
from tests.eval.helpers import ROOT, write_json, write_jsonl


@pytest.fixture
def counting(monkeypatch):
    """The guide's example, registered."""
    text = (ROOT / "docs" / "adding_a_benchmark.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(code, "adding_a_benchmark.md", "exec"), names)
    task = names["TASK"]
    monkeypatch.setattr(registry, "TASKS", (*TASKS, task))
    return task


def test_the_guides_example(counting, tmp_path):
    folder = tmp_path / "counting"
    questions = [{"question_id": i, "image": f"{i}.png", "text": "How many?"} for i in range(4)]
    write_jsonl(folder / "questions.jsonl", questions)
    write_json(folder / "numbers.json", {str(i): i for i in range(4)})
    (folder / "images").mkdir()
    for i in range(4):
        (folder / "images" / f"{i}.png").touch()

    assert registry.get_task("Counting") is counting
    report = check_benchmark(counting, tmp_path)
    assert not report.problems and "numbers.json: covers all questions" in report.found
    assert [q.id for q in counting.ask(tmp_path).questions] == [0, 1, 2, 3]
    answers = [{"question_id": i, "prompt": "How many?", "text": text} for i, text in enumerate(["0", " 1 ", "3", "x"])]
    score, grade = counting.score(tmp_path, answers), counting.grader(tmp_path)
    assert (score.accuracy, score.samples) == (50.0, 4)
    assert [grade(answer) for answer in answers] == [1.0, 1.0, 0.0, 0.0]
    assert grade({"question_id": 9, "text": "9"}) is None

    write_json(folder / "numbers.json", {"0": 0, "1": "one"})
    assert any("numbers.json" in problem for problem in check_benchmark(counting, tmp_path).problems)
    write_json(folder / "numbers.json", {"0": 0})
    assert any("does not cover 3 of 4" in problem for problem in check_benchmark(counting, tmp_path).problems)


def test_the_registry_is_consistent():
    assert len({task.name for task in TASKS}) == len({task.folder for task in TASKS}) == len(TASKS)
    assert len(COLUMNS) == sum(len(task.columns) for task in TASKS)
    assert set(DEMO) < set(COMPARED) < set(TASKS) and all(task.metric for task in COMPARED)
    for task in TASKS:
        assert get_task(task.name) is get_task(task.title.upper()) is get_task(f"{task.folder}.sh") is task
    with pytest.raises(UserError, match="unknown benchmark 'pop'.*pope"):
        get_task("pop")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_paths_for_the_shell(task):
    command = [sys.executable, "-m", "llava.eval.tasks", task.name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    names = dict(line.split("=", 1) for line in printed.splitlines())
    assert shlex.split(names["QUESTION_FILE"]) == [task.question_file] and names["TOOL"] == task.tool
    echo = f'{printed}\nprintf "%s\\n" "${{#TRUTH[@]}}" "$MERGED" "$SPLIT"'
    seen = subprocess.run(["bash", "-c", echo], capture_output=True, text=True, check=True).stdout.split("\n")
    assert seen[:3] == [str(len(task.truth)), "1" if task.merged else "", task.split]


def test_a_files_name_is_written_once():
    """What a task says about its files no other source repeats, but for help texts and documents."""
    paths = [p for p in (ROOT / "llava").rglob("*.py") if "tasks" not in p.parts]
    for path in paths:
        code = re.sub(r'help="[^"]*"|"""(?:.|\n)*?"""', "", path.read_text(encoding="utf-8"))
        for task in TASKS:
            assert task.question_file not in code, f"{path} spells {task.question_file}"
