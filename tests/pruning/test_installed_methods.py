"""Methods that other packages offer: the example of docs/adding_a_method.md, installed with pip, and broken ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.pruning import OptionError, build_method, get_method, list_methods
from tests.pruning.models import Batch, generate, random_llama

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "adding_a_method.md"


def package(folder: Path, name: str, points: str, code: str = "") -> Path:
    """What pip leaves of a package: a module and its metadata."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[autoprune.methods]\n{points}\n")
    return folder


@pytest.fixture
def offered(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def example() -> str:
    """The first complete method of the document."""
    return next(code for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S) if "LastToken" in code)


def test_an_installed_package_adds_a_method(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "my_package").mkdir(parents=True)
    (source / "my_package" / "__init__.py").write_text("")
    (source / "my_package" / "last_token.py").write_text(example())
    points = re.search(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.S)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "my-package"\nversion = "1.0"\n{points.group(1)}\n'
        '[tool.setuptools]\npackages = ["my_package"]\n'
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True)
    if done.returncode and ("No module named pip" in done.stderr or "setuptools" in done.stderr):
        pytest.skip("pip or setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    assert "last_token" not in list_methods()
    monkeypatch.syspath_prepend(str(target))
    assert "last_token" in list_methods()
    model = random_llama()
    _, logits, traces = generate(model, build_method("last_token", {"target_tokens": "9"}), Batch(model).alone(0))
    assert traces[0].tokens_out == [48, 9, 9, 9, 9, 9] and torch.isfinite(logits).all()
    # It takes part in compositions like any other.
    assert get_method("divprune+last_token").from_options({"divprune.target_tokens": 20}).parts[1].target_tokens == 64


def test_names_that_are_here_stay(offered):
    package(offered, "thief", "fastv = thief:Other", "class Other: pass")
    assert get_method("fastv").__module__ == "llava.pruning.methods.fastv" and list_methods().count("fastv") == 1


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("raising", "raise RuntimeError('no GPU')", "cannot be loaded from 'raising:Other': RuntimeError: no GPU"),
        ("empty", "", "cannot be loaded"),
        ("stranger", "class Other: pass", "must be a class of PruningMethod whose name is 'other'"),
    ],
)
def test_a_broken_package_is_named(offered, name, code, message):
    package(offered, name, f"other = {name}:Other", code)
    with pytest.raises(OptionError, match=re.escape(message)) as error:
        get_method("other")
    assert f"package {name}" in str(error.value) and "\n" not in str(error.value)


def test_two_packages_with_one_name(offered):
    package(offered, "one", "other = one:Other")
    package(offered, "two", "other = two:Other")
    with pytest.raises(OptionError, match="one and two: uninstall"):
        get_method("other")
