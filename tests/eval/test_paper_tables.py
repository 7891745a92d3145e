"""Tables of finished runs: the paper's arithmetic, states of runs on disk, published rows, the scripts."""

import csv
import os
import re
import subprocess

import pytest

from llava.eval import table
from llava.eval.reports.paper_tables import TABLES, retained_percent
from llava.eval.reports.published import COLLECTED, PAPER, REPOSITORY, ROWS, published_rows
from llava.eval.reports.runs import COMPLETE, MISSING, PARTIAL, UNSCORED, count_questions, discover, find_run
from llava.eval.tasks.registry import COLUMNS, TASK_OF, TASKS, get_task
from tests.eval.helpers import ROOT, TINY_MODEL, answer, fails_with_one_line, read_json, write_json, write_jsonl
from tests.eval.small_data import write_all

PAPER_ROWS = [(row.checkpoint, row.tokens) for row in ROWS if row.source == PAPER and row.tokens]
# What each convention gives on the published scores; the paper prints 99.0 98.1 96.7 / 99.8 98.7 95.8 / 99.7 98.2 94.9.
PLAIN = [99.11, 98.19, 96.70, 99.77, 98.69, 95.81, 99.85, 98.17, 95.01]
AT_MOST_100 = [99.02, 98.13, 96.67, 99.74, 98.53, 95.81, 99.73, 98.17, 95.01]


def paper_scores(checkpoint, tokens):
    (dense,) = (row for row in published_rows(checkpoint, "dense", None) if row.source == PAPER)
    (row,) = (row for row in published_rows(checkpoint, "autoprune", tokens) if row.source == PAPER)
    return row, dense


@pytest.mark.parametrize(("name", "plain", "capped"), list(zip(PAPER_ROWS, PLAIN, AT_MOST_100, strict=True)))
def test_retained_percent_of_the_published_rows(name, plain, capped):
    """The mean of ratios lies within the rounding of the published scores around every published percentage."""
    row, dense = paper_scores(*name)
    assert retained_percent(row.scores, dense.scores) == pytest.approx(plain, abs=0.006)
    assert retained_percent(row.scores, dense.scores, 1.0) == pytest.approx(capped, abs=0.006)

    def half_digit(value):  # MME of table 1 and 2 is printed without decimals
        return 0.5 if value > 1000 and value == int(value) and dense.scores.get("mme_perception") != 1513.8 else 0.05

    low = retained_percent(
        {key: value - half_digit(value) for key, value in row.scores.items()},
        {key: value + half_digit(value) for key, value in dense.scores.items()},
    )
    high = retained_percent(
        {key: value + half_digit(value) for key, value in row.scores.items()},
        {key: value - half_digit(value) for key, value in dense.scores.items()},
    )
    assert low - 0.05 <= row.retained <= high + 0.05


def test_bounded_ratios_give_table_1_to_the_digit_but_not_table_2():
    """Why both are printed: neither convention alone explains every printed digit."""
    for tokens, value in ((192, "99.0"), (128, "98.1"), (64, "96.7")):
        row, dense = paper_scores("llava-v1.5-7b", tokens)
        assert f"{retained_percent(row.scores, dense.scores, 1.0):.1f}" == value == f"{row.retained}"
    for tokens, value in ((288, "99.8"), (144, "98.7"), (58, "95.8")):
        row, dense = paper_scores("llava-v1.5-13b", tokens)
        assert f"{retained_percent(row.scores, dense.scores):.1f}" == value == f"{row.retained}"


def test_published_rows_are_those_of_the_paper():
    row = published_rows("llava-v1.5-7b", "autoprune", 128)
    assert [r.source for r in row] == [PAPER, REPOSITORY]
    assert row[0].scores == {"mme_total": 1785, "mmbench": 64.3, "sqa": 69.7, "gqa": 59.9, "textvqa": 57.4}
    assert (row[0].retained, row[0].flops) == (98.1, 33.7)
    assert (row[1].scores["mme_perception"], row[1].scores["sqa"], row[1].scores["textvqa"]) == (1458, 69.6, 57.7)
    assert published_rows("llava-v1.6-vicuna-7b", "autoprune", 160)[0].scores["vqav2"] == 76.4
    assert published_rows("llava-v1.5-13b", "pyramiddrop", 64)[0].retained == 88.7
    assert published_rows("tiny-llava-v1.5", "autoprune", 64) == [] == published_rows("llava-v1.5-7b", "autoprune", 65)
    assert {key for row in ROWS for key in row.scores} <= set(COLUMNS)
    for name, entry in TABLES.items():
        budgets = [row.tokens for row in ROWS if row.source == PAPER and row.checkpoint == entry.checkpoint]
        assert budgets == [None, *entry.budgets], name
        script = (ROOT / "scripts" / "tables" / "run_table.sh").read_text()
        line = f"{name}) version={entry.version}; checkpoint={entry.checkpoint}; tiny={entry.tiny_checkpoint} ;;"
        assert line in script


