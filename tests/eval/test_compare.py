"""The comparison: intervals and graders against independent computations, the tool on a random checkpoint."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.eval import compare, compare_report
from llava.eval.common.questions import Question
from llava.eval.reports import results
from llava.eval.reports import settings as variants
from llava.eval.reports.bootstrap import estimates, resampled_means, retained
from llava.eval.reports.comparison_plots import look_of
from llava.eval.reports.memory import PeakMemory, resident_bytes
from llava.eval.tasks import vqa as vqa_task
from llava.eval.tasks.registry import COMPARED
from llava.eval.tasks.registry import DEMO as BENCHMARKS
from llava.pruning import list_methods
from llava.utils import UserError
from tests.eval.helpers import TINY_DATA, fails_with_one_line, read_json, read_jsonl, write_json, write_jsonl
from tests.eval.test_demo import perfect_answers


def test_the_interval_of_a_mean_is_the_textbook_one():
    """For a mean of many values the percentile interval must approach mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).normal(50, 10, size=(900, 1))
    drawn = resampled_means(values, 4000, seed=0)
    found = estimates(values.mean(0), drawn)[0]
    error = 1.96 * values.std() / 30
    assert found.value == pytest.approx(values.mean())
    assert found.value - found.low == pytest.approx(error, rel=0.06)
    assert found.high - found.value == pytest.approx(error, rel=0.06)


def test_settings_are_resampled_together():
    """A constant distance between two settings has no interval, however wide each one's own is."""
    values = np.random.default_rng(2).integers(0, 2, size=(200, 1)) * np.array([1.0, 1.0, 0.5])
    drawn = resampled_means(values, 300, seed=3, name="a")
    assert (drawn[:, 0] == drawn[:, 1]).all() and drawn[:, 0].std() > 0
    ratio = estimates(retained({"a": values.mean(0)}), retained({"a": drawn}))
    assert (ratio[2].value, ratio[2].low, ratio[2].high) == pytest.approx((50.0, 50.0, 50.0))


def test_draws_are_seeded_and_differ_between_benchmarks(monkeypatch):
    values = np.arange(50.0)[:, None]
    first = resampled_means(values, 20, seed=0, name="a")
    assert (first == resampled_means(values, 20, seed=0, name="a")).all()
    assert (first != resampled_means(values, 20, seed=0, name="b")).any()
    assert (first != resampled_means(values, 20, seed=1, name="a")).any()
    monkeypatch.setattr("llava.eval.reports.bootstrap._BLOCK", 150)  # drawn in blocks of three
    assert np.allclose(first, resampled_means(values, 20, seed=0, name="a"))


