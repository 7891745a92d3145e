"""MM-Vet aggregation on hand-computed grades."""

import pytest

from llava.eval import eval_mmvet
from llava.eval.tasks import mmvet as mmvet_task
from tests.eval.helpers import fails_with_one_line, read_json, write_json

QUESTIONS = {
    "v1_0": ["ocr", "math"],
    "v1_1": ["rec"],
    "v1_2": ["rec", "know", "gen", "rec"],
    "v1_3": ["ocr", "spat"],
}
# Two runs each; means 1.0, 0.5, 0.1, 0.
SCORES = {"v1_0": [1.0, 1.0], "v1_1": [0.4, 0.6], "v1_2": [0.0, 0.2], "v1_3": [0, 0.0]}
EXPECTED = {"total": 40.0, "rec": 30.0, "ocr": 50.0, "know": 10.0, "gen": 10.0, "spat": 0.0, "math": 100.0}


@pytest.fixture
def annotation(tmp_path):
    entries = {
        key: {"imagename": f"{key}.png", "question": "?", "answer": "a", "imagesource": "", "capability": names}
        for key, names in QUESTIONS.items()
    }
    return write_json(tmp_path / "mm-vet.json", entries)


def grades(scores):
    return {key: {"model": ["gpt-4"] * len(s), "content": ["0"] * len(s), "score": s} for key, s in scores.items()}


def test_runs_are_averaged(annotation, tmp_path, capsys):
    graded = write_json(tmp_path / "g.json", grades(SCORES))
    flat = tmp_path / "s.json"
    eval_mmvet.main(["--result-file", str(graded), "--annotation-file", str(annotation), "--json", str(flat)])
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "rec\tocr\tknow\tgen\tspat\tmath\ttotal",
        "30.0\t50.0\t10.0\t10.0\t0.0\t100.0\t40.0",
        "std: 5.0, runs: 35.0, 45.0",
    ]
    scores = read_json(flat)
    assert {key: scores[key] for key in EXPECTED} == pytest.approx(EXPECTED)
    assert (scores["num_runs"], scores["questions_rec"], scores["missing"]) == (2, 2, 0)
    assert printed.err == ""


def test_plain_scores(annotation, tmp_path, capsys):
    plain = {key: sum(s) / 2 for key, s in SCORES.items()} | {"v1_3": "0.0"}
    result = mmvet_task.score_files(str(write_json(tmp_path / "g.json", plain)), str(annotation))
    assert {key: result[key] for key in EXPECTED} == pytest.approx(EXPECTED)


def test_missing_unmatched_and_uneven_grades_are_told(annotation, tmp_path, capsys):
    scores = {"v1_0": [1.0], "v1_1": [0.0, 1.0], "v1_2": [], "v1_9": [1.0]}
    graded = write_json(tmp_path / "g.json", grades(scores))
    flat = tmp_path / "s.json"
    eval_mmvet.main(["--result-file", str(graded), "--annotation-file", str(annotation), "--json", str(flat)])
    printed = capsys.readouterr()
    result = read_json(flat)
    assert (result["total"], result["rec"], result["math"], result["know"]) == (75.0, 50.0, 100.0, 0.0)
    assert (result["scored"], result["missing"], result["unmatched"]) == (2, 2, 1)
    assert "2 of 4 questions have no answer" in printed.err and "v1_2, v1_3" in printed.err
    assert ": v1_9" in printed.err and "different numbers of times" in printed.err


def test_full_precision_in_json_one_decimal_on_screen(annotation, tmp_path, capsys):
    scores = {"v1_0": [0.7], "v1_1": [0.3], "v1_2": [0.3]}
    graded = write_json(tmp_path / "g.json", grades(scores))
    eval_mmvet.main(["--result-file", str(graded), "--annotation-file", str(annotation)])
    assert capsys.readouterr().out.splitlines()[1].endswith("\t43.3")
    result = mmvet_task.score_files(str(graded), str(annotation))
    assert result["total"] == pytest.approx(130 / 3, abs=1e-9)


@pytest.mark.parametrize("value", [1.2, -0.1, "good", None, True, [0.5, "x"], float("nan"), {"score": [2]}])
def test_what_is_no_grade(annotation, tmp_path, capsys, value):
    graded = write_json(tmp_path / "g.json", {"v1_0": value})
    argv = ["--result-file", graded, "--annotation-file", annotation]
    fails_with_one_line(eval_mmvet.main, argv, capsys, "g.json: question v1_0", "not a number from 0 to 1")


def test_bad_input(annotation, tmp_path, capsys):
    graded = write_json(tmp_path / "g.json", grades(SCORES))

    def fails(*parts, result=graded, truth=annotation):
        fails_with_one_line(eval_mmvet.main, ["--result-file", result, "--annotation-file", truth], capsys, *parts)

    fails("no grade belongs", result=write_json(tmp_path / "o.json", {"0": 1.0}))
    fails("'score' is missing", result=write_json(tmp_path / "o.json", {"v1_0": {}}))
    fails("not a grade file", result=write_json(tmp_path / "o.json", [1.0]))
    fails("v1_0.capability must have 1", truth=write_json(tmp_path / "a.json", {"v1_0": {"capability": []}}))
    fails("annotation file not found", truth=tmp_path / "nowhere.json")