# -- runs on disk


def write_run(out, name, run, result=None, count=4, tokens=(576, 64, 82.5), meta=None):
    """Answers, and if given scores and metadata, as the scripts leave them."""
    path = get_task(name).answers_file(out, run)
    metadata = {"tokens": dict(zip(("visual", "nominal", "processed"), tokens, strict=True))}
    write_jsonl(path, [{**answer(i, "x"), "metadata": metadata} for i in range(count)])
    if meta is not None:
        write_json(path.with_suffix(".meta.json"), meta)
    if result is not None:
        write_json(path.with_suffix(".json"), result)
    return path


def test_state_of_a_run(tmp_path):
    gqa = get_task("gqa")

    def status(questions=4):
        return find_run(gqa, tmp_path, "c", "autoprune", 64, questions).status

    assert status() == MISSING
    path = write_run(tmp_path, "gqa", "c/autoprune/n_64")
    assert status() == UNSCORED
    write_json(path.with_suffix(".json"), {"accuracy": 50.0})
    assert status() == status(None) == COMPLETE and status(5) == PARTIAL
    os.utime(path.with_suffix(".json"), (1, 1))
    assert status() == UNSCORED, "answers were changed after they were scored"
    write_run(tmp_path, "gqa", "c/autoprune/n_64", {"accuracy": 50.0}, meta={"complete": False})
    assert status() == PARTIAL
    meta = {"complete": True, "counts": {"total": 9}, "tokens": {"visual": 576, "nominal": 60, "processed": 80}}
    write_run(tmp_path, "gqa", "c/autoprune/n_64", {"accuracy": 50.0}, meta={**meta, "flops_ratio": 0.25})
    run = find_run(gqa, tmp_path, "c", "autoprune", 64)
    assert (run.status, run.questions) == (PARTIAL, 9)
    assert run.costs == {"visual": 576, "nominal": 60, "processed": 80, "flops_ratio": 0.25}
    meta = {"complete": True, "counts": {"total": 9, "answered": 4, "skipped": 5}}
    write_run(tmp_path, "gqa", "c/autoprune/n_64", {"accuracy": 50.0}, meta=meta)
    run = find_run(gqa, tmp_path, "c", "autoprune", 64, 9)
    assert (run.status, run.skipped) == (COMPLETE, 5), "samples that cannot be read do not make a run endless"
    vqav2 = write_run(tmp_path, "vqav2", "c/dense")
    assert find_run(get_task("vqav2"), tmp_path, "c", "dense", None, 4).status == COMPLETE, "a server grades it"
    write_json(vqav2.with_suffix(".server.json"), {"accuracy": 78.5})
    assert find_run(get_task("vqav2"), tmp_path, "c", "dense", None, 4).result == {"accuracy": 78.5}


def test_means_without_metadata_leave_out_questions_without_image(tmp_path):
    path = write_run(tmp_path, "pope", "c/fastv/n_64", {"f1_mean": 0.8}, count=2)
    with open(path, "a") as file:
        file.write('{"question_id": 7, "metadata": {"tokens": {"visual": 0, "nominal": 0, "processed": 0}}}\n')
        file.write('{"question_id": 8, "te')
    run = find_run(get_task("pope"), tmp_path, "c", "fastv", 64, 4)
    assert run.answered == 4 and run.costs == {"visual": 576, "nominal": 64, "processed": 82.5}
    assert discover(get_task("pope"), tmp_path, "c") == [("fastv", 64)]
    write_run(tmp_path, "gqa", "c/fastv/n_64")
    write_run(tmp_path, "gqa", "c/fastv/n_128")
    write_run(tmp_path, "gqa", "c/dense")
    assert discover(get_task("gqa"), tmp_path, "c") == [("dense", None), ("fastv", 128), ("fastv", 64)]


