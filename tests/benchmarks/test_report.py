"""The report: what stands in the document follows from the results, which are made up here in the tools' own form."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from benchmarks import prefill, report
from benchmarks.report_plots import _PARTS, DRAWINGS, drawn_from
from benchmarks.report_tables import PARTS, cells, head, method_name
from benchmarks.saved import RESULTS, read_result, read_results
from llava.pruning import list_methods
from tests.benchmarks.running import arguments, printed
from tests.benchmarks.synthetic import (
    GPU,
    decode_rows,
    end_to_end_rows,
    environment,
    first_token_rows,
    memory_rows,
    prefill_row,
    save,
    save_prefill,
    scaling_rows,
)
from tests.eval.helpers import fails_with_one_line

NAME_576 = "Prefill: cpu-1024x24, float32, sdpa, 576 visual tokens, 1 thread"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text(
        "before\n<!-- results: begin -->\n<!-- results: end -->\nafter\n", encoding="utf-8"
    )
    return tmp_path


def flags(place):
    return ["--results-dir", str(place / "results"), "--document", str(place / "docs" / "performance.md")]


def rendered(place):
    """The document after a run of the report."""
    report.main(flags(place))
    files = (place / "docs" / "performance.md", place / "results" / "README.md")
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def generated(place):
    """What the report writes; draws nothing."""
    rendered = report.render(read_results(place / "results"), "images")
    return f"{rendered.document}\n\n{rendered.tables}\n"


def sections(text):
    """Heading -> what is below it."""
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text):
    """Every table as rows of cells, heads first."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in block.splitlines()] for block in blocks]


def column(table, name):
    place = [cell.strip() for cell in table[0]].index(name)
    return [row[place].strip() for row in table[2:]]


def save_everything(folder):
    """A result of every tool, in no sensible order of the files."""
    for budgets, visual in (((192, 64), 576), ((640,), 2880)):
        save_prefill(folder, [prefill_row("autoprune", budget, visual) for budget in budgets], visual)
    save_prefill(folder, [prefill_row("autoprune", 64)], threads=2)
    shape = {"geometry": "llava-1.5-7b", "dtype": "bfloat16"}
    save_prefill(folder, [prefill_row("autoprune", 64, **shape)], **GPU)
    save(folder, "decode", "cpu-1024x24, float32, sdpa, 576 visual tokens", decode_rows())
    save(folder, "memory", "cpu-1024x24, float32, sdpa, 2880 visual tokens", memory_rows())
    save(folder, "scaling", "cpu-1024x24, float32, sdpa", scaling_rows())
    save(folder, "end_to_end", "tiny-llava-v1.5, batch 1, float32", end_to_end_rows())
    save(
        folder, "loading", "990 MB, float16", [{"stored": "bin", "lora": True, "file_mb": 992.4, "peak_rss_ratio": 1.5}]
    )
    save(folder, "input_pipeline", "tiny-llava-v1.5, 64 images, 640 pixels wide, batch 8",
         [{"workers": 0, "images_per_s": 33.07, "p10": 31.5, "p90": 34.5, "of_none": 1.0, "rounds": 3}])  # fmt: skip
    save(folder, "first_token", "cpu-1024x24, float32, sdpa, 576 visual tokens", first_token_rows())
    save(folder, "profile", "cpu-1024x24, float32, sdpa", [{"kernel": "gemm<float | 4>", "calls": 3, "of_total": 0.25}])
    save(folder, "brand_new", "something else", [{"wall_us": 3.25, "note": "x"}, {"wall_us": 1.5, "note": None}])


def test_sections_in_order_with_titles_for_people(place):
    save_everything(place / "results")
    text = rendered(place)
    assert text.startswith("before\n") and "\nafter\n" in text
    assert list(sections(text)) == [
        "Targets",
        NAME_576,
        NAME_576.replace("1 thread", "2 threads"),
        NAME_576.replace("576", "2880"),
        "Prefill: llava-1.5-7b, bfloat16, sdpa, 576 visual tokens, NVIDIA H200",
        "Memory: cpu-1024x24, float32, sdpa, 2880 visual tokens, 1 thread",
        "Decode: cpu-1024x24, float32, sdpa, 576 visual tokens, 1 thread",
        "Scaling: cpu-1024x24, float32, sdpa, 1 thread",
        "Time to first token: cpu-1024x24, float32, sdpa, 576 visual tokens, 1 thread",
        "End to end: tiny-llava-v1.5, batch 1, float32, 1 thread",
        "Loading: 990 MB, float16, 1 thread",
        "Input pipeline: tiny-llava-v1.5, 64 images, 640 pixels wide, batch 8, 1 thread",
        "Profile: cpu-1024x24, float32, sdpa, 1 thread",
        "Brand new: something else, 1 thread",
    ]


