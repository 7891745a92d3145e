"""The package as it is installed: what the wheel holds, and that the command works outside of a checkout."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llava
from llava.doors import DOORS
from tests.conftest import ROOT

COMMAND = "import sys; from autoprune_llava import main; sys.argv[:1] = ['autoprune']; main()"


@pytest.fixture
def run(installed, tmp_path):
    """Runs Python where only the installation is to be found, with an empty home."""

    def start(*command: str, before: Path | None = None, behind: Path | None = None):
        path = os.pathsep.join(str(entry) for entry in (before, installed, behind) if entry is not None)
        (tmp_path / "home").mkdir(exist_ok=True)
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONPATH": path}
        environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return start


def metadata(installed: Path) -> email.message.Message:
    (found,) = installed.glob("autoprune_llava-*.dist-info/METADATA")
    return email.message_from_string(found.read_text(encoding="utf-8"))


def test_what_is_installed(installed):
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top - {"bin", "__pycache__"} == {"llava", "autoprune_llava.py"}, "no names beside the package's own"
    for path in (ROOT / "llava").rglob("*.py"):
        assert (installed / path.relative_to(ROOT)).is_file(), path
    for path in (ROOT / "playground" / "tiny" / "models" / "tiny-llava-v1.5").rglob("*.*"):
        assert (installed / "llava" / path.relative_to(ROOT / "playground")).is_file(), path
    assert (installed / "llava" / "py.typed").is_file() and (installed / "bin" / "autoprune").is_file()
    assert not list(installed.rglob("test_*.py")) and not list(installed.rglob("PNG"))


def test_what_moves_into_the_package_does_not_name_its_place():
    """The generator is `playground.tiny` in a checkout and `llava.tiny` in an installation."""
    for folder in ("build", "world"):
        for path in (ROOT / "playground" / "tiny" / folder).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.findall(r"^\s*(?:from|import) playground", text, re.M), f"{path}: import relatively"


def test_what_an_index_shows(installed):
    shown = metadata(installed)
    assert (shown["Name"], shown["Version"]) == ("autoprune-llava", llava.__version__)
    assert shown["Description-Content-Type"] == "text/markdown"
    text = shown.get_payload()
    assert "# AutoPrune" in text and "https://arxiv.org/abs/2509.23931" in text
    assert not re.findall(r"\]\((?!https?:)[^)]*\)", text), "links into the repository lead nowhere there"
    minors = {entry.rpartition(".")[2] for entry in shown.get_all("Classifier") if ":: Python :: 3." in entry}
    assert minors == {"10", "11", "12", "13"}


def test_the_demo_outside_of_a_checkout(run, tmp_path):
    done = run("-c", COMMAND, "demo", "--limit", "4", "--budgets", "64", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "| AutoPrune 64 |" in done.stdout and "Model `tiny-llava-v1.5`" in done.stdout
    cache = tmp_path / "home" / ".cache" / "autoprune-llava" / "tiny"
    assert (cache / "eval" / "pope" / "llava_pope_test.jsonl").is_file()
    assert (tmp_path / "results" / "demo" / "demo.json").is_file(), "results go where the user works"
    # The scripts of the benchmarks came along; their answers are asked and scored.
    done = run("-c", COMMAND, "eval", "pope", "64", "--tiny", "--limit", "4")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results/eval/pope/answers/tiny-llava-v1.5/autoprune/n_64.json").is_file()


def test_small_commands(run):
    done = run("-c", COMMAND, "--version")
    assert done.stdout == f"autoprune {llava.__version__}\n"
    done = run("-c", COMMAND)
    assert done.returncode == 0 and all(name in done.stdout for name, door in DOORS.items() if door.open)
    for command, message in (
        (["nosuch"], "'nosuch' is no sub-command; there are: demo, eval"),
        (["eval", "pope", "some", "--tiny"], "TOKENS must be a number, a share such as 0.11, or 'dense', got 'some'"),
        (["eval", "nosuch", "64"], "unknown benchmark 'nosuch'"),
        (["ask", "--query", "?"], "--model-path"),
    ):
        done = run("-c", COMMAND, *command)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        assert message in lines[0]


def test_lists(run):
    from llava.families import list_families
    from llava.pruning import list_methods

    assert run("-c", COMMAND, "methods", "--names").stdout.split() == list_methods()
    assert run("-c", COMMAND, "families", "--names").stdout.split() == list_families()


def test_a_method_is_described(capsys):
    from llava.eval.methods import main

    main(["fastv"])
    described = capsys.readouterr().out
    assert "target_tokens=64" in described and "layer=2" in described


@pytest.fixture
def upstream(tmp_path) -> Path:
    """What LLaVA's own package looks like to Python's import."""
    folder = tmp_path / "upstream"
    (folder / "llava" / "train").mkdir(parents=True)
    (folder / "llava" / "__init__.py").touch()
    (folder / "llava" / "train" / "train.py").touch()
    return folder


def test_another_llava_is_found_first(run, upstream):
    done = run("-c", COMMAND, "methods", before=upstream)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert str(upstream / "llava") in done.stderr and "pip uninstall llava" in done.stderr


def test_another_llava_is_hidden(run, upstream):
    done = run("-W", "error", "-c", "import llava", behind=upstream)
    assert done.returncode == 1
    assert f"{upstream / 'llava'} is hidden" in done.stderr and "pip uninstall llava" in done.stderr
    done = run("-W", "error", "-c", "import llava")
    assert (done.returncode, done.stderr) == (0, "")


def test_another_llava_lies_among_our_files(run, installed):
    intruder = installed / "llava" / "train" / "train.py"
    intruder.parent.mkdir()
    intruder.touch()
    try:
        done = run("-W", "error", "-c", "import llava")
    finally:
        shutil.rmtree(intruder.parent)
    assert done.returncode == 1 and "has files of LLaVA's own package" in done.stderr
