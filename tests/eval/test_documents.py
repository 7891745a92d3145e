"""What the documents tell people to type exists: commands parse, flags are known, the Python example runs."""

import argparse
import importlib
import re
import shlex
import subprocess

import pytest

from llava.doors import DOORS
from tests.eval.helpers import ROOT, TINY_MODEL

DOCUMENTS = ("README.md", "EVAL.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
VARIABLES = "DATA_DIR MODEL_DIR CKPT OUT_DIR METHOD METHODS BUDGETS BENCHMARKS TINY DRY_RUN".split()


def blocks(document, language):
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(document):
    for block in blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip()


ALL = [
    pytest.param(document, command, id=f"{document}: {command[:50]}")
    for document in DOCUMENTS
    if document != "docs/distributed.md"  # launchers and shell loops, which test_sharding runs in its own way
    for command in commands(document)
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_block_of_code_has_to_be_scrolled(document):
    long = [line for block in blocks(document, "[a-z]*") for line in block.splitlines() if len(line) > 120]
    assert not long


def test_there_are_commands():
    assert len(ALL) >= 15


@pytest.mark.parametrize(("document", "command"), ALL)
def test_command_is_valid(document, command, monkeypatch):
    subprocess.run(["bash", "-n", "-c", command], check=True)
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        assert words[0].split("=")[0] in VARIABLES, words[0]
        words.pop(0)
    if words[:2] == ["nice", "-n"]:
        words = words[3:]
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        if "eval/" in words[1]:
            assert words[2] == "dense" or float(words[2]) > 0
            known_flags("llava.eval.model_vqa_loader", words[3:], monkeypatch, required=False)
    elif words[0] == "autoprune":
        known_flags(DOORS[words[1]].module, words[2:], monkeypatch)
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file(), command
    else:
        assert words[:2] == ["python", "-m"], command
        known_flags(words[2], words[3:], monkeypatch)


def known_flags(module, flags, monkeypatch, required=True):
    """Parses `flags` with the module's own parser, without running it."""

    class Parsed(Exception):
        pass

    def parse_args(self, argv=None, namespace=None):
        if not required:
            for action in self._actions:
                action.required = False
        original(self, argv, namespace)
        raise Parsed

    def known(parsed, rest):  # of `eval`, whose other flags go to the answering tool
        with monkeypatch.context():
            known_flags("llava.eval.model_vqa_loader", rest, monkeypatch, required=False)
        raise Parsed

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("llava.eval.benchmark.run", known)
    module = importlib.import_module(module)
    if hasattr(module, "__path__"):  # `python -m` runs the `__main__` of a package
        module = importlib.import_module(f"{module.__name__}.__main__")
    with pytest.raises(Parsed):
        module.main(flags)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target
    for path in re.findall(r"`((?:llava|scripts|docs|playground/tiny)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.skipif(not (TINY_MODEL / "config.json").is_file(), reason="the trained checkpoint is not in this checkout")
def test_python_example_runs(monkeypatch, capsys):
    (example,) = blocks("README.md", "python")
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "visual tokens leaving each layer: [160, " in printed
    assert "FLOPs relative to dense: 0." in printed


def test_project_metadata_is_consistent():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    import llava

    assert f"version: {llava.__version__}\n" in citation
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            pinned[name.lower()] = version
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["dev"], *extras["plot"]]:
        assert re.split(r"[<>=]", requirement)[0].lower() in pinned, f"{requirement} has no tested version"
    assert pinned["torch"] == "2.13.0"