def test_tables_hold_figures_and_the_line_below_says_on_what(place):
    save_everything(place / "results")
    parts = sections(generated(place))
    parts.pop("Targets")
    for name, text in parts.items():
        assert text.count("torch 2.13.0+cpu") == 1, name
        for table in tables(text):
            heads = {cell.strip() for cell in table[0]}
            assert not heads & set(environment()) and len({len(row) for row in table}) == 1, name
            for place_ in range(len(table[0])):
                assert any(row[place_].strip() != "–" for row in table[2:]), (name, table[0][place_])


def test_formats_of_a_prefill(place):
    rows = [prefill_row("autoprune", 192), prefill_row("autoprune published", 64, over_floor=1.0456)]
    save_prefill(place / "results", rows)
    text = sections(generated(place))[NAME_576]
    (table,) = tables(text)
    assert column(table, "method") == ["dense", "AutoPrune", "AutoPrune (as published)"]
    assert column(table, "budget") == ["–", "192", "64"]
    assert column(table, "time, ms") == ["4608", "1843", "614"]
    assert column(table, "p10 to p90, ms") == ["4562 to 4700", "1825 to 1880", "608 to 627"]
    assert column(table, "of dense, %") == ["100.0", "40.0", "13.3"]
    assert column(table, "over floor, ×") == ["–", "1.020", "1.046"]
    assert "Batch 1, 9 rounds. Some CPU, 1 thread on 2 cores" in text
    assert not {"batch", "rounds", "visual tokens", "geometry", "slope"} & {cell.strip() for cell in table[0]}


def test_a_column_that_varies_is_shown(place):
    save_prefill(place / "results", [prefill_row("autoprune", 64, batch=n, rounds=9 + n) for n in (1, 8)])
    (table,) = tables(sections(generated(place))[NAME_576])
    assert column(table, "batch") == ["1", "8", "1", "8"] and column(table, "rounds") == ["9", "9", "10", "17"]


def test_unknown_columns_and_tools(place):
    save_everything(place / "results")
    parts = sections(generated(place))
    (profile,) = tables(parts["Profile: cpu-1024x24, float32, sdpa, 1 thread"])
    assert column(profile, "kernel") == ["`gemm<float \\| 4>`"] and column(profile, "of total, %") == ["25.0"]
    (new,) = tables(parts["Brand new: something else, 1 thread"])
    assert column(new, "wall, µs") == ["3.25", "1.50"] and column(new, "note") == ["x", "–"]
    save_prefill(place / "results", [prefill_row("autoprune", 64, bandwidth_gb=12.5)])
    assert column(tables(sections(generated(place))[NAME_576])[0], "bandwidth, GB") == ["–", "12.5"]


def test_heads_names_and_cells():
    assert [head(name) for name in ("self_ms", "rows_per_s", "of_total", "peak_ratio", "kind")] == [
        "self, ms", "rows/s", "of total, %", "peak, ×", "kind",
    ]  # fmt: skip
    assert cells("ms", [4539.84, 43.8, None]) == ["4539.8", "43.8", "–"]
    assert cells("lora", [True, False]) == ["yes", "no"]
    assert set(PARTS) == set(_PARTS), "every part has a colour"
    names = [method_name(name) for name in list_methods()]
    assert len(set(names)) == len(names) and not any("_" in name for name in names), (
        "every method has a name for people"
    )
    assert (method_name("pdrop"), method_name("sparsevlm"), method_name("dense")) == (
        "PyramidDrop",
        "SparseVLM",
        "dense",
    )
    assert method_name("scores of a layer") == "scores of a layer"


