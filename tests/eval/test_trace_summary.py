"""Summaries of trace files, against numbers computed by hand, and on what a run writes."""

import json
import statistics

import pytest

from llava.eval.model_vqa_loader import main as answer
from llava.eval.trace_summary import main
from tests.eval.helpers import fails_with_one_line, read_json, write_jsonl


def trace(i, **fields):
    return {
        "question_id": i,
        "prompt": "?",
        "visual_tokens": 100,
        "tokens_out": [50, 10 + i],
        "mean_nominal": 30 + i / 2,
        "mean_processed": 75.0,
        "flops": 50 + i,
        "dense_flops": 200,
        "mutual_information": {"layer0": 0.1, "layer1": i / 10},
        "slope": 0.4 - i / 100,
        "prefill_seconds": 0.001 * (i + 1),
        "decode_seconds": 0.5,
    } | fields


@pytest.fixture
def traces(tmp_path):
    text_only = trace(99, visual_tokens=0, tokens_out=[0, 0], mutual_information=None, slope=None)
    return write_jsonl(tmp_path / "pope.jsonl", [*(trace(i) for i in range(8)), text_only])


def test_numbers(traces, tmp_path, capsys):
    main([str(traces), "--json", str(tmp_path / "s.json"), "--bins", "4"])
    summary = read_json(tmp_path / "s.json")["pope"]
    assert (summary["samples"], summary["with_image"]) == (9, 8)
    slopes = [0.4 - i / 100 for i in range(8)]
    slope = summary["quantities"]["slope"]
    assert slope["mean"] == pytest.approx(statistics.fmean(slopes))
    assert slope["p50"] == pytest.approx(statistics.median(slopes))
    assert summary["quantities"]["FLOPs"]["mean"] == pytest.approx(53.5 / 200)
    assert summary["quantities"]["prefill"]["mean"] == pytest.approx((36 + 100) / 9), "also samples without image"
    histogram = summary["slope_histogram"]
    assert histogram["counts"] == [2, 2, 2, 2] and histogram["edges"][0] == pytest.approx(0.33)
    assert [q["mean_bits"] for q in summary["quartiles"]] == pytest.approx([0.05, 0.25, 0.45, 0.65])
    assert summary["quartiles"][3]["curve"] == pytest.approx([0.5, 0.165])
    printed = capsys.readouterr().out
    assert "pope: 9 samples, 8 with image" in printed and printed.count("#" * 40) == 4


def test_several_files_and_picture(traces, tmp_path, capsys):
    dense = write_jsonl(tmp_path / "dense.jsonl", [trace(0, mutual_information=None, slope=None)])
    main([f"one={traces}", str(dense), "--plot", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "one: 9 samples" in printed and "dense: 1 samples" in printed
    main([str(dense), "--plot", str(tmp_path / "none.png")])
    assert "no picture" in capsys.readouterr().out and not (tmp_path / "none.png").exists()


def test_survivors_by_image(tmp_path, capsys):
    several = [trace(i, views=[50, 50], kept_per_view=[[30, 20], [i, 10 - i]]) for i in (2, 4)]
    three = trace(9, views=[40, 30, 30], kept_per_view=[[1, 0, 4]])
    path = write_jsonl(tmp_path / "t.jsonl", [trace(0), *several, three])
    main([str(path), "--json", str(tmp_path / "s.json")])
    assert read_json(tmp_path / "s.json")["t"]["kept_per_view"] == {"2": [3, 7], "3": [1, 0, 4]}
    assert "left of each of 2 images behind the last layer, mean: 3.0, 7.0" in capsys.readouterr().out
    write_jsonl(path, [trace(0, kept_per_view=[["a"]])])
    fails_with_one_line(main, [str(path)], capsys, "kept_per_view[0][0]")


def test_on_the_traces_of_a_run(argv, data, preloaded, capsys):
    answer(argv("--trace-file", data / "t.jsonl"))
    main([str(data / "t.jsonl"), "--json", str(data / "s.json")])
    summary = read_json(data / "s.json")["t"]
    meta = read_json(data / "a.meta.json")
    assert (summary["samples"], summary["with_image"]) == (7, 6)
    assert summary["quantities"]["nominal tokens"]["mean"] == pytest.approx(meta["tokens"]["nominal"], abs=1e-3)
    assert set(summary["quantities"]) >= {"slope", "MI layer 0", "MI layer 1", "prefill", "decode"}


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{}", "visual_tokens"),
        ('{"visual_tokens": 3, "tokens_out": "x", "mutual_information": {"layer1": 1}}', "not a line of a trace"),
        ('{"visual_tokens": 3, "tokens_out": [1], "slope": "steep"}', "not a line of a trace"),
        ('{"visual_tokens": 3, "tokens_out": [1], "mutual_information": 7}', "not a line of a trace"),
        ("[1]", "JSON object"),
    ],
)
def test_bad_lines(tmp_path, capsys, line, part):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(trace(0)) + "\n" + line + "\n")
    fails_with_one_line(main, [path], capsys, "t.jsonl:2", part)


def test_bad_flags(traces, tmp_path, capsys):
    fails_with_one_line(main, [traces, traces], capsys, "same name")
    fails_with_one_line(main, [traces, "--bins", 0], capsys, "--bins")
    (tmp_path / "empty.jsonl").write_text("")
    fails_with_one_line(main, [tmp_path / "empty.jsonl"], capsys, "holds no trace")
