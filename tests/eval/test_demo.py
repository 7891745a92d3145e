"""The demo: its parts by hand, and the whole on a random checkpoint and a few questions."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from llava.eval import demo, table
from llava.eval.common.questions import Question, spread
from llava.eval.common.tables import replace_between
from llava.eval.reports import sample_plots as demo_plots
from llava.eval.tasks import gqa as gqa_task
from llava.eval.tasks import mme as mme_task
from llava.eval.tasks import pope as pope_task
from llava.eval.tasks import textvqa as textvqa_task
from llava.eval.tasks.registry import DEMO as BENCHMARKS
from llava.eval.tasks.task import Score
from llava.utils import UserError
from tests.eval.helpers import TINY_DATA, fails_with_one_line, read_json
from tests.look.runs import data_of


def question(index, image):
    return Question(index, "", index, "?", image)


def test_spread_keeps_images_whole_and_reaches_the_end():
    questions = [question(i, f"{i // 2}.png") for i in range(40)]
    chosen = spread(questions, 10)
    assert [q.index for q in chosen] == [0, 1, 8, 9, 16, 17, 24, 25, 32, 33]
    assert spread(questions, None) == spread(questions, 99) == questions
    assert spread(questions, 1) == questions[:2]


def test_retained_percent_is_the_mean_of_ratios():
    assert table.retained_percent({"a": 50.0, "b": 90.0}, {"a": 100.0, "b": 90.0}) == pytest.approx(75.0)


def test_each_benchmark_scores_its_own_truth():
    """Answering with the ground truth gives full marks: the layout and the joins fit the miniature data."""
    truth = perfect_answers()
    full = {"TextVQA": 100.0, "POPE": 100.0, "GQA": 100.0}
    for benchmark in BENCHMARKS:
        score = benchmark.score(TINY_DATA, truth[benchmark.title])
        assert isinstance(score, Score) and score.samples >= 500
        assert score.accuracy == pytest.approx(100.0)
        assert score.score == pytest.approx(full.get(benchmark.title, score.score))
        if benchmark.title == "MME":
            subtasks = len(
                [path for path in (TINY_DATA / "MME/MME_Benchmark_release_version").iterdir() if path.is_dir()]
            )
            assert score.score == pytest.approx(200.0 * subtasks)


def perfect_answers():
    from llava.eval.common.questions import read_questions

    asked = {task.title: read_questions(task.questions_path(TINY_DATA)) for task in BENCHMARKS}
    words = {
        # Ten people do not all agree; what most of them say gets full marks.
        (a["image_id"], a["question"].lower()): Counter(a["answers"]).most_common(1)[0][0]
        for a in textvqa_task.load_annotations(str(TINY_DATA / "textvqa/TextVQA_0.5.1_val.json"))
    }
    labels = pope_task.load_labels(str(TINY_DATA / "pope/coco"))
    # Label files are joined by position within the category.
    by_category = {c: [entry["label"] for entry in entries] for c, entries in labels.items()}
    categories = [q["category"] for q in pope_task.load_questions(str(TINY_DATA / "pope/llava_pope_test.jsonl"))]
    pope = [by_category[category].pop(0).capitalize() for category in categories]
    gqa = gqa_task.load_questions(str(TINY_DATA / "gqa/data/testdev_balanced_questions.json"))
    mme = mme_task.load_truth(str(TINY_DATA / "MME/MME_Benchmark_release_version"))
    texts = {
        "TextVQA": [words[str(q.id), textvqa_task.question_of_prompt(q.text)] for q in asked["TextVQA"]],
        "POPE": pope,
        "GQA": [gqa[str(q.id)]["answer"].capitalize() for q in asked["GQA"]],
        "MME": [mme[mme_task.question_key(str(q.id), q.text)] for q in asked["MME"]],
    }
    return {
        name: [
            {"question_id": q.id, "prompt": q.text, "text": t} for q, t in zip(asked[name], texts[name], strict=True)
        ]
        for name in asked
    }


def test_survivors_and_merged_tokens_are_told_apart():
    mask, merged = demo_plots.survivors_mask(torch.tensor([0, 3, -1, -1]), grid=2)
    assert mask.tolist() == [[True, False], [False, True]] and merged == 2


def test_only_survivors_keep_their_color():
    image = np.zeros((4, 4, 3), dtype=np.float32)
    image[..., 0] = 1.0
    shown = demo_plots.highlight(image, np.array([[True, False], [False, False]]))
    assert (shown[:2, :2] == image[:2, :2]).all()
    assert (shown[2:, 2:, 0] == shown[2:, 2:, 1]).all() and shown[3, 3].min() > 0.8


def test_layers_to_show():
    assert demo_plots.layers_to_show(12) == [0, 1, 4, 8, 11]
    assert demo_plots.layers_to_show(3) == [0, 1, 2]


@dataclass
class FakeTrace:
    mutual_information: dict


@dataclass
class FakeExample:
    benchmark: object
    trace: FakeTrace


def test_examples_are_hard_medium_and_easy_from_different_benchmarks():
    examples = [FakeExample(BENCHMARKS[i % 4], FakeTrace({"layer1": i / 100})) for i in range(100)]
    chosen = demo_plots.pick_examples(examples)
    values = [demo_plots.information(example) for example in chosen]
    assert values == sorted(values) and values[0] < 0.1 and 0.4 < values[1] < 0.6 and values[2] > 0.9
    assert len({example.benchmark.title for example in chosen}) == 3


def test_demo_end_to_end(checkpoint, tmp_path, capsys):
    argv = [
        "--model-path",
        checkpoint,
        "--output-dir",
        tmp_path / "out",
        "--budgets",
        "8,4",
        "--limit",
        6,
        "--device",
        "cpu",
    ]
    demo.main([str(a) for a in argv])
    printed = capsys.readouterr().out
    result = read_json(tmp_path / "out" / "demo.json")
    dense, eight, four = result["rows"]
    assert [row["label"] for row in result["rows"]] == ["dense", "AutoPrune 8", "AutoPrune 4"]
    assert (dense["retained"], dense["flops_ratio"], dense["prefill_ratio"]) == (100.0, 1.0, 1.0)
    assert dense["tokens_nominal"] == dense["tokens_processed"] == 16
    assert four["tokens_nominal"] < eight["tokens_nominal"] < 16
    assert four["tokens_processed"] > four["tokens_nominal"] and four["flops_ratio"] < eight["flops_ratio"] < 1
    assert all(row["scores"][task.title]["samples"] >= 5 for row in result["rows"] for task in BENCHMARKS)
    assert "| AutoPrune 4 |" in printed and "6 of 520" in printed
    assert (tmp_path / "out" / "demo.md").read_text().strip() in printed
    for name in ("survivors.png", "retention.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert f"wrote {tmp_path / 'out' / 'report.html'}: " in printed
    report = data_of(tmp_path / "out" / "report.html")
    assert [run["name"] for run in report["runs"]] == ["dense", "AutoPrune 8", "AutoPrune 4"]
    assert len(report["questions"]) == sum(entry["samples"] for entry in result["benchmarks"])
    for row, own in zip(result["rows"], report["summary"], strict=True):
        assert [s["score"] for s in own["scores"]] == [row["scores"][task.title]["score"] for task in BENCHMARKS]
        assert own["retained"] == pytest.approx(row["retained"]) and own["flops"] == pytest.approx(row["flops_ratio"])
    assert all(answer["r"]["k"] is not None for q in report["questions"] for answer in q["a"])
    assert any(answer["r"]["m"] for q in report["questions"] for answer in q["a"]), "merged tokens have their members"
    assert all(q["y"] for q in report["questions"]) and len(report["rasters"]) >= 1


def test_demo_of_tiled_pictures(checkpoint, tmp_path, capsys):
    """Their patches are no square: everything but the picture of one is there."""
    folder = tmp_path / "llava-v1.6"
    shutil.copytree(checkpoint, folder)
    config = read_json(folder / "config.json")
    tiles = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    (folder / "config.json").write_text(json.dumps({**config, **tiles, "mm_patch_merge_type": "spatial"}))
    general = ("--model-path", folder, "--output-dir", tmp_path / "out", "--limit", 2, "--device", "cpu")
    demo.main([str(flag) for flag in (*general, "--budgets", "0.25")])
    dense, pruned = read_json(tmp_path / "out" / "demo.json")["rows"]
    assert pruned["label"] == "AutoPrune 0.25" and pruned["tokens_nominal"] < dense["tokens_nominal"]
    assert "no survivors.png" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["retention.png"]


def test_demo_without_matplotlib(checkpoint, tmp_path, capsys, monkeypatch):
    """It is an extra: the figures are there all the same."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    general = ("--model-path", checkpoint, "--output-dir", tmp_path / "out", "--limit", 2, "--device", "cpu")
    demo.main([str(flag) for flag in (*general, "--budgets", 4)])
    printed = capsys.readouterr()
    assert "no pictures" in printed.err and "pip install matplotlib" in printed.err
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"demo.json", "demo.md"} and "took" in printed.out


