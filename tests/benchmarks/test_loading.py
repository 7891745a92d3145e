"""The memory benchmark measures what it says: a small checkpoint, every case once."""

from __future__ import annotations

from benchmarks import loading
from tests.benchmarks.running import printed


def test_sizes_follow_the_flag():
    assert loading.layers_for(1) == 1
    sizes = [sum(shape.numel() * 2 for shape in loading.shapes(loading.geometry(loading.layers_for(n))).values())
             for n in (500, 1000)]  # fmt: skip
    assert abs(sizes[0] - 500e6) < 15e6 and abs(sizes[1] - 1000e6) < 15e6


def test_mapped_weights_are_no_second_copy(tmp_path, monkeypatch, capsys):
    # One layer and the vocabulary; two cases, each in a process of its own.
    monkeypatch.setattr(loading, "CASES", (loading.CASES[0], loading.CASES[4]))
    flags = ("--size-mb", 1, "--folder", tmp_path, "--save", "--results-dir", tmp_path)
    same, converted = printed(capsys, loading.main, *flags)["rows"]
    assert same["model_mb"] > 100 and abs(same["model_mb"] - same["file_mb"]) < 1
    # Mapped, so nearly nothing of it is anonymous; converted, all of it is and the file is let go.
    assert same["peak_anon_ratio"] < 0.2 and same["peak_rss_ratio"] < 1.3
    assert 0.9 < converted["peak_anon_ratio"] < 1.3 and converted["peak_rss_ratio"] < 1.8
    assert list(tmp_path.glob("loading--*.json")) and not list(tmp_path.glob("llava-loading-*"))
