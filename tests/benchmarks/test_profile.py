"""The profile: launches against counts by hand and against torch's own profiler, parts that add up, cuts that hold."""

import json
from collections import Counter

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks import passes, profile, report
from benchmarks.candidates import build_method, dense_prefill, floor_prefill, layer_widths, pruned_prefill, traces_of
from benchmarks.geometry import geometry, random_prompt
from benchmarks.launches import LaunchCounter
from benchmarks.parts import Cut
from llava import compat
from llava.pruning.engine.run import PruningRun
from llava.pruning.engine.sequence import Sequences
from tests.benchmarks.running import CPU, arguments, printed, tiny_decoder
from tests.eval.helpers import fails_with_one_line

X = torch.arange(12.0).view(3, 4)


def count(work, device=CPU):
    with torch.inference_mode(), LaunchCounter(device) as counter:
        work()
    return counter


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


@pytest.fixture(scope="module", params=[1, 2])
def prompt(request):
    return random_prompt(geometry("tiny"), request.param, CPU, torch.float32)


@pytest.mark.parametrize(
    ("work", "launches", "waits"),
    [
        (lambda: X + 1, 1, 0),
        (lambda: (X + 1) * 2 - X.mean(), 4, 0),
        (lambda: X.clone().add_(1), 2, 0),
        # Linear layers and reshapes are made of others.
        (lambda: torch.nn.functional.linear(X[None], torch.ones(5, 4)), 2, 0),
        (lambda: torch.nn.functional.linear(X, torch.ones(5, 4), torch.ones(5)), 3, 0),
        (lambda: X.reshape(2, 6), 0, 0),
        (lambda: X.T.reshape(2, 6), 1, 0),
        (lambda: X.contiguous().to(X.dtype).float().to("cpu"), 0, 0),
        (lambda: X.T.contiguous().double(), 2, 0),
        (lambda: torch.softmax(X, 1), 1, 0),
        (lambda: torch.nn.functional.scaled_dot_product_attention(*[X[None, None]] * 3, is_causal=True), 1, 0),
        # Views, reserved memory, nothing to compute.
        (
            lambda: (X[1:, None], X.T, X.view(-1), X.split(2), X.unbind(), X.expand(2, 3, 4), X.detach(), X[..., 0]),
            0,
            0,
        ),
        (lambda: (torch.empty(3), torch.empty_like(X), X.new_empty(2)), 0, 0),
        (lambda: X.view(3, 4).unsqueeze_(0).squeeze_(0), 0, 0),
        (lambda: X[:0] + 1, 0, 0),
        (lambda: (torch.zeros(2), torch.full((2,), 3), torch.arange(3)), 3, 0),
        (lambda: torch.cat((X, X)).sort(dim=1), 2, 0),
        (lambda: torch.nn.utils.rnn.pad_sequence([X[0], X[0, :2]], batch_first=True), 3, 0),
        # Where the host needs a value, or a shape that depends on values.
        (lambda: X.sum().item(), 1, 1),
        (lambda: bool((X > 3).any()), 2, 1),
        (lambda: X[0].tolist(), 0, 1),
        (lambda: X.nonzero(), 1, 1),
        (lambda: X[X > 3], 2, 1),
        (lambda: X[torch.zeros(2, dtype=torch.long)], 2, 0),
        (lambda: X.masked_fill(X > 3, 0), 2, 0),
        (lambda: torch.equal(X, X), 1, 1),
    ],
)
def test_launches_counted_by_hand(work, launches, waits):
    counter = count(work)
    assert (counter.launches_of(), counter.waits.total()) == (launches, waits), counter.launches


def test_host_lists_are_copied_to_a_device():
    counter = count(lambda: (torch.tensor([1, 2]), torch.as_tensor([1.0]), torch.tensor([]), torch.as_tensor(X)))
    assert counter.uploads.total() == 2 and counter.launches_of() == 0


def test_counting_outside_of_inference_mode_is_the_same():
    def work():
        return torch.nn.functional.linear(X[None], X).reshape(-1).sum()

    with LaunchCounter(CPU) as counter:
        work()
    assert counter.launches == count(work).launches and counter.launches_of() == 2


