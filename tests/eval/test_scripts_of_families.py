"""The benchmark scripts on a folder of another family: one benchmark for each of the four tools that answer."""

from __future__ import annotations

import os
import subprocess

import pytest

from llava.eval.tasks.registry import get_task
from tests.eval.helpers import ROOT, read_json, read_jsonl
from tests.eval.small_data import write_all
from tests.families.test_eval import folder  # noqa: F401 - a fixture


@pytest.mark.parametrize("folder", ["internvl", "qwen2_vl"], indirect=True)
def test_every_tool_answers_and_scores(folder, python, tmp_path):  # noqa: F811
    name, place = folder
    environment = {key: value for key, value in os.environ.items() if key not in ("METHOD", "CUDA_VISIBLE_DEVICES")}
    environment |= {"MODEL_DIR": str(place.parent), "CKPT": place.name, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    environment |= {"DATA_DIR": str(write_all(tmp_path)), "OUT_DIR": str(tmp_path)}
    tools = set()
    for benchmark, budget, run, score in (
        ("pope", "0.5", "autoprune/r_0.5", "f1_mean"),
        ("sqa", "6", "autoprune/n_6", "accuracy"),
        ("mmbench", "0.25", "autoprune/r_0.25", "circular"),
        ("mmvet", "dense", "dense", None),
    ):
        task = get_task(benchmark)
        tools.add(task.tool)
        command = ["bash", str(ROOT / "scripts" / "v1_5" / "eval" / f"{benchmark}.sh"), budget]
        more = ("--device", "cpu", "--max-new-tokens", "2")
        result = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        answers = task.answers_file(tmp_path, f"{place.name}/{run}")
        tokens = [line["metadata"]["tokens"] for line in read_jsonl(answers)]
        assert len(tokens) == len(task.read_questions(task.questions_path(tmp_path)))
        for t in tokens:  # one of ScienceQA's has no image
            share = t["nominal"] / t["visual"] if t["visual"] else None
            expected = {"0.5": 0.5, "0.25": 0.25, "6": 6 / (t["visual"] or 1), "dense": 1}[budget]
            assert share is None or share == pytest.approx(expected, abs=1.5 / t["visual"]), (benchmark, t)
        metadata = read_json(answers.with_suffix(".meta.json"))
        assert metadata["complete"] is True and metadata["family"] == name
        assert metadata["tokens"]["visual"] > 0
        if score is not None:
            assert score in read_json(answers.with_suffix(".json"))
    assert len(tools) == 4