def test_retained_leaves_out_what_dense_cannot_do():
    means = {"a": np.array([80.0, 40.0]), "b": np.array([50.0, 45.0]), "c": np.array([0.0, 10.0])}
    assert retained(means) == pytest.approx([100.0, 70.0])
    assert np.isnan(retained({"c": means["c"]})).all()


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda task: task.title)
def test_the_mean_credit_is_the_scorers_accuracy(benchmark):
    """On answers of which some are wrong, some unreadable and some almost right."""
    answers = perfect_answers()[benchmark.title]
    for number, answer in enumerate(answers):
        if number % 3 == 0:
            answer["text"] = ("No", "Yes", "a red circle", "")[number // 3 % 4]
    grade = benchmark.grader(TINY_DATA)
    credits = [grade(answer) for answer in answers]
    accuracy = benchmark.score(TINY_DATA, answers).accuracy
    assert 100 * np.mean(credits) == pytest.approx(accuracy) and 20 < accuracy < 95
    assert grade({"question_id": "none/none.png", "prompt": "?", "text": "Yes"}) is None


@pytest.mark.parametrize("key", ["vqav2", "vizwiz"])
def test_vqa_credits_are_those_of_its_own_scorer(key, tmp_path):

    benchmark = next(b for b in COMPARED if b.key == key)
    questions = read_jsonl(benchmark.questions_path(TINY_DATA))
    truth = {"vqav2": "vqav2/v2_mscoco_test-dev2015_annotations.json", "vizwiz": "vizwiz/test.json"}[key]
    texts = [("yes", "2", "red", "unanswerable", "circle")[i % 5] for i in range(len(questions))]
    answers = [
        {"question_id": q["question_id"], "prompt": q["text"], "text": text}
        for q, text in zip(questions, texts, strict=True)
    ]
    path = write_jsonl(tmp_path / "answers.jsonl", answers)
    own = vqa_task.score_files(str(TINY_DATA / truth), str(path), str(benchmark.questions_path(TINY_DATA)))
    grade = benchmark.grader(TINY_DATA)
    credits = [grade(answer) for answer in answers]
    assert 100 * np.mean(credits) == pytest.approx(own["accuracy"]) and own["accuracy"] > 3
    assert benchmark.score(TINY_DATA, answers).accuracy == pytest.approx(own["accuracy"])
    assert benchmark.grader(tmp_path) is None, "the real test answers are with the server"


def science_folder(root):
    problems = {str(i): {"choices": ["x", "y", "z"], "answer": i % 3, "question": "?"} for i in range(6)}
    write_json(root / "scienceqa/problems.json", problems)
    write_json(root / "scienceqa/pid_splits.json", {"test": list(problems)})
    entries = [
        {"id": i, "image": "p.png", "conversations": [{"from": "human", "value": f"What?\n<image>\nA. x {i}"}]}
        for i in problems
    ]
    write_json(root / "scienceqa/llava_test_CQM-A.json", entries)


def mmbench_table(path):
    path.parent.mkdir(parents=True)
    lines = ["index\tquestion\tA\tB\tC\tanswer\timage"]
    lines += [f"{i}\tWhich {i}?\tx\ty\tz\t{'ABC'[i % 3]}\tAAAA" for i in range(6)]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("key", ["scienceqa", "mmbench", "mmbench_cn"])
def test_multiple_choice_is_asked_and_graded_as_its_own_tools_do(key, tmp_path):
    benchmark = next(b for b in COMPARED if b.key == key)
    if key == "scienceqa":
        science_folder(tmp_path)
    else:
        mmbench_table(benchmark.questions_path(tmp_path))
    asked = benchmark.ask(tmp_path)
    assert len(asked.questions) == 6
    prompt = asked.answerer["prompt_text"](asked.questions[0])
    assert prompt.endswith("请直接回答选项字母。" if key.endswith("cn") else "given choices directly.")
    assert "<image>" not in prompt, "the runner puts the placeholder in"
    texts = ["A", "B. y", "A", "x", "nothing", "C"]
    answers = [
        {"question_id": q.id, "prompt": q.text, "text": text} for q, text in zip(asked.questions, texts, strict=True)
    ]
    grade = benchmark.grader(tmp_path)
    right = [1, 1, 0, key != "scienceqa", 0, 1]  # ScienceQA's scorer reads letters only, MMBench's also option texts
    assert [grade(answer) for answer in answers] == right
    assert 100 * np.mean(right) == pytest.approx(benchmark.score(tmp_path, answers).accuracy)
    score = benchmark.score(tmp_path, answers[:2])
    assert (score.accuracy, score.samples) == (100.0, 2), "of a subset only what was asked counts"


def test_peak_memory_counts_what_is_touched():
    if resident_bytes() is None:
        pytest.skip("this system does not tell the resident memory of a process")
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    with PeakMemory(torch.device("cpu")) as busy:
        block = np.ones(64 << 20, dtype=np.uint8)
        del block
    if busy.bytes is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert idle.bytes < 8 << 20 and 60 << 20 < busy.bytes < 80 << 20
    assert PeakMemory(torch.device("meta")).bytes is None


def test_variants_and_settings(tmp_path):
    groups = variants.ablation_variants(["gamma", "x0"])
    assert [v.label for v in groups][:2] == ["autoprune", "gamma=0.05"]
    assert {v.group for v in groups[1:]} == {"gamma", "x0"}
    assert len(variants.ablation_variants([])) == 1 + sum(map(len, variants.ABLATIONS.values()))
    settings = variants.make_settings(groups[:2], [8, 4])
    assert [s.label for s in settings] == ["dense", "autoprune 8", "autoprune 4", "gamma=0.05 8", "gamma=0.05 4"]
    assert settings[3].method.gamma == 0.05 and settings[3].method.target_tokens == 8
    (tmp_path / "v.yaml").write_text(
        "- {label: steep, method: autoprune, options: {k0: 1.5}}\n- {label: r, method: random}\n"
    )
    steep, plain = variants.read_variants(str(tmp_path / "v.yaml"))
    assert steep.options == {"k0": 1.5} and plain.options == {}
    assert variants.read_variants(str(write_json(tmp_path / "v.json", [{"label": "r", "method": "random"}]))) == [plain]
    with pytest.raises(UserError, match="twice"):
        variants.make_settings([plain, plain], [8])
    with pytest.raises(UserError, match="steep.*nosuch"):
        variants.make_settings([variants.Variant("steep", "autoprune", {"nosuch": 1})], [8])


def test_every_ablation_changes_only_what_it_names():
    from llava.pruning import get_method

    known = get_method("autoprune").options()
    for variant in variants.ablation_variants([])[1:]:
        if set(variant.options) <= set(known):
            built = get_method("autoprune").from_options({**variant.options, "target_tokens": 8})
            published = get_method("autoprune").from_options({"target_tokens": 8})
            changed = {k for k in known if getattr(built, k) != getattr(published, k)}
            assert changed == set(variant.options), variant.label


def record(question, text, **tokens):
    base = {"visual": 16, "nominal": 8.0, "processed": 10.0, "flops": 50, "dense_flops": 100, "selection_flops": 1}
    base |= {"kv_bytes": 40, "prefill_ms": 2.0, "peak_bytes": None, **tokens}
    return {"question_id": question.id, "prompt": question.text, "text": text, "metadata": {"tokens": base}}


def test_rows_from_answers(tmp_path):
    questions = [Question(i, "", i // 2, f"q{i}") for i in range(4)]
    files = [tmp_path / "dense.jsonl", tmp_path / "half.jsonl"]
    truth = {"q0": "a", "q1": "b", "q2": "c", "q3": "d"}
    dense = [record(q, truth[q.text], kv_bytes=80, flops=100) for q in questions]
    half = [record(q, t) for q, t in zip(questions[::-1], ["d", " x ", "b", "y"], strict=True)]
    half[0]["metadata"]["tokens"] |= {"prefill_ms": 9.0, "peak_bytes": 7}
    for path, records in zip(files, (dense, half), strict=True):
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    answers = results.collect("b", questions, files, lambda r: float(truth[r["prompt"]] == r["text"]))
    settings = [
        SimpleNamespace(label=name, budget=None, counted=None, variant=variants.Variant(name, name), method=method)
        for name, method in (("dense", _method("dense")), ("half", _method("random", target_tokens=8)))
    ]
    rows = results.make_rows(settings, [answers], 200, 0)
    assert [r["accuracy"]["b"]["value"] for r in rows] == [100.0, 50.0]
    assert rows[1]["retained"]["value"] == rows[1]["agreement"]["value"] == 50.0
    assert rows[1]["retained"]["low"] < 50 < rows[1]["retained"]["high"]
    assert (rows[1]["kv_ratio"], rows[1]["flops_ratio"]) == (0.5, 0.5)
    assert (rows[1]["prefill_ms"], rows[1]["peak_bytes"], rows[0]["peak_bytes"]) == (2.0, 7, None)
    files[1].write_text("".join(json.dumps(r) + "\n" for r in half[:3]))
    assert len(results.collect("b", questions, files).questions) == 3, "a question one lacks is left out for all"
    with pytest.raises(UserError, match="b: no question"):
        results.collect("b", questions, [files[0], tmp_path / "none.jsonl"])


def _method(name, **options):
    from llava.pruning import get_method

    return get_method(name).from_options(options)


@pytest.fixture
def argv(checkpoint, data):
    def build(*flags):
        return [
            str(x)
            for x in (
                *("--model-path", checkpoint, "--question-file", data / "q.jsonl", "--image-folder", data / "images"),
                *("--output-dir", data / "out", "--device", "cpu", "--max-new-tokens", 3, "--resamples", 100),
                *("--batch-size", 2, *flags),
            )
        ]

    return build


def answer_files(data):
    return {path.name: path.read_text() for path in sorted((data / "out/answers/q").glob("*.jsonl"))}


def without_costs(text):
    records = [json.loads(line) for line in text.splitlines()]
    for r in records:
        for key in ("prefill_ms", "peak_bytes"):
            r["metadata"]["tokens"].pop(key)
    return records


def test_compare_continues_where_it_stopped(argv, data, capsys):
    flags = ("--methods", "random,fastv", "--budgets", "8,4")
    assert compare.main(argv(*flags)) == 0
    out = capsys.readouterr().out
    whole = answer_files(data)
    assert list(whole) == ["dense.jsonl", "fastv_4.jsonl", "fastv_8.jsonl", "random_4.jsonl", "random_8.jsonl"]
    questions = read_jsonl(data / "q.jsonl")
    for text in whole.values():
        assert [json.loads(line)["prompt"] for line in text.splitlines()] == [q["text"] for q in questions]
    result = read_json(data / "out/compare.json")
    assert [row["label"] for row in result["rows"]] == ["dense", "random 8", "random 4", "fastv 8", "fastv 4"]
    dense, eight, four = result["rows"][:3]
    assert dense["agreement"]["value"] == 100 and dense["kv_ratio"] == dense["flops_ratio"] == 1
    assert (eight["tokens_nominal"], four["tokens_nominal"], dense["tokens_nominal"]) == (8, 4, 16)
    assert 1 > eight["kv_ratio"] > four["kv_ratio"] and dense["mean_accuracy"] is None
    assert "| random | 8 |" in out and "not a benchmark" in out and "accuracy over" not in out
    with open(data / "out/compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [row["agreement"]["value"] for row in result["rows"]]
    assert [float(row["agreement"]) for row in rows] == pytest.approx(shown, abs=1e-3)
    with Image.open(data / "out/compare.png") as image:
        assert image.width > 600

    # One cell lost, one torn in the middle of a line, the others whole.
    folder = data / "out/answers/q"
    (folder / "random_8.jsonl").unlink()
    lines = whole["fastv_4.jsonl"].splitlines(keepends=True)
    (folder / "fastv_4.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    untouched = (folder / "dense.jsonl").stat().st_mtime_ns
    assert compare.main(argv(*flags)) == 0
    assert (folder / "dense.jsonl").stat().st_mtime_ns == untouched
    for name, text in answer_files(data).items():
        assert without_costs(text) == without_costs(whole[name]), name
    capsys.readouterr()
    assert compare.main([*argv(*flags), "--no-plot"]) == 0
    assert "already there" in capsys.readouterr().err


def test_an_interrupted_comparison_keeps_what_it_has(argv, data, capsys, monkeypatch):
    from llava.eval.answering.answerer import Answerer

    flags = ("--methods", "uniform,fastv", "--budgets", "4", "--no-plot")
    compare.main(argv(*flags, "--output-dir", data / "whole"))
    generate, calls = Answerer.generate, []

    def interrupted(self, encoded, run):
        calls.append(len(encoded.samples))
        if len(calls) == 9:  # four passes measure memory
            raise KeyboardInterrupt
        return generate(self, encoded, run)

    monkeypatch.setattr(Answerer, "generate", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        compare.main(argv(*flags))
    assert exit_info.value.code == 130
    kept = {name: len(text.splitlines()) for name, text in answer_files(data).items()}
    assert sum(kept.values()) == sum(calls[4:8]) and len(set(kept.values())) > 1
    assert f"{3 * 7 - sum(kept.values())} answers are still missing" in capsys.readouterr().err
    monkeypatch.setattr(Answerer, "generate", generate)
    compare.main(argv(*flags))
    for path in (data / "whole/answers/q").glob("*.jsonl"):
        assert without_costs(path.read_text()) == without_costs(answer_files(data)[path.name])


def test_random_draws_by_question_whatever_the_batch_and_the_subset(argv, data):
    flags = ("--methods", "random", "--budgets", "4", "--no-plot")
    compare.main(argv(*flags))
    whole = {r["prompt"]: r["text"] for r in read_jsonl(data / "out/answers/q/random_4.jsonl")}
    compare.main(argv(*flags, "--batch-size", 3, "--limit", 3, "--output-dir", data / "other"))
    part = {r["prompt"]: r["text"] for r in read_jsonl(data / "other/answers/q/random_4.jsonl")}
    assert 0 < len(part) < len(whole) and all(whole[prompt] == text for prompt, text in part.items())


def test_a_damaged_image_costs_one_question(argv, data, capsys):
    (data / "images/1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as exit_info:
        compare.main(argv("--methods", "uniform", "--budgets", "4", "--no-plot"))
    assert exit_info.value.code == 3
    captured = capsys.readouterr()
    skipped = [line for line in captured.err.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 2 and all("1.png" in line for line in skipped), "once for each question, not for each method"
    assert "q 5 of 7" in captured.out


def test_numbers_that_are_not_finite_cost_one_question(argv, data, capsys, monkeypatch):
    from llava.eval.answering.adapter import FiniteWatch
    from llava.eval.answering.answerer import Answerer

    generate = Answerer.generate

    def poisoned(self, encoded, run):
        bad = [s.question.index == 2 and run.method.name == "uniform" for s in encoded.samples]
        monkeypatch.setattr(FiniteWatch, "bad", lambda watch: bad)
        return generate(self, encoded, run)

    monkeypatch.setattr(Answerer, "generate", poisoned)
    with pytest.raises(SystemExit) as exit_info:
        compare.main(argv("--methods", "uniform", "--budgets", "4", "--no-plot"))
    assert exit_info.value.code == 3
    captured = capsys.readouterr()
    assert "q.jsonl:3: logits that are not finite" in captured.err and "q 6 of 7" in captured.out
    assert len(read_jsonl(data / "out/answers/q/uniform_4.jsonl")) == 6, "asked again by the rerun"
    monkeypatch.setattr(Answerer, "generate", generate)
    monkeypatch.setattr(FiniteWatch, "bad", lambda watch: [False] * watch.samples)
    assert compare.main(argv("--methods", "uniform", "--budgets", "4", "--no-plot")) == 0


def test_ablations_on_a_benchmark(checkpoint, tmp_path, capsys):
    flags = ["--ablations", "gamma", "--budgets", "4", "--benchmarks", "gqa", "--limit", "3", "--max-new-tokens", 3]
    flags += ["--model-path", checkpoint, "--output-dir", tmp_path, "--device", "cpu", "--resamples", 100]
    assert compare.main([str(flag) for flag in flags]) == 0
    result = read_json(tmp_path / "compare.json")
    assert [row["variant"] for row in result["rows"]][:3] == ["dense", "autoprune", "gamma=0.05"]
    assert "GQA" in capsys.readouterr().out and (tmp_path / "compare.png").stat().st_size > 5000
    assert all(0 <= row["mean_accuracy"]["value"] <= 100 for row in result["rows"])
    if result["rows"][0]["mean_accuracy"]["value"] == 0:
        assert all(row["retained"] is None for row in result["rows"]), "an untrained model has nothing to retain"


def test_bad_input(argv, data, capsys):
    for flags, parts in (
        (["--methods", "nosuch"], ["--methods", "nosuch"]),
        (["--methods", ","], ["--methods"]),
        (["--methods", "random,random"], ["random", "twice"]),
        (["--ablations", "nosuch"], ["--ablations", "nosuch", "gamma"]),
        (["--variants", data / "none.json"], ["none.json"]),
        (["--variants", write_json(data / "v.json", [{"label": "x"}])], ["v.json", "variant 1", "method"]),
        (["--budgets", "0"], ["--budgets"]),
        (["--budgets", "17"], ["--budgets", "17", "16"]),
        (["--budgets", "4,1.5"], ["--budgets", "shares", "1.5"]),
        (["--target-ratio", "0.5,4"], ["--target-ratio", "0.5,4"]),
        (["--target-ratio", "0.5", "--budgets", "4"], ["--budgets and --target-ratio"]),
        (["--benchmarks", "pope"], ["--question-file", "--benchmarks"]),
        (["--conv-mode", "nosuch"], ["--conv-mode"]),
        (["--resamples", 3], ["--resamples"]),
    ):
        fails_with_one_line(compare.main, argv(*flags), capsys, *parts)
    general = ["--model-path", data, "--output-dir", data / "o"]
    fails_with_one_line(compare.main, [*general, "--benchmarks", "nosuch"], capsys, "--benchmarks", "nosuch", "pope")
    fails_with_one_line(compare.main, [*general, "--data-dir", data / "images"], capsys, "--data-dir")


def test_shares_as_budgets(argv, data, capsys):
    """A quarter of 16 tokens is 4 of them, and is called a share in every table."""
    assert compare.main(argv("--methods", "uniform", "--budgets", "4,0.25,1,1.0")) == 0
    out = capsys.readouterr().out
    rows = {row["label"]: row for row in read_json(data / "out/compare.json")["rows"]}
    assert list(rows) == ["dense", "uniform 4", "uniform 0.25", "uniform 1", "uniform 1.0"]
    assert [row["tokens_processed"] for row in rows.values()] == [16, 4, 4, 1, 16]
    assert (rows["uniform 0.25"]["budget"], rows["uniform 0.25"]["options"]["target_ratio"]) == (0.25, 0.25)
    assert "target_ratio" not in rows["uniform 4"]["options"]
    assert "| uniform | 4 |" in out and "| uniform | 0.25 of all |" in out and "a share of each prompt's" in out
    answers = answer_files(data)
    texts = [[json.loads(line)["text"] for line in answers[f"uniform_{b}.jsonl"].splitlines()] for b in ("4", "0.25")]
    assert texts[0] == texts[1]
    compare_report.main([str(data / "out/compare.json"), "--matrix"])
    header = capsys.readouterr().out.splitlines()[0]
    assert header == "|  | budget 4 | budget 1 | budget 1.0 of all | budget 0.25 of all |"
    versus = [data / "out/compare.json", "--versus", "uniform 1"]
    fails_with_one_line(compare_report.main, versus, capsys, "no other setting has the budget")


def test_budgets_counted_both_ways(argv, data, capsys):
    """AutoPrune's two means are two settings; what drops in front of the decoder is asked once and stands in both."""
    assert compare.main(argv("--methods", "uniform,autoprune", "--budgets", "8,4", "--budget", "both")) == 0
    out = capsys.readouterr().out
    path = data / "out/compare.json"
    rows = {row["label"]: row for row in read_json(path)["rows"]}
    twice = ["autoprune 8", "autoprune 8 processed", "autoprune 4", "autoprune 4 processed"]
    assert list(rows) == ["dense", "uniform 8", "uniform 4", *twice]
    assert [rows[name]["counted"] for name in twice[:2]] == ["nominal", "processed"]
    assert rows["uniform 8"]["counted"] == "both" and rows["uniform 8"]["tokens_processed"] == 8
    assert rows["autoprune 8"]["tokens_processed"] > 8.5 > rows["autoprune 8 processed"]["tokens_processed"]
    assert rows["autoprune 8 processed"]["options"]["budget"] == "processed"
    assert "| autoprune | 8 processed |" in out and "where it says so" in out
    with open(data / "out/compare.csv", newline="") as file:
        assert [row["counted"] for row in csv.DictReader(file)][:4] == ["", "both", "both", "nominal"]
    compare_report.main([str(path), "--matrix"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[:5]]
    assert lines[0] == ["budget 8", "budget 8 processed", "budget 4", "budget 4 processed"]
    (uniform,) = (line for line in lines if line[0] == "uniform")
    (autoprune,) = (line for line in lines if line[0] == "autoprune")
    assert uniform[1] == uniform[2] and uniform[3] == uniform[4] and autoprune[1] != autoprune[2]
    for reference, others in (
        ("autoprune 4", {"uniform 4"}),
        ("autoprune 4 processed", {"uniform 4"}),
        ("uniform 4", {"autoprune 4", "autoprune 4 processed"}),
    ):
        compare_report.main([str(path), "--versus", reference])
        table = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if "(" in line]
        assert {name for name in table if name in rows} == others
    # A run of nominal budgets goes on as one of both: its answers stay.
    kept = answer_files(data)
    assert compare.main(argv("--methods", "uniform,autoprune", "--budgets", "8,4", "--no-plot")) == 0
    assert "already there" in capsys.readouterr().err and answer_files(data) == kept


def test_answers_of_another_run_are_refused(argv, capsys):
    flags = ("--methods", "random", "--budgets", "4", "--no-plot")
    compare.main(argv(*flags))
    capsys.readouterr()
    fails_with_one_line(compare.main, argv(*flags, "--max-new-tokens", 2), capsys, "max_new_tokens", "--output-dir")


def test_every_line_of_the_plot_looks_different():
    looks = [tuple(look_of(number).values()) for number in range(2 * len(list_methods()))]
    assert len(set(looks)) == len(looks)
