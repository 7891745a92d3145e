"""Paired differences of a comparison against direct computations, and the tool on the files of a real comparison."""

import numpy as np
import pytest

from llava.eval import compare, compare_report
from llava.eval.reports.bootstrap import Estimate, estimates
from llava.eval.reports.differences import Difference, credits_path, credits_table, differences, read_credits
from llava.eval.tasks.registry import COMPARED
from tests.eval.helpers import TINY_DATA, fails_with_one_line, read_json, read_jsonl, write_json, write_jsonl


def made_up(folder, credits, budgets, resamples=4000):
    """A result and its credits as `compare` writes them; credits: benchmark -> [questions, settings]."""
    means = np.mean([values.mean(0) for values in credits.values()], axis=0)
    labels = [f"s{i}" for i in range(len(budgets))]
    rows = [
        {"label": label, "budget": budget, "mean_accuracy": {"value": float(mean)}}
        for label, budget, mean in zip(labels, budgets, means, strict=True)
    ]
    run = {"resamples": resamples, "seed": 5, "level": 95.0}
    path = write_json(folder / "compare.json", {"run": run, "benchmarks": [], "rows": rows})
    ids = {name: list(range(len(values))) for name, values in credits.items()}
    credits_path(path).write_text(credits_table(labels, credits, ids))
    return path


def test_the_interval_is_the_textbook_one_of_paired_differences(tmp_path):
    """mean(d) +- 1.96 sd(d) / sqrt(n); benchmarks of different size weigh alike, so their errors add in quadrature."""
    draw = np.random.default_rng(0)
    easy = draw.normal(60, 30, (400, 1))  # what both settings share is not in the interval
    first = easy + draw.normal([0.0, 3.0, -40.0], 8, (400, 3))
    second = draw.normal(50, 20, (900, 1)) + draw.normal([0.0, -1.0, 0.0], 5, (900, 3))
    path = made_up(tmp_path, {"a": first, "b": second}, [None, 64, 64])
    result = read_json(path)
    found = {d.label: d for d in differences(result, read_credits(credits_path(path), result), ["s0", "s1", "s2"])}
    for column, label in ((1, "s1"), (2, "s2")):
        parts = [values[:, column] - values[:, 0] for values in (first, second)]
        error = 1.96 * np.sqrt(sum(part.var() / len(part) for part in parts)) / 2
        points = found[label].points
        assert points.value == pytest.approx(np.mean([part.mean() for part in parts]))
        assert points.value - points.low == pytest.approx(error, rel=0.08)
        assert points.high - points.value == pytest.approx(error, rel=0.08)
        assert found[label].better == sum((part > 0).sum() for part in parts)
        assert found[label].worse == sum((part < 0).sum() for part in parts)


def test_it_is_a_bootstrap_of_both_settings_on_the_same_questions(tmp_path):
    """Against a loop that draws questions one by one, with a generator of its own."""
    draw = np.random.default_rng(1)
    values = {"a": 100.0 * draw.integers(0, 2, (40, 2)), "b": 100.0 * draw.integers(0, 2, (25, 2))}
    path = made_up(tmp_path, values, [64, 64])
    result = read_json(path)
    [found] = differences(result, read_credits(credits_path(path), result), ["s0"])
    samples = []
    for _ in range(4000):
        sides = []
        for credit in values.values():
            chosen = draw.integers(0, len(credit), len(credit))
            sides.append([credit[chosen, 0].mean(), credit[chosen, 1].mean()])
        reference, other = np.mean(sides, axis=0)
        samples.append([other - reference])
    expected = estimates(np.array([found.points.value]), np.array(samples))[0]
    assert (found.points.low, found.points.high) == pytest.approx((expected.low, expected.high), abs=1.5)
    assert found.points.high - found.points.low > 20


