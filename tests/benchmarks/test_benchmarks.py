"""The benchmarks on the smallest geometry: counts and forms against independent ones, never times."""

import json

import pytest
import torch

from benchmarks import decode, end_to_end, memory, prefill, scaling
from benchmarks.candidates import (
    build_method,
    count_row,
    floor_prefill,
    layer_widths,
    needs_no_tower,
    run_pruned,
    traces_of,
)
from benchmarks.environment import FIXED_ALLOCATOR, environment
from benchmarks.flags import decoder_parser, settings_of
from benchmarks.geometry import GEOMETRIES, geometry, random_prompt
from benchmarks.packed import PackedLinear, pack_linears
from benchmarks.parts import Clock
from benchmarks.saved import read_result, result_path, save, slug
from benchmarks.timing import interleaved_rounds, median_ratio, summary
from llava.pruning import list_methods
from llava.utils import UserError
from tests.benchmarks import synthetic
from tests.benchmarks.running import CPU, arguments, printed, tiny_decoder
from tests.eval.helpers import fails_with_one_line


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


@pytest.fixture(scope="module")
def prompt():
    return random_prompt(geometry("tiny"), 2, CPU, torch.float32)


def test_geometries_have_the_published_sizes():
    # Parameters of the decoder layers, from the model cards' totals less embeddings, head and norms.
    assert GEOMETRIES["llava-1.5-7b"].parameters() == pytest.approx(6.476e9, rel=1e-3)
    assert GEOMETRIES["llava-1.5-13b"].parameters() == pytest.approx(12.688e9, rel=1e-3)
    assert GEOMETRIES["llava-next-7b"].visual == 2880
    small = GEOMETRIES["cpu-1024x24"]
    assert (small.before, small.visual, small.after, small.layers, small.ffn) == (10, 576, 50, 24, 2752)


def test_the_model_has_the_parameters_that_the_geometry_says(model):
    weights = sum(p.numel() for layer in model.model.layers for n, p in layer.named_parameters() if "norm" not in n)
    assert weights == geometry("tiny").parameters()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dense_is_transformers_own_forward(model, prompt):
    with torch.inference_mode():
        output = prefill.dense_prefill(model, prompt)()
        own = model.model(inputs_embeds=prompt.embeds_BNC, use_cache=True)
    assert torch.equal(output.last_hidden_state, own.last_hidden_state)


def test_the_floor_works_on_the_recorded_lengths(model, prompt):
    traces = traces_of(model, build_method("autoprune", 12), prompt)
    widths = layer_widths(traces)
    assert len(widths) == 6 and widths[0] == prompt.tokens > widths[-1]
    with torch.inference_mode():
        hidden, cache = floor_prefill(model, widths, prompt)()
        output, _ = run_pruned(model, build_method("autoprune", 12), prompt)
    assert tuple(layer.keys.shape[2] for layer in cache.layers) == widths
    assert widths == tuple(layer.keys.shape[2] for layer in output.past_key_values.layers)
    assert hidden.shape[1] == widths[-1]


def test_the_floor_at_full_length_is_dense(model, prompt):
    with torch.inference_mode():
        hidden, _ = floor_prefill(model, [prompt.tokens] * 6, prompt)()
        own = model.model(inputs_embeds=prompt.embeds_BNC, use_cache=True).last_hidden_state
    assert torch.allclose(hidden, own, atol=1e-6)


def test_counts_of_a_row(model, prompt):
    """FLOPs by the formula of the paper on the tokens that the trace recorded."""
    traces = traces_of(model, build_method("random", 16), prompt)
    row = count_row(traces)
    tokens, d, m = 16 + 11, 64, 128
    assert (row["nominal"], row["processed"], row["batch"], row["visual"]) == (16, 16, 2, 48)
    assert row["flops"] == 2 * 6 * (4 * tokens * d * d + 2 * tokens**2 * d + 3 * tokens * d * m)
    assert row["kv_mib"] * 2**20 == 2 * 6 * 2 * tokens * 64 * 4
    dense = count_row(traces_of(model, None, prompt))
    assert dense["flops_of_dense"] == 1 and dense["processed"] == 48


