"""Fixtures shared by all tests; the miniature benchmarks are made before the first one needs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava.pruning.engine.notices import forget
from llava.utils import UserError
from playground.tiny.build.ensure import ensure

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"


def pytest_configure() -> None:
    try:
        ensure()
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(autouse=True)
def notices_anew():
    """Every test is a program of its own: what pruning has said once it says again."""
    forget()


@pytest.fixture(scope="session")
def golden():
    """``golden("pure_functions")`` -> (JSON object, arrays)."""

    def load(name: str):
        return json.loads((GOLDEN / f"{name}.json").read_text()), np.load(GOLDEN / f"{name}.npz")

    return load


@pytest.fixture(scope="session")
def shared_benchmarks() -> Path:
    """Real benchmark files beside the checkout; tests that need them are skipped where they are absent."""
    folder = SHARED / "benchmarks"
    if not folder.is_dir():
        pytest.skip("../shared/benchmarks (real benchmark files, not part of the repository) is absent")
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """The folder into which pip installed a copy of the sources, for building leaves files among them."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site") / "packages"
    left_out = shutil.ignore_patterns("data", "runs", "__pycache__", "*.egg-info")
    for name in ("llava", "scripts", "playground"):
        shutil.copytree(ROOT / name, source / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "autoprune_llava.py"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True)
    if done.returncode and ("No module named pip" in done.stderr or "setuptools" in done.stderr):
        pytest.skip("pip or setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    return target
