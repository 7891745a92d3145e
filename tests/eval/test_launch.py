"""Tools started by their path, from another folder and without an installation: they run, or say what is missing."""

import subprocess
import sys

import pytest

from tests.eval.helpers import ROOT

FOLDERS = ("llava/eval", "llava/serve", "scripts")
TOOLS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8") and path.name != "llava.py"
)
# Stands in for a Python without installed packages: -S leaves out site-packages.
BARE = (sys.executable, "-S")
NEED_NO_PACKAGES = ("scripts/", "eval/eval_", "check_data", "summarize_gpt_review")


def start(*command, cwd):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([*command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_all_tools_are_found():
    assert len(TOOLS) > 25 and "llava/eval/eval_pope.py" in TOOLS and "scripts/convert_gqa_for_eval.py" in TOOLS


@pytest.mark.parametrize("tool", TOOLS)
def test_help_without_installed_packages(tool, tmp_path):
    result = start(*BARE, str(ROOT / tool), "--help", cwd=tmp_path)
    if result.returncode == 0:
        assert result.stdout.startswith("usage: ") and not result.stderr
        return
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and "lacks the package" in lines[0] and "pip install -e" in lines[0]
    assert not any(name in tool for name in NEED_NO_PACKAGES), "scorers and converters need no package"


@pytest.mark.parametrize("tool", ["llava/eval/run_llava.py", "llava/eval/model_vqa_loader.py", "llava/serve/cli.py"])
def test_help_by_path(tool, tmp_path):
    """With packages; the folder of the tool is no place to look for modules."""
    result = start(sys.executable, str(ROOT / tool), "--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("usage: ")


def test_as_a_module_without_installed_packages():
    result = start(*BARE, "-m", "llava.eval.model_vqa", "--help", cwd=ROOT)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_the_stand_in_is_no_part_of_the_package():
    """Imported by its full name it does nothing, and importing the package installs no hook."""
    code = "import sys, llava, llava.eval.llava, llava.serve.llava\n"
    code += "print(sys.excepthook is sys.__excepthook__, llava.__file__)"
    result = start(sys.executable, "-c", code, cwd=ROOT)
    assert result.stdout.split() == ["True", str(ROOT / "llava" / "__init__.py")], result.stderr


def test_a_score_by_path(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "Cat."}\n')
    result = start(
        *BARE, str(ROOT / "scripts/convert_gqa_for_eval.py"), "--src", "a.jsonl", "--dst", "p.json", cwd=tmp_path
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "p.json").read_text() == '[{"questionId": 1, "prediction": "cat"}]'