def test_the_default_allocator_has_a_section_of_its_own(place):
    save_prefill(
        place / "results", [prefill_row("autoprune", 64, peak_mib=310.0)], allocator="default", load_average=1.7
    )
    assert list(sections(generated(place)))[1:] == [f"{NAME_576}, default allocator"]
    save_prefill(place / "results", [prefill_row("autoprune", 64)])
    text = rendered(place)
    assert list(sections(text))[1:] == [NAME_576, f"{NAME_576}, default allocator"]
    (table,) = tables(sections(text)[f"{NAME_576}, default allocator"])
    assert "310" in column(table, "peak, MiB") and "load average 1.7 at the end" in text
    assert text.count("](images/") == 1, "the fixed one's picture alone"


def test_titles_tell_machines_and_versions_apart(place):
    for changes in ({}, {"hardware": "Other CPU"}, {"torch": "2.12.0"}):
        save_prefill(place / "results", [prefill_row("autoprune", 64)], **changes)
    names = list(sections(generated(place)))
    assert len(names) == 4 and f"{NAME_576}, Other CPU" in names
    assert f"{NAME_576}, Some CPU, torch 2.12.0, transformers 5.23.0" in names


def test_exponents_and_share_of_the_vision_tower(place):
    save_everything(place / "results")
    parts = sections(generated(place))
    text = " ".join(parts["Scaling: cpu-1024x24, float32, sdpa, 1 thread"].split())
    assert "exponents of the time over the visual tokens: dense 2.00, AutoPrune 1.00." in text
    assert "exponents of the peak memory over the visual tokens: dense 1.50, AutoPrune 1.00." in text
    text = parts["End to end: tiny-llava-v1.5, batch 1, float32, 1 thread"]
    (table,) = tables(text)
    assert column(table, "time per question, ms")[-3:] == ["220.0", "168.0", "176.0"], "means over the benchmarks"
    assert "dense 18.2%, AutoPrune 64 23.8%, FastV 64 22.7%" in " ".join(text.split())


def test_pictures_are_small_and_say_what_they_show(place):
    save_everything(place / "results")
    text = rendered(place)
    pictures = sorted((place / "docs" / "images").glob("*.png"))
    assert [path.name.split("--")[0] for path in pictures] == sorted([*DRAWINGS, *["prefill"] * 3])
    for path in pictures:
        assert 2000 < path.stat().st_size < 60_000 and f"](images/{path.name})" in text
        assert drawn_from(path) == read_result(place / "results" / f"{path.stem}.json").digest
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 3
    assert text.count("](images/") == len(pictures)


def test_many_methods_and_missing_figures_can_be_drawn(place):
    rows = [prefill_row(name, 64) for name in list_methods() if name != "dense"]
    rows[0] |= {"selection_ms": -3.0, "floor_of_dense": None}
    rows[1] |= {"of_dense": None}
    rows.append(prefill_row("autoprune published", 64, choice_ms=None))
    save_prefill(place / "results", rows)
    save(place / "results", "decode", "cpu-1024x24, float32, sdpa, 576 visual tokens", decode_rows(batches=(1,)))
    text = rendered(place)
    assert text.count("](images/") == 1, "one batch size is no curve"


def test_the_same_results_give_the_same_document(place):
    save_everything(place / "results")
    first = rendered(place)
    bytes_of = {path.name: path.read_bytes() for path in (place / "docs" / "images").iterdir()}
    assert rendered(place) == first
    assert {path.name: path.read_bytes() for path in (place / "docs" / "images").iterdir()} == bytes_of


def test_pictures_of_vanished_results_go(place, capsys):
    save_everything(place / "results")
    rendered(place)
    images = place / "docs" / "images"
    (images / "comparison.png").write_bytes(b"not ours")
    (images / "survey--2024.png").write_bytes(b"not ours")
    next((place / "results").glob("decode--*.json")).unlink()
    capsys.readouterr()
    rendered(place)
    assert not list(images.glob("decode--*")) and "removed" in capsys.readouterr().out
    assert (images / "comparison.png").is_file() and (images / "survey--2024.png").is_file()


