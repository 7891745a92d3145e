"""The GPU check, rehearsed on the CPU; what becomes of its record; parts that have no time left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The record of a rehearsal, run as people run it."""
    folder = tmp_path_factory.mktemp("check")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--rehearse", str(folder)],
        env={**os.environ, "AUTOPRUNE_PYTHON": sys.executable},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / gpu_check.FILE


def test_a_rehearsal_goes_through_all_parts(rehearsal):
    record = json.loads(rehearsal.read_text())
    assert record["rehearsal"] and list(record["steps"]) == list(gpu_check.PARTS)
    said = {name: said for steps in record["steps"].values() for name, said in steps.items()}
    assert all(one.startswith("done") for one in said.values())
    # Every test marked gpu was found, and skipped, as there is none.
    assert len(record["tests"]) > 20 and all(said.startswith("skipped") for said in record["tests"].values())
    found = {result["tool"]: result["rows"] for result in record["results"]}
    assert set(found) == {"prefill", "decode", "first_token", "profile"}
    assert {row["batch"] for row in found["prefill"]} == {1, 8, 16}
    methods = {row["method"] for row in found["prefill"]}
    assert {"dense", "autoprune", "autoprune graphs", "autoprune published", "fastv", "divprune"} <= methods
    for row in found["prefill"]:
        assert row["ms"] > 0 and (row["method"] == "dense" or row["floor_ms"] > 0)
    assert record["environment"]["torch"] and record["seconds"] < 600


def test_figures_of_a_rehearsal_are_not_taken(rehearsal, tmp_path):
    with pytest.raises(UserError, match="rehearsal"):
        gpu_check.take(rehearsal, tmp_path)


def test_a_check_becomes_results(rehearsal, tmp_path):
    record = json.loads(rehearsal.read_text())
    record["rehearsal"] = False
    copy = tmp_path / "record.json"
    copy.write_text(json.dumps(record))
    gpu_check.take(copy, tmp_path / "results")
    written = sorted(path.name.split("--")[0] for path in (tmp_path / "results").glob("*.json"))
    assert written == sorted(result["tool"] for result in record["results"])


def test_what_does_not_fit_is_skipped_and_what_fails_is_told(tmp_path):
    check = gpu_check.Check(tmp_path, gpu_check.MINUTES, rehearse=True)
    ran = []
    check.begin("tests")
    check.step("too long", 10_000, lambda until: ran.append("too long"))
    check.step("broken", 1, lambda until: 1 / 0)
    check.step("fine", 1, lambda until: ran.append("fine"))
    steps = json.loads((tmp_path / gpu_check.FILE).read_text())["steps"]["tests"]
    assert ran == ["fine"] and steps["fine"].startswith("done")
    assert "10000 at least" in steps["too long"] and steps["broken"] == "failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("text", ["prefill", "nothing=1", "prefill=-1", "prefill=long", "prefill=nan"])
def test_minutes_that_cannot_be_read(text):
    with pytest.raises(UserError, match="--minutes"):
        gpu_check.minutes_of(text)


def test_other_minutes():
    assert gpu_check.minutes_of("prefill=4,profile=0") == {**gpu_check.MINUTES, "prefill": 4.0, "profile": 0.0}


def test_a_record_of_something_else(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(UserError, match=r"other\.json"):
        gpu_check.take(path, tmp_path)