RESULTS = {
    "mme": [{"perception": 1500.0, "cognition": 300.0}, {"perception": 1400.0, "cognition": 310.0}],
    "mmbench": [{"circular": 64.0}, {"circular": 64.0}],
    "sqa": [{"img_accuracy": 70.0, "accuracy": 1.0}, {"img_accuracy": 77.0, "accuracy": 1.0}],
    "gqa": [{"accuracy": 60.0}, {"accuracy": 57.0}],
    "textvqa": [{"accuracy": 58.0}, {"accuracy": 58.0}],
    "pope": [{"f1_mean": 0.86}, {"f1_mean": 0.825}],
}


@pytest.fixture
def finished(tmp_path):
    """Dense and AutoPrune 64 on six of the seven benchmarks of table 1."""
    for name, results in RESULTS.items():
        for run, result, flops in zip(("dense", "autoprune/n_64"), results, (1.0, 0.232), strict=True):
            meta = {"complete": True, "counts": {"total": 4}, "flops_ratio": flops}
            tokens = (576, 576, 576) if run == "dense" else (576, 64, 82)
            write_run(tmp_path, name, f"llava-v1.5-7b/{run}", result, tokens=tokens, meta=meta)
    return tmp_path


def test_table_by_hand(finished, capsys):
    """Ratios 1710/1800, 1, 1.1, 0.95, 1: mean 1; at most one each: 0.98."""
    out = {kind: finished / f"t.{kind}" for kind in ("csv", "json", "markdown")}
    argv = ["--table", "1", "--data-dir", str(finished), "--budgets", "64"]
    table.main([*argv, *(str(x) for kind, path in out.items() for x in (f"--{kind}", path))])
    printed = capsys.readouterr().out
    dense, ours = read_json(out["json"])["rows"]
    assert (ours["retained"], ours["retained_at_most_100"]) == (pytest.approx(100.0), pytest.approx(98.0))
    assert dense["retained"] == 100.0 and ours["costs"]["processed"] == 82 and ours["costs"]["flops_ratio"] == 0.232
    assert ours["scores"]["pope"] == pytest.approx(82.5) and ours["scores"]["mme_total"] == 1710.0
    assert (
        "| AutoPrune 64 | 1710 | 64.0 | 77.0 | 57.0 | 58.0 | 1400.0 | 82.5 | - | 100.0% (98.0%) | 64.0 | 82.0 | 23.2% |"
        in printed
    )
    assert "| *AutoPrune 64, AutoPrune paper (arXiv 2509.23931)* | 1745 | 63.6 | 69.6 | 57.7 | 57.1 |" in printed
    assert "AutoPrune 64: missing: mmbench_cn." in printed and COLLECTED not in printed
    assert out["markdown"].read_text() == printed
    rows = list(csv.DictReader(out["csv"].read_text().splitlines()))
    assert [row["source"] for row in rows] == ["measured", PAPER, REPOSITORY] * 2
    assert rows[3]["retained"] == str(ours["retained"]) and rows[3]["tokens_nominal"] == "64.0"
    assert (rows[4]["tokens"], rows[4]["retained"], rows[4]["flops_ratio"]) == ("64", "96.7", "0.232")