def test_launches_by_part():
    counter = LaunchCounter(CPU)
    with torch.inference_mode(), counter:
        X + 1
        with counter.part("outer"):
            X + 1
            with counter.part("inner"):
                torch.cat((X, X)).tolist()
            X * 2
    by_part = {("other", "aten::add"): 1, ("outer", "aten::add"): 1, ("outer", "aten::mul"): 1}
    assert counter.launches == {**by_part, ("inner", "aten::cat"): 1} and counter.waits == {"inner": 1}
    X + 1
    assert counter.launches_of() == 4, "counting ends with the block"


def test_operators_of_a_prefill_are_those_that_the_profiler_saw(model, prompt):
    """Watching does not change which operators run: by name, those that run inside no other that computes."""
    for work in (dense_prefill(model, prompt), pruned_prefill(model, build_method("autoprune", 12), prompt)):
        counted: Counter = Counter()
        for (_, name), number in count(work).launches.items():
            counted[name] += number
        with torch.inference_mode(), profiler(activities=[ProfilerActivity.CPU]) as session:
            work()
        seen: Counter = Counter()
        for event in session.events():
            inside = event.cpu_parent
            while inside is not None and inside.name not in counted:
                inside = inside.cpu_parent
            if inside is None and event.name in counted:
                seen[event.name] += 1
        # The `where` with a number is made of this and of a `where` with tensors, which has the same name.
        counted.pop("aten::scalar_tensor", None)
        assert counted == seen


def test_dense_is_counted_on_a_model_without_anything_of_ours(model, prompt):
    """The layers of a Llama, operator by operator; what tells the parts apart adds nothing."""
    work = dense_prefill(model, prompt)
    plain, cut = count(work), profile.counted(work, profile.cuts_of(model), CPU)
    assert plain.launches_of() == cut.launches_of()
    assert {name for name, _ in plain.launches} == {"other"}
    layers = 6
    # Gate, up, down; SiLU and a product.
    assert cut.launches_of(profile.MLP) == layers * 5
    # q, k, v, o; attention; two products, a sum, a negation and a concatenation to rotate each of q and k; two
    # concatenations into the cache.
    assert cut.launches_of(profile.ATTENTION) == layers * (4 + 1 + 2 * 5 + 2)
    # Two norms of six (square, mean, eps, root, two products); two additions.
    assert cut.launches_of(profile.LAYER) == layers * (2 * 6 + 2)
    assert cut.waits.total() == cut.uploads.total() == 0


def test_pruning_launches_more_than_its_floor(model, prompt):
    method = build_method("autoprune", 12)
    traces = traces_of(model, method, prompt)
    floor = floor_prefill(model, layer_widths(traces), prompt)
    under = profile.counted(floor, profile.cuts_of(model), CPU)
    over = profile.counted(pruned_prefill(model, method, prompt), profile.cuts_of(model, method), CPU)
    assert over.launches_of() > under.launches_of() > 0
    assert sum(over.launches_of(part) for part in profile.PARTS) == over.launches_of()
    for part in (profile.SCORES, profile.CHOICE, profile.MOVING):
        assert over.launches_of(part) > 0 == under.launches_of(part)
    assert under.launches_of(profile.MLP) == over.launches_of(profile.MLP) == 6 * 5
    assert over.waits.total() == 1, "the schedule, see tests/pruning/test_gpu.py"
    assert over.launches_of() == count(pruned_prefill(model, method, prompt)).launches_of()


def test_boundaries_are_counted_from_the_traces(model, prompt):
    for name, expected in (("fastervlm", 1), ("random", 1), ("fastv", 1)):
        assert profile.boundaries(traces_of(model, build_method(name, 12), prompt)) == expected
    traces = traces_of(model, build_method("autoprune", 12), prompt)
    # Counts only fall, so each boundary brings one more.
    assert profile.boundaries(traces) == len({*traces[0].tokens_in, *traces[0].tokens_out}) - 1 > 1
    assert profile.boundaries(traces_of(model, None, prompt)) == 0


def attributes(model, method):
    owners = [model.model, model.model.rotary_emb, method, Sequences, PruningRun, compat]
    owners += [module for layer in model.model.layers for module in (layer, layer.self_attn, layer.mlp)]
    return [dict(vars(owner)) for owner in owners]