def check(place, capsys):
    """Exit status and what `--check` says; nothing is written."""
    before = {path: path.read_bytes() for path in (place / "docs").rglob("*") if path.is_file()}
    status = 0
    try:
        report.main([*flags(place), "--check"])
    except SystemExit as stop:
        status = stop.code
    assert {path: path.read_bytes() for path in (place / "docs").rglob("*") if path.is_file()} == before
    return status, capsys.readouterr().err


def test_check(place, capsys):
    path = save_prefill(place / "results", [prefill_row("autoprune", 64)])
    status, said = check(place, capsys)
    assert status == 1 and "performance.md" in said and f"{path.stem}.png: missing" in said
    rendered(place)
    assert check(place, capsys) == (0, "")
    save_prefill(place / "results", [prefill_row("autoprune", 64, ms=615.5)])
    status, said = check(place, capsys)
    assert status == 1 and "README.md" in said and f"{path.stem}.png: drawn from other figures" in said
    rendered(place)
    old = place / "docs" / "images" / "decode--gone--x--y.png"
    old.write_bytes(b"")
    status, said = check(place, capsys)
    assert status == 1 and said == f"{old}: no result has this picture\n"


def test_the_committed_document_is_up_to_date(capsys):
    """`python -m benchmarks.report` was run after the last change of a result or of the report."""
    try:
        report.main(["--check"])
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


def test_the_committed_results_can_be_read():
    assert all(result.columns and result.env["hardware"] for result in read_results(RESULTS))


def test_from_a_measurement_to_the_document(place, capsys):
    flags = arguments("--budgets", "8", "--save", "--results-dir", place / "results")
    result = printed(capsys, prefill.main, *flags)
    (table,) = tables(sections(generated(place))[report.titles(read_results(place / "results"))[0]])
    assert column(table, "method") == ["dense", "AutoPrune"]
    assert float(column(table, "over floor, ×")[1]) == pytest.approx(result["rows"][1]["over_floor"], abs=6e-4)


def test_malformed_results_are_named_with_what_to_do(place, capsys):
    results = place / "results"
    fails_with_one_line(report.main, flags(place), capsys, "--results-dir", "no such folder")
    results.mkdir()
    fails_with_one_line(report.main, flags(place), capsys, "--results-dir", "--save")
    good = save_prefill(results, [prefill_row("autoprune", 64)])
    saved = json.loads(good.read_text())
    broken = (
        ({"rows": []}, "rows must have 1 or more entries"),
        ({"rows": [{**saved["rows"][0], "ms": float("nan")}]}, "rows[0].ms must be a number"),
        ({"rows": [{**saved["rows"][0], "ms": [1]}]}, "rows[0].ms must be a number"),
        ({"environment": {**saved["environment"], "allocator": "none"}}, "environment.allocator"),
        ({"environment": {}}, "'hardware'"),
        ({"tool": None}, "tool must be a string"),
    )
    for change, said in broken:
        good.write_text(json.dumps({**saved, **change}))
        fails_with_one_line(report.main, flags(place), capsys, good, said, "measure it again with --save")
    good.write_text("tool,label")
    fails_with_one_line(report.main, flags(place), capsys, good, "malformed JSON", "measure it again with --save")
    good.write_text(json.dumps(saved))
    twin = good.with_name(good.name.replace("--some-", "--renamed-"))
    twin.write_bytes(good.read_bytes())
    fails_with_one_line(report.main, flags(place), capsys, good.name, twin.name, "remove one of them")
    twin.unlink()
    (place / "docs" / "performance.md").write_text("no markers")
    fails_with_one_line(report.main, flags(place), capsys, "performance.md", "results")


def test_named_results_are_sections_of_their_own(place):
    label = "cpu-1024x24, float32, sdpa, 576 visual tokens"
    for name in ("", ", run 2", ", peers-all"):
        for allocator in ("fixed", "default"):
            save(place / "results", "prefill", label + name, [prefill_row("autoprune", 64)], allocator)
    names = list(sections(generated(place)))[1:]
    where = "Prefill: cpu-1024x24, float32, sdpa, 576 visual tokens"
    runs = [f"{where}, 1 thread", f"{where}, peers-all, 1 thread", f"{where}, run 2, 1 thread"]
    assert names == [name for run in runs for name in (run, f"{run}, default allocator")]