def test_table_of_what_is_there(finished, capsys):
    """Without --table: every benchmark, method and budget that has runs; other methods' published rows."""
    meta = {"complete": True, "counts": {"total": 5, "skipped": 1}}
    write_run(finished, "gqa", "llava-v1.5-7b/fastv/n_64", {"accuracy": 48.0}, meta=meta)
    table.main(["--checkpoint", "llava-v1.5-7b", "--data-dir", str(finished), "--benchmarks", "gqa, POPE"])
    printed = capsys.readouterr().out
    rows = [line.split(" | ")[0].strip("| ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row and "*" not in row] == ["dense", "AutoPrune 64", "FastV 64"]
    assert "| FastV 64 | 48.0 | - | 80.0% (80.0%) |" in printed
    assert f"*FastV 64, {COLLECTED}* | 46.0 | 35.5 | 76.9% |" in printed
    assert "FastV 64: retained is over 1 of 2 figures only." in printed
    assert "FastV 64: missing: pope." in printed
    assert "FastV 64: scored without samples that could not be read: gqa (1)." in printed


def test_table_says_what_its_figures_refer_to(finished, capsys):
    """A limit, and a dense row on another number of tokens than the FLOPs of a pruned one refer to."""
    argv = ["--checkpoint", "llava-v1.5-7b", "--data-dir", str(finished), "--benchmarks", "gqa"]
    table.main(argv)
    printed = capsys.readouterr().out
    assert "--limit" not in printed and "starts from" not in printed
    meta = {"complete": True, "counts": {"total": 4}, "flops_ratio": 0.18}
    write_run(finished, "gqa", "llava-v1.5-7b/autoprune/n_64", {"accuracy": 57.0}, tokens=(2880, 640, 835), meta=meta)
    table.main([*argv, "--limit", "4", "--json", str(finished / "t.json")])
    printed = capsys.readouterr().out
    assert "Only the first 4 questions of each benchmark" in printed and read_json(finished / "t.json")["limit"] == 4
    assert "AutoPrune 64: starts from 2880 visual tokens, the dense row from 576; FLOPs are relative" in printed


def test_shares_as_budgets(finished, capsys):
    """A budget with a point is a share of each prompt's tokens, in files' names, labels and lists."""
    write_run(finished, "gqa", "llava-v1.5-7b/autoprune/r_0.11", {"accuracy": 48.0}, meta={"complete": True})
    write_run(finished, "gqa", "llava-v1.5-7b/autoprune/r_x", {"accuracy": 48.0})
    place = (get_task("gqa"), finished, "llava-v1.5-7b")
    assert discover(*place) == [("dense", None), ("autoprune", 64), ("autoprune", 0.11)]
    assert find_run(*place, "autoprune", 0.11).status == COMPLETE
    argv = ["--checkpoint", "llava-v1.5-7b", "--data-dir", str(finished), "--benchmarks", "gqa"]
    table.main(argv)
    printed = capsys.readouterr().out
    assert "| AutoPrune 64 | 57.0 |" in printed and "| AutoPrune 0.11 of all | 48.0 | 80.0% (80.0%) |" in printed
    table.main([*argv, "--methods", "autoprune", "--budgets", "0.11,0.25", "--missing"])
    assert capsys.readouterr().out == "gqa 0.25 autoprune\n"


def test_missing_runs_are_listed(finished, capsys):
    argv = ["--table", "1", "--data-dir", str(finished), "--budgets", "64", "--missing"]
    table.main(argv)
    assert capsys.readouterr().out.splitlines() == ["mmbench_cn dense dense", "mmbench_cn 64 autoprune"]
    # The question file decides what a whole run is.
    write_jsonl(finished / "pope" / "llava_pope_test.jsonl", [{"question_id": i, "text": "?"} for i in range(9)])
    table.main([*argv, "--benchmarks", "pope"])
    assert capsys.readouterr().out.splitlines() == ["pope dense dense", "pope 64 autoprune"]
    table.main([*argv, "--benchmarks", "pope", "--limit", "4"])
    assert capsys.readouterr().out == ""


def test_bad_input(finished, capsys):
    data = ["--data-dir", finished]
    for argv, part in (
        ([], "--table"),
        (["--table", "1", *data, "--budgets", "x"], "--budgets"),
        (["--table", "1", *data, "--budgets", "64,1.5"], "--budgets"),
        (["--table", "1", *data, "--benchmarks", "seed"], "none of seed is part of table 1"),
        (["--table", "1", *data, "--benchmarks", "nosuch"], "unknown benchmark"),
        (["--table", "1", *data, "--limit", "0"], "--limit"),
        (["--table", "1", *data, "--methods", "nope", "--missing"], "unknown pruning method 'nope'"),
        (["--table", "1", "--insert", "x.md"], "--insert"),
        (["--checkpoint", "other", *data], "no run of 'other'"),
    ):
        fails_with_one_line(table.main, argv, capsys, part)
    get_task("gqa").answers_file(finished, "llava-v1.5-7b/dense").with_suffix(".json").write_text("[1]")
    fails_with_one_line(table.main, ["--table", "1", *data], capsys, "merge.json", "JSON object")


def test_every_benchmark_counts_its_questions(tmp_path):
    data = write_all(tmp_path)
    counts = {entry.name: count_questions(entry, data) for entry in TASKS}
    assert counts == {"vqav2": 3, "gqa": 3, "vizwiz": 3, "sqa": 3, "textvqa": 3, "pope": 6, "mme": 6, "mmbench": 4,
                      "mmbench_cn": 4, "mmvet": 2, "seed": 3, "llavabench": 2, "senna": 2, "nuscenes_planning": 2,
                      "drivelm": 1}  # fmt: skip
    assert count_questions(get_task("pope"), data, 4) == 4
    assert count_questions(get_task("pope"), tmp_path / "none") is None


# -- the scripts


def run_table(number, python, *arguments, **environment):
    hidden = ("CUDA_VISIBLE_DEVICES", "METHOD", "CONV_MODE", "LLAVA_VERSION", "PYTHONPATH", "TINY", "METHODS", "CKPT")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"PYTHON": str(python), **{key: str(value) for key, value in environment.items()}}
    command = ["bash", str(ROOT / "scripts" / "tables" / f"table{number}.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_table_script_runs_what_is_missing_and_no_more(checkpoint, python, tmp_path):
    data = write_all(tmp_path / "small data")
    settings = {"MODEL_DIR": checkpoint.parent, "CKPT": checkpoint.name, "DATA_DIR": data, "OUT_DIR": tmp_path / "out"}
    settings |= {"BUDGETS": "4", "BENCHMARKS": "pope vqav2 gqa"}
    flags = ("--max-new-tokens", "2", "--device", "cpu", "--batch-size", "2")
    (data / "gqa" / "data" / "images").rename(tmp_path / "away")
    first = run_table(2, python, *flags, **settings)
    assert first.returncode == 2, "what fails is told, and does not stop the others"
    started = re.findall(r"^\[table 2\] (\w+ \w+ \w+)$", first.stderr, flags=re.MULTILINE)
    wanted = [f"{name} {run}" for run in ("dense dense", "autoprune 4") for name in ("vqav2", "gqa", "pope")]
    assert started == wanted
    assert "gqa autoprune 4 ended with status 2" in first.stderr and "AutoPrune 4: missing: gqa." in first.stdout
    assert len(read_json(tmp_path / "out" / "table2.json")["rows"]) == 2

    (tmp_path / "away").rename(data / "gqa" / "data" / "images")
    second = run_table(2, python, *flags, **settings)
    assert second.returncode == 0, second.stderr
    started = re.findall(r"^\[table 2\] (\w+ \w+ \w+)$", second.stderr, flags=re.MULTILINE)
    assert started == ["gqa dense dense", "gqa autoprune 4"]
    rows = read_json(tmp_path / "out" / "table2.json")["rows"]
    assert all(set(row["scores"]) == {"vqav2", "gqa", "pope"} for row in rows)
    assert rows[0]["costs"]["nominal"] == 16 and rows[1]["costs"]["nominal"] < 16
    assert rows[0]["costs"]["flops_ratio"] == 1 and 0 < rows[1]["costs"]["flops_ratio"] < 1
    assert (tmp_path / "out" / "table2.md").read_text() == second.stdout
    assert "[table 2]" not in run_table(2, python, *flags, **settings).stderr


@pytest.mark.skipif(not (TINY_MODEL / "config.json").is_file(), reason="the trained checkpoint is not in this checkout")
def test_table_on_the_embedded_default(python, tmp_path):
    settings = {"TINY": "1", "OUT_DIR": tmp_path, "BENCHMARKS": "pope", "BUDGETS": "64"}
    result = run_table(1, python, "--limit", "2", "--device", "cpu", **settings)
    assert result.returncode == 0, result.stderr
    dense, ours = read_json(tmp_path / "table1.json")["rows"]
    assert (dense["costs"]["nominal"], ours["costs"]["nominal"]) == (576, pytest.approx(64, abs=1))
    assert read_json(tmp_path / "table1.json")["checkpoint"] == "tiny-llava-v1.5" and ours["published"] == []


def test_table_without_checkpoint_is_refused(python, tmp_path):
    result = run_table(3, python, MODEL_DIR=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert f"checkpoint folder not found: {tmp_path / 'llava-v1.6-vicuna-7b'}" in result.stderr


def test_columns_read_what_scorers_write():
    # Planning has no figure without a convention, DriveLM none without a grader: they are in no table.
    assert {TASK_OF[key].name for key in COLUMNS} == {task.name for task in TASKS} - {"nuscenes_planning", "drivelm"}
