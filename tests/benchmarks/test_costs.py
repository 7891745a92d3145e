"""What selecting costs: the benchmark on a tiny decoder, and the table of docs/methods.md."""

from __future__ import annotations

import json

import pytest

from benchmarks import costs, costs_table
from benchmarks.flags import Job, decoder_parser
from benchmarks.saved import RESULTS, read_results
from llava.pruning import get_method, list_methods
from llava.utils import UserError
from tests.conftest import ROOT

METHODS = "fastervlm,pdrop,scope,prumerge_plus,vflowopt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("results")
    flags = ["--geometry", "tiny", "--device", "cpu", "--threads", "1", "--budgets", "8", "--rounds", "1"]
    costs.main([*flags, "--methods", METHODS, "--save", "--results-dir", str(folder)])
    return folder


def test_every_method_has_its_time_and_floor(saved):
    (result,) = read_results(saved)
    assert result.tool == "costs" and [row["method"] for row in result.rows] == METHODS.split(",")
    for row in result.rows:
        assert row["selection_ms"] > 0 and row["floor_ms"] > 0
        net = (row["selection_ms"] - row["saved_ms"]) / row["floor_ms"]
        assert row["of_pruned_floor"] == pytest.approx(net, rel=1e-2, abs=1e-4)
        # Who asks the next layer has projected keys that this layer needs.
        assert (row["saved_ms"] > 0) == (row["method"] == "pdrop")
        assert row["extra_mib"] is None or row["extra_mib"] >= 0


def test_methods_in_the_tower_are_measured_on_one_crop(capsys):
    flags = ["--geometry", "tiny", "--device", "cpu", "--visual-tokens", "16", "--budgets", "4", "--rounds", "1"]
    costs.main([*flags, "--methods", "tome,gtp_vit,flowcut"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["tome", "gtp_vit", "flowcut"]
    assert all(row["selection_ms"] > 0 and row["saved_ms"] != 0 for row in rows)


def test_keys_that_the_next_layer_need_not_project(capsys):
    """As many as there are tokens left where PyramidDrop drops: its stages are told, so they are known."""
    method = get_method("pdrop")(layers="1/3", ratio=0.5)
    job = Job.of(decoder_parser("", rounds=1).parse_args(["--geometry", "tiny", "--device", "cpu", "--budgets", "8"]))
    prompt = job.prompt(1)
    text, visual = prompt.tokens - job.visual, job.visual
    work = costs.Selecting(job.decoder(), method, prompt, {})
    assert work.reused() == [text + visual // 2, text + visual // 4]


def test_more_than_one_sample_is_refused():
    with pytest.raises((UserError, SystemExit)):
        costs.main(["--geometry", "tiny", "--device", "cpu", "--batch-sizes", "2", "--budgets", "8"])


def test_what_classes_declare():
    assert costs_table.declared(get_method("fastv")())[:3] == ["decoder", "–", "last token (1 layer)"]
    assert costs_table.declared(get_method("tome")())[3:5] == ["not in the tower", "own LLaVA"]
    assert costs_table.declared(get_method("vscan")())[:2] == ["behind the projector and decoder", "CLS row"]
    assert costs_table.declared(get_method("autoprune")())[1:3] == ["CLS row", "text (32 layers)"]
    assert costs_table.declared(get_method("hiprune")())[1] == "all rows"
    for name in list_methods():
        assert len(costs_table.declared(get_method(name)())) == 6


def test_the_document_is_that_of_the_classes_and_results(capsys):
    assert not costs_table.main(["--check"])
    text = (ROOT / "docs" / "methods.md").read_text()
    assert all(f"| `{name}` |" in text for name in set(list_methods()) - {"dense"})
    found = costs_table.measured(read_results(RESULTS))
    assert {576, 2880} == set(found)


def test_another_result_changes_the_document(saved, tmp_path):
    document = tmp_path / "methods.md"
    document.write_text("# T\n\n<!-- costs: begin -->\n<!-- costs: end -->\n")
    flags = ["--document", str(document), "--results-dir", str(saved)]
    with pytest.raises(SystemExit, match="1"):
        costs_table.main([*flags, "--check"])
    costs_table.main(flags)
    assert not costs_table.main([*flags, "--check"])
    line = next(line for line in document.read_text().splitlines() if line.startswith("| `scope`"))
    assert "ms |" in line and "%" in line