def test_rounds_are_interleaved_in_shuffled_order():
    order, given = [], []

    def measure(work, device):
        work()
        given.append(len(given))
        return given[-1]

    work = {name: (lambda n=name: order.append(n)) for name in "abcd"}
    seconds = interleaved_rounds(work, rounds=12, device=CPU, warmup=1, measure=measure)
    rounds = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert len(rounds) == 13 and all(sorted(one) == list("abcd") for one in rounds)
    for name in "abcd":  # in the order of the rounds, of which the warm-up round does not count
        assert seconds[name] == [4 * number + one.index(name) for number, one in enumerate(rounds)][1:]
        assert len({one[one.index(name) - 1] for one in rounds if one.index(name)}) > 1, "always the same predecessor"


def test_summaries():
    found = summary([0.001 * i for i in range(1, 12)])
    assert found == pytest.approx({"ms": 6.0, "p10": 2.0, "p90": 10.0, "rounds": 11})
    assert median_ratio([2.0, 4.0, 100.0], [1.0, 2.0, 10.0]) == 2.0


def test_exponents_of_known_laws():
    rows = [{"method": "square", "visual": n, "ms": 3.0 * n**2} for n in (10, 100, 1000)]
    rows += [{"method": "root", "visual": n, "ms": n**0.5} for n in (10, 40)]
    rows += [{"method": "single", "visual": 10, "ms": 1.0}, {"method": "unknown", "visual": 10, "ms": None}]
    assert scaling.exponents(rows, "ms") == pytest.approx({"square": 2.0, "root": 0.5})


def test_result_files_are_named_by_hardware_and_versions():
    env = environment(CPU)
    assert tuple(env) == tuple(synthetic.environment())
    name = result_path("prefill", "cpu-1024x24, float32, sdpa", env).name
    assert name.startswith("prefill--cpu-1024x24-float32-sdpa--") and f"torch{torch.__version__.split('+')[0]}" in name
    assert f"-{torch.get_num_threads()}t-" in name
    assert slug("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz") == "intel-xeon-e5-2680-v4"


def test_the_allocator_settings_are_told(monkeypatch):
    for name in FIXED_ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    assert environment(CPU)["allocator"] == "default"
    for variable, value in FIXED_ALLOCATOR.items():
        monkeypatch.setenv(variable, value)
    env = environment(CPU)
    assert env["allocator"] == "fixed" and FIXED_ALLOCATOR.items() <= env["variables"].items()


def test_every_tool_saves_and_prints_one_object_last(tmp_path, capsys):
    saving = arguments("--save", "--results-dir", tmp_path)
    flags = ("--methods", "autoprune,random", "--budgets", "8", "--batch-sizes", "1,2")
    result = printed(capsys, prefill.main, *saving, *flags)
    settings = (("dense", None), ("autoprune", 8), ("random", 8))
    measured = [(r["method"], r["budget"], r["batch"]) for r in result["rows"]]
    assert measured == [(*setting, batch) for batch in (1, 2) for setting in settings]
    assert all(r["ms"] > 0 and r["rounds"] == 2 and r["p10"] <= r["ms"] <= r["p90"] for r in result["rows"])
    assert all((r.get("choice_ms") or 0) > 0 for r in result["rows"] if r["method"] == "autoprune")
    assert all((r.get("over_floor") is None) == (r["method"] == "dense") for r in result["rows"])
    rows = printed(capsys, decode.main, *saving, "--budgets", "8", "--new-tokens", 3)["rows"]
    assert rows[1]["kv_of_dense"] == pytest.approx(rows[1]["kv_mib"] / rows[0]["kv_mib"]) and rows[1]["kv_of_dense"] < 1
    rows = printed(capsys, scaling.main, *saving, "--visual-tokens", "18,36", "--methods", "random")["rows"]
    assert [(row["visual"], row["budget"]) for row in rows] == [(18, None), (18, 2), (36, None), (36, 4)]
    (path,) = tmp_path.glob("prefill--*")
    saved = json.loads(path.read_text())
    assert list(saved) == list(result) == ["tool", "label", "environment", "rows"]
    assert saved["environment"] == result["environment"]
    for ours, told in zip(saved["rows"], result["rows"], strict=True):
        assert list(ours) == list(told) and ours["ms"] == pytest.approx(told["ms"], rel=1e-5)
    assert {path.name.split("--")[0] for path in tmp_path.glob("*.json")} == {"prefill", "decode", "scaling"}