def test_everything_is_as_before_also_after_an_error(model, prompt):
    method = build_method("autoprune", 12)
    before = attributes(model, method)
    profile.counted(pruned_prefill(model, method, prompt), profile.cuts_of(model, method), CPU)
    assert attributes(model, method) == before
    with pytest.raises(ZeroDivisionError):
        profile.counted(lambda: 1 / 0, profile.cuts_of(model, method), CPU)
    assert attributes(model, method) == before


def test_a_function_that_is_gone_is_an_error(model, prompt):
    method = build_method("autoprune", 12)
    before = attributes(model, method)
    gone = [*profile.cuts_of(model, method), Cut("new part", Sequences, "nosuch")]
    with pytest.raises(AttributeError, match="Sequences.*nosuch"):
        profile.counted(pruned_prefill(model, method, prompt), gone, CPU)
    assert attributes(model, method) == before


def test_a_part_that_is_not_reached_is_an_error(model, prompt):
    method = build_method("autoprune", 12)
    with pytest.raises(RuntimeError, match="'scores' was reached 0 times"):
        profile.counted(dense_prefill(model, prompt), profile.cuts_of(model, method), CPU)
    mlp = model.model.layers[0].mlp
    twice = [
        *profile.cuts_of(model),
        Cut(profile.MLP, type("elsewhere", (), {"forward": mlp.forward}), "forward"),
    ]
    with pytest.raises(RuntimeError, match="'mlp' was reached 6 times.*at least 7"):
        profile.counted(dense_prefill(model, prompt), twice, CPU)


def event(name, start, end, children=(), kernels=(), device=DeviceType.CPU):
    made = FunctionEvent(0, name, 1, start, end, use_device="cuda", device_type=device)
    for kernel, duration in kernels:
        made.append_kernel(kernel, 0, duration)
    for child in children:
        made.append_cpu_child(child)
    return made


def test_host_time_of_nested_parts():
    inner = event("part: mlp", 30, 50, [event("aten::mm", 35, 45)])
    outer = event("part: attention", 10, 70, [event("aten::mm", 12, 20), inner])
    root = event("pass: dense", 0, 100, [outer, event("aten::add", 80, 85)])
    found = passes.passes_in([root, outer, inner])["dense"]
    assert found.host == {"other": 40, "attention": 40, "mlp": 20} and found.wall == 100 and found.busy == 0
    assert found.operators == {"aten::mm": 18, "aten::add": 5} and found.calls == {"aten::mm": 2, "aten::add": 1}
    assert found.times(["attention", "mlp", "other"]) == {"attention": 40, "mlp": 20, "other": 40}


def test_device_time_of_parts():
    """A launch is asked for early and carried out later; annotations have copies of their own on the device's side."""
    product = event("aten::mm", 5, 10, [event("cudaLaunchKernel", 6, 9)], [("gemm", 30)])
    part = event("part: mlp", 1, 12, [product], [("part: mlp", 30)])
    item = event("aten::_local_scalar_dense", 20, 60, [], [("Memcpy DtoH (Device -> Pageable)", 2)])
    wait = event("cudaStreamSynchronize", 25, 59)
    root = event("pass: pruned", 0, 100, [part, item])
    gpu = DeviceType.CUDA
    device = [
        event("gemm", 15, 45, device=gpu),
        event("part: mlp", 15, 45, device=gpu),
        event("Memcpy DtoH (Device -> Pageable)", 55, 57, device=gpu),
        event("overlapping", 40, 50, device=gpu),
        event("another pass's", 130, 140, device=gpu),
    ]
    found = passes.passes_in([root, part, product, item, wait, *device])["pruned"]
    assert found.busy == 35 + 2
    assert found.times(["mlp", "other"]) == {"mlp": 30, "host only": 63, "other": 7}
    assert found.host["mlp"] == 11 and found.operators["aten::mm"] == 30
    assert found.cuda == {"CUDA kernels": 2, "CUDA copies": 1, "CUDA copies to the host": 1, "CUDA waits": 1}


def check_parts(rows):
    """Parts make up the pass, in time and in launches."""
    whole = next(row for row in rows if (row["what"], row["name"]) == ("pass", "all"))
    parts = [row for row in rows if row["what"] == "part"]
    for run in profile.RUNS:
        assert sum(row[f"{run}_ms"] for row in parts) == pytest.approx(whole[f"{run}_ms"])
        assert sum(row[f"{run}_percent"] for row in parts) == pytest.approx(100)
        assert sum(row.get(f"{run}_count", 0) for row in parts) == whole[f"{run}_count"] > 0
    return whole, {row["name"]: row for row in parts}


