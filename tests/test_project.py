"""The files around the code agree with each other: supported versions, pinned tools, the changelog."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import llava

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def test_oldest_supported_versions_are_tested() -> None:
    (oldest,) = (job for job in WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["include"] if job["name"] == "oldest")
    assert PROJECT["requires-python"] == f">={oldest['python']}"
    lowest = {re.match(r"[\w-]+", d)[0]: re.search(r">=([\d.]+)", d)[1] for d in PROJECT["dependencies"]}
    assert oldest["install"] == f"torch=={lowest['torch']}.* transformers=={lowest['transformers']}.*"


def test_the_hook_has_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (ruff,) = (repo for repo in hooks["repos"] if "ruff" in repo["repo"])
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_every_development_tool_is_pinned() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    tools = {re.match(r"[\w-]+", entry)[0].lower() for entry in PROJECT["optional-dependencies"]["dev"]}
    assert tools <= pinned


def test_workflow_runs_what_the_repository_has() -> None:
    commands = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    assert "bash .ci/run" in commands and (ROOT / ".ci/run").is_file()
    test_script = (ROOT / "scripts/test.sh").read_text()
    for check in ("ruff check .", "ruff format --check .", "mypy"):
        assert f"python -m {check}" in commands, check
        assert f" {check}\n" in test_script, check


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## \[([^]]+)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.M)
    assert sections[0] == ("Unreleased", "")
    assert llava.__version__ in [name for name, _ in sections]
    assert all(date for _, date in sections[1:])


def test_a_clone_is_small() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("git does not read this checkout")
    files = found.stdout.splitlines()
    # What can be made again is not tracked: the pictures of the miniature benchmarks alone were 1,347 files.
    pictures = [path for path in files if path.endswith((".png", ".jpg")) and "/images/" not in path]
    assert not [path for path in pictures if not path.startswith("benchmarks/results/")]
    assert len(files) < 800
    # 32.7 MB of it are the four checkpoints, each whole in fp16, so that its folder can be taken elsewhere.
    assert sum((ROOT / path).stat().st_size for path in files if (ROOT / path).is_file()) < 45e6, "bytes"
    assert not [path for path in files if path.startswith("playground/tiny/data/")]