def test_which_settings_are_compared(tmp_path):
    values = np.array([[100.0, 50.0, 25.0, 0.0], [100.0, 100.0, 25.0, 100.0]])
    path = made_up(tmp_path, {"a": values}, [None, 64, 64, 32], resamples=100)
    result = read_json(path)
    credits = read_credits(credits_path(path), result)
    assert [d.label for d in differences(result, credits, ["s0"])] == ["s1", "s2", "s3"]
    assert [d.label for d in differences(result, credits, ["s1"])] == ["s2"]
    assert [d.label for d in differences(result, credits, ["s3", "s1", "s0"])] == ["s1", "s0"]
    assert differences(result, credits, ["s1", "s1"]) == [Difference("s1", Estimate(0.0, 0.0, 0.0), 0, 0)]


def test_of_a_comparison_on_a_benchmark(checkpoint, tmp_path, capsys):
    """The credits are those of the benchmark's own grader on the answer files; the table shows the differences."""
    flags = ["--methods", "random,uniform", "--budgets", "4", "--benchmarks", "gqa,pope", "--limit", "6", "--no-plot"]
    flags += ["--model-path", checkpoint, "--output-dir", tmp_path, "--device", "cpu", "--resamples", 100]
    assert compare.main([str(flag) for flag in [*flags, "--max-new-tokens", 3]]) == 0
    # An untrained model says nothing right: rewrite some of its answers, and let the comparison read them again.
    truth = {"gqa": [], "pope": []}
    for key in truth:
        benchmark = next(b for b in COMPARED if b.key == key)
        grade = benchmark.grader(TINY_DATA)
        for name, wrong in (("dense", 0), ("random_4", 4), ("uniform_4", 2)):
            path = tmp_path / "answers" / key / f"{name}.jsonl"
            answers = read_jsonl(path)
            for answer in answers:
                texts = ("yes", "no", "red", "blue", "green", "yellow", "circle", "square", "triangle", "left", "right")
                answer["text"] = next((t for t in texts if grade({**answer, "text": t}) == 1), "?")
            for answer in answers[:wrong]:
                answer["text"] = "nothing"
            write_jsonl(path, answers)
            truth[key].append([100 * grade(answer) for answer in answers])
    assert compare.main([str(flag) for flag in [*flags, "--max-new-tokens", 3]]) == 0
    assert "compare.credits.csv" in capsys.readouterr().out
    result = tmp_path / "compare.json"
    compare_report.main([str(result), "--versus", "random 4", "uniform 4", "dense"])
    shown = capsys.readouterr().out
    expected = {}
    for column, label in ((2, "uniform 4"), (0, "dense")):
        expected[label] = np.mean([np.mean(rows[column]) - np.mean(rows[1]) for rows in truth.values()])
        assert f"| {label} | {expected[label]:+.1f} (" in shown
    assert expected["uniform 4"] > 10 and "paired over the same" in shown and "| minus random 4 |" in shown
    document = tmp_path / "d.md"
    document.write_text("x\n<!-- v: begin -->\nold\n<!-- v: end -->\n")
    compare_report.main([str(result), "--versus", "dense", "--insert", str(document), "--marker", "v"])
    assert "| minus dense |" in document.read_text() and "old" not in document.read_text()

    for labels, part in ((["nosuch 4"], "nosuch 4"), (["random 4", "x"], "'x'")):
        fails_with_one_line(compare_report.main, [result, "--versus", *labels], capsys, "--versus", part, "uniform 4")
    path = credits_path(result)
    text = path.read_text()
    for spoiled, part in (
        (text.replace("uniform 4", "uniform 5"), "columns"),
        (text.replace("100", "0"), "means"),
        (text.replace("100", "much", 1), "much"),
        (text.rsplit(",", 1)[0], "2 credits for 3"),
        ("", "columns"),
    ):
        path.write_text(spoiled)
        remedy = "run the same llava.eval.compare command again"
        fails_with_one_line(compare_report.main, [result, "--versus", "dense"], capsys, path.name, part, remedy)
    path.unlink()
    fails_with_one_line(compare_report.main, [result, "--versus", "dense"], capsys, path.name, "not found")