def test_from_flags_to_the_document(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    flags = ("--budgets", 12, "--top", 4, "--trace", trace, "--save", "--results-dir", tmp_path)
    result = printed(capsys, profile.main, *arguments(*flags))
    rows = result["rows"]
    assert result["tool"] == "profile" and all(
        (r["method"], r["budget"], r["batch"]) == ("autoprune", 12, 1) for r in rows
    )
    whole, parts = check_parts(rows)
    assert tuple(parts) == profile.PARTS
    assert all(
        parts[name]["pruned_ms"] > 0 == parts[name]["floor_ms"] for name in ("scores", "choice", "moving tokens")
    )
    counts = {row["name"]: row for row in rows if row["what"] == "count"}
    steps = counts["pruning boundaries"]["pruned_count"]
    assert whole["per_boundary"] == (whole["pruned_count"] - whole["floor_count"]) / steps > 0
    assert counts["launches per layer"]["dense_count"] == 17 + 5 + 14
    operators = [row for row in rows if row["what"] == "operator"]
    differences = [row["over_floor_ms"] for row in operators]
    assert len(operators) == 4 and differences == sorted(differences, reverse=True)

    annotated = {line["name"] for line in json.loads(trace.read_text())["traceEvents"] if "name" in line}
    assert {"pass: dense", "pass: floor", "pass: pruned", "part: attention", "aten::mm"} <= annotated
    (path,) = tmp_path.glob("profile--*.json")
    saved = json.loads(path.read_text())["rows"]
    assert len(saved) == len(rows) and saved[0]["dense_count"] == whole["dense_count"]
    document = tmp_path / "performance.md"
    document.write_text("<!-- results: begin -->\n<!-- results: end -->\n")
    report.main(["--results-dir", str(tmp_path), "--document", str(document)])
    text = (tmp_path / "README.md").read_text()
    assert "### Profile: tiny, float32, sdpa" in text and "norms and residuals" in text and "| dense, % |" in text


def test_batches_and_methods(capsys):
    flags = arguments("--budgets", 12, "--methods", "random,autoprune", "--batch-sizes", "1,2", "--rounds", 1)
    rows = printed(capsys, profile.main, *flags)["rows"]
    settings = dict.fromkeys((row["method"], row["batch"]) for row in rows)
    assert list(settings) == [("random", 1), ("autoprune", 1), ("random", 2), ("autoprune", 2)]
    launches = {
        setting: check_parts([r for r in rows if (r["method"], r["batch"]) == setting])[0] for setting in settings
    }
    assert launches["random", 1]["pruned_count"] < launches["autoprune", 1]["pruned_count"]
    assert launches["random", 1]["dense_count"] == launches["autoprune", 2]["dense_count"]


def test_bad_input(tmp_path, capsys):
    for flags, parts in (
        (["--top", "-1"], ["--top"]),
        (["--methods", "dense"], ["--methods"]),
        (["--budgets", "48"], ["--budgets", "autoprune", "48"]),
        (["--budgets", "12,24", "--trace", tmp_path / "t.json"], ["--trace", "one"]),
        (["--trace", tmp_path / "nosuch" / "t.json"], ["--trace", "nosuch"]),
        (["--trace", tmp_path], ["--trace"]),
        (["--rounds", "0"], ["--rounds"]),
    ):
        fails_with_one_line(profile.main, arguments("--budgets", 12, *flags), capsys, *parts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_agree_with_the_kernels_of_a_gpu(capsys):
    rows = printed(capsys, profile.main, *arguments("--budgets", 12, "--device", "cuda", "--warmup", 1))["rows"]
    whole, parts = check_parts(rows)
    counts = {row["name"]: row for row in rows if row["what"] == "count"}
    assert "host only" in parts and parts["attention"]["dense_ms"] > 0 and parts["choice"]["pruned_ms"] > 0
    for run in profile.RUNS:
        key = f"{run}_count"
        # Copies within the device are launches too.
        assert counts["CUDA kernels"][key] + counts["CUDA copies"][key] >= whole[key] > 0
        assert counts["CUDA copies to the host"][key] == counts["waits for the device"][key] == (run == "pruned")