def test_memory_of_scores_and_prefill(capsys):
    with memory.PeakMemory(CPU) as peak:
        pass
    if peak.bytes is None:
        pytest.skip("this system does not let a process reset its peak memory")
    found = printed(capsys, memory.main, *arguments("--visual-tokens", "900", "--budgets", "100"))
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["a full attention map"]["mib"] * 2**20 == 4 * 4 * (3 + 900 + 8) ** 2
    assert 0 < rows["autoprune"]["mib"] and rows["autoprune"]["of_floor"] == pytest.approx(
        rows["autoprune"]["mib"] / rows["autoprune"]["floor_mib"]
    )


def test_decoding_grows_every_layer_by_one_token_a_step(model, prompt):
    run = decode.Decoding(model, build_method("autoprune", 12), prompt, new_tokens=3)
    widths = layer_widths(traces_of(model, build_method("autoprune", 12), prompt))
    with torch.inference_mode():
        assert run.seconds_per_step(run, CPU) > 0
    assert [layer.keys.shape[2] for layer in run.cache.layers] == [width + 3 for width in widths]


def test_nested_parts_count_once(monkeypatch):
    clock = Clock(CPU)
    moments = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("benchmarks.parts.time.perf_counter", lambda: next(moments))
    with clock.part("outer"), clock.part("inner"):
        pass
    assert dict(clock.seconds) == {"inner": 3.0, "outer": 7.0}
    with clock.part("inner"):
        pass
    assert dict(clock.seconds) == {"inner": 4.0, "outer": 7.0}, "what is between two blocks belongs to none"


def test_parts_on_cuda_are_told_apart_by_events_without_waiting(monkeypatch):
    """The stream is behind the host: events have the time at which it reaches them, known once it is waited for."""
    stream, waited = iter([0.0, 500.0, 4500.0, 10000.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.stream = stream

        def elapsed_time(self, later):
            assert waited, "not before the device has got there"
            return later.time - self.time

    def synchronize(device):
        waited.append(device)
        for _, event in clock._marks:
            event.time = next(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    clock = Clock(torch.device("cuda"))
    with clock.part("outer"), clock.part("inner"):
        pass
    assert not waited
    assert dict(clock.seconds) == {"outer": 6.0, "inner": 4.0}, "milliseconds of events as seconds"


def test_end_to_end_parts_add_up(checkpoint, capsys):
    flags = ["--model-path", checkpoint, "--limit", 2, "--budgets", 8, "--device", "cpu"]
    rows = printed(capsys, end_to_end.main, *flags)["rows"]
    assert len(rows) == 8 and {row["benchmark"] for row in rows} == {"TextVQA", "POPE", "GQA", "MME"}
    for row in rows:
        assert sum(row[part] for part in end_to_end.PARTS) == pytest.approx(row["ms"])
        assert all(row[part] > 0 for part in ("image", "vision", "projector", "prefill", "decode"))
        assert (row["selection"] > 0) == (row["method"] == "autoprune"), "a part of its own"
    assert rows[0]["tokens_processed"] == 16 and 8 < rows[1]["tokens_processed"] < 16


def test_bad_input(capsys):
    for flags, parts in (
        (["--geometry", "nosuch"], ["--geometry", "nosuch", "cpu-1024x24"]),
        (["--budgets", "49"], ["--budgets", "49", "48"]),
        (["--budgets", "8", "--methods", "nosuch"], ["--methods", "nosuch"]),
        (["--budgets", "8", "--batch-sizes", "0"], ["--batch-sizes"]),
        (["--rounds", "0"], ["--rounds"]),
        (["--device", "nosuch"], ["--device"]),
    ):
        fails_with_one_line(prefill.main, arguments(*flags), capsys, *parts)
    with pytest.raises(UserError, match="empty.md.*results"):
        from llava.eval.common.tables import replace_between

        replace_between("", "results", "", "empty.md")


@pytest.mark.parametrize("name", [n for n in list_methods() if n != "dense"])
def test_methods_that_need_a_tower_are_one_line_errors(name, model, prompt, capsys):
    """Every method runs on random embeddings or is refused before anything is measured."""
    flags = ["--geometry", "tiny", "--device", "cpu", "--budgets", "8"]
    towers = ("tome", "visionzip", "hiprune", "prumerge_plus", "vispruner", "scope", "holov", "flowcut", "gtp_vit")
    if name in (*towers, "vscan", "agilepruner", "vflowopt"):
        for tool in (prefill, decode, memory, scaling):
            own = [flag for flag in flags if tool is not scaling or flag not in ("--budgets", "8")]
            fails_with_one_line(tool.main, [*own, "--methods", name], capsys, "--methods", name, "tower", "first_token")
    else:
        assert needs_no_tower(build_method(name, 8)).name == name
        assert len(traces_of(model, build_method(name, 8), prompt)) == 2
    assert ("dense", None) not in settings_of_first_token(flags, name)


def settings_of_first_token(flags, name):
    return settings_of(decoder_parser("").parse_args([*flags, "--methods", name]), 48)


ROW = {"method": "autoprune", "budget": 64, "batch": 1, "visual": 576, "rounds": 9, "ms": 5.0}


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, False),
        ({"ms": 6.0, "rounds": 11}, False),
        ({"rounds": 2}, True),
        ({"method": "fastv"}, True),
        ({"budget": 128}, True),
        ({"batch": 8}, True),
        ({"new_tokens": 16}, False),
    ],
)
def test_saving_replaces_repetitions_only(change, kept, tmp_path, capsys):
    first = save("prefill", "tiny", [ROW], synthetic.environment(), tmp_path)
    measured = first.read_bytes()
    again = save("prefill", "tiny", [{**ROW, **change}], synthetic.environment(), tmp_path)
    said = capsys.readouterr().err
    assert kept == (again != first) == (first.read_bytes() == measured and bool(change)) == ("--name" in said)
    assert said.count("\n") == kept and len(list(tmp_path.iterdir())) == 1 + kept
    assert read_result(again).rows[0]["ms"] == change.get("ms", 5.0)


