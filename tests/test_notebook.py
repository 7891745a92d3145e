"""docs/quickstart.ipynb: its cells run from top to bottom, and its stored outputs are small and of such a run."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def text_of(cell) -> str:
    return "".join("".join(output.get("text", [])) for output in cell["outputs"])


def test_outputs_are_stored_and_small():
    assert NOTEBOOK.stat().st_size < 100_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1)), "run from top to bottom"
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds <= {"stream", "execute_result", "display_data"}, "no errors"
    pictures = [1 for cell in CODE for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8") and "/tmp" not in NOTEBOOK.read_text(encoding="utf-8")


def test_its_cells_run(capsys, monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)  # nothing depends on where it runs
    names: dict = {}
    for cell in CODE:
        capsys.readouterr()
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
        printed = capsys.readouterr().out
        assert printed.splitlines()[:2] == text_of(cell).splitlines()[:2]
        assert len(printed.splitlines()) == len(text_of(cell).splitlines())
    pyplot.close("all")
    assert names["trace"].mean_tokens("nominal") == 64 and len(names["rows"]) == 10
    assert names["rows"][0]["mean_accuracy"]["value"] == 100