def test_table_is_put_between_the_markers(checkpoint, tmp_path):
    row = {"label": "dense", "scores": {}, "mean_accuracy": 1.0, "retained": 100.0, "tokens_nominal": 5.0}
    row |= {"tokens_processed": 5.0, "flops_ratio": 1.0, "prefill_ms": 2.0, "prefill_ratio": 1.0}
    run = dict.fromkeys(("model", "batch_size", "device", "threads", "dtype", "torch", "transformers"), "x")
    result = {"benchmarks": [], "rows": [row], "run": {**run, "visual_tokens": 5.0}}
    from tests.eval.helpers import write_json

    path = write_json(tmp_path / "demo.json", result)
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- demo table: begin -->\nold\n<!-- demo table: end -->\nafter\n")
    table.main([str(path), "--insert", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| dense | 1.0% | 100.0% | 5.0 | 5.0 | 100.0% | 100.0% (2.0 ms) |" in text
    with pytest.raises(UserError, match="doc"):
        replace_between("no markers", "x", "y", "doc")


def test_bad_input(tmp_path, capsys):
    for argv, parts in (
        (["--data-dir", tmp_path / "none"], ["data folder", "none"]),
        (["--budgets", "64,many"], ["--budgets"]),
        (["--method", "nosuch"], ["--method", "nosuch"]),
        (["--limit", "-1"], ["--limit"]),
        (["--model-path", tmp_path / "none"], ["none"]),
    ):
        fails_with_one_line(demo.main, argv, capsys, *parts)
    fails_with_one_line(table.main, [tmp_path / "none.json"], capsys, "none.json")