def test_nothing_saved_is_ever_lost(tmp_path):
    """More rows, fewer, others, fewer rounds, a file that nobody can read: afterwards all are there."""
    env = synthetic.environment()
    other = {**ROW, "budget": 128}
    paths = [save("prefill", "tiny", rows, env, tmp_path) for rows in ([ROW], [other], [ROW, other], [ROW])]
    # Both rows replace the first file, which held one of them; then a single one does not replace both.
    assert [path.stem.split("--")[1] for path in paths] == ["tiny", "tiny-run-2", "tiny", "tiny-run-3"]
    paths[0].write_text("damaged\n")
    fifth = save("prefill", "tiny", [ROW, other], env, tmp_path)
    assert fifth.stem.split("--")[1] == "tiny-run-2" and paths[0].read_text() == "damaged\n"


def test_names_keep_runs_apart(tmp_path, capsys):
    for flags in (["--methods", "autoprune"], ["--methods", "random", "--name", "Peers, all"]):
        prefill.main(arguments("--save", "--results-dir", tmp_path, "--budgets", "8", *flags))
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["label"].endswith(", 48 visual tokens, peers-all")
    assert "is kept" not in said.err
    labels = [path.stem.split("--")[1] for path in sorted(tmp_path.glob("*.json"))]
    assert labels == ["tiny-float32-sdpa-48-visual-tokens", "tiny-float32-sdpa-48-visual-tokens-peers-all"]
    fails_with_one_line(prefill.main, arguments("--name", "--"), capsys, "--name")


def test_packed_weights_compute_the_same(prompt, capsys):
    plain, packed = tiny_decoder(), pack_linears(tiny_decoder(), rows=48)
    layers = [module for module in packed.model.layers.modules() if isinstance(module, (torch.nn.Linear, PackedLinear))]
    assert len(layers) == 6 * 7 and all(isinstance(module, PackedLinear) for module in layers)
    method = build_method("autoprune", 12)
    with torch.inference_mode():
        dense = [prefill.dense_prefill(model, prompt)() for model in (packed, plain)]
        pruned = [run_pruned(model, method, prompt)[0] for model in (packed, plain)]
    for ours, theirs in (dense, pruned):
        torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=1e-4)
    found = printed(capsys, prefill.main, *arguments("--budgets", "8", "--linear", "packed"))
    assert found["label"].startswith("tiny-packed, float32, sdpa, 48")
