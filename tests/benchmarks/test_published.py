"""The published way of computing AutoPrune: the same choices as ours, at the cost that it says it has."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import memory, prefill, published
from benchmarks.candidates import count_row, layer_widths, run_pruned, traces_of
from benchmarks.geometry import geometry, random_decoder, random_prompt
from benchmarks.published import Published, published_prefill, run_published, with_published
from llava.pruning import AutoPrune, get_method
from llava.utils import UserError
from tests.benchmarks.running import CPU, arguments, printed
from tests.eval.helpers import fails_with_one_line
from tests.pruning.models import random_llama

_COUNTS = {"visual": 200, "text": 8}


@pytest.fixture(scope="module", params=[(6, 4), (24, 2)], ids=["6-layers", "24-layers-grouped-queries"])
def model(request):
    layers, kv_heads = request.param
    return random_llama(layers=layers, kv_heads=kv_heads).requires_grad_(False)


@pytest.fixture(scope="module")
def prompt():
    """Tokens as wide as those of `random_llama`; many, so that several clusters are merged."""
    return random_prompt(geometry("tiny"), 1, CPU, torch.float32, _COUNTS["visual"])


class Spy(TorchDispatchMode):
    """Per decoder layer the attention maps that a softmax made, and how often the host read the device."""

    def __init__(self):
        super().__init__()
        self.layer, self.maps, self.reads = 0, {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._softmax.default and result.ndim == 4:
            self.maps.setdefault(self.layer, []).append(tuple(result.shape))
        if function is torch.ops.aten._local_scalar_dense.default:
            self.reads[self.layer] = self.reads.get(self.layer, 0) + 1
        return result


@contextmanager
def spying(model):
    """Counts by layer, from the moment its norm is entered to the next layer's."""
    with Spy() as spy:
        hooks = [
            layer.input_layernorm.register_forward_pre_hook(lambda *_, i=index: setattr(spy, "layer", i))
            for index, layer in enumerate(model.model.layers)
        ]
        yield spy
    for hook in hooks:
        hook.remove()


SCHEDULES = [
    {"target_tokens": 20},
    {"target_tokens": 64},
    {"target_tokens": 5, "x0": 3.0},
    {"target_tokens": 20, "x0": 3.0, "k0": 8.0, "gamma": 0.0},  # a step: most are dropped at once
    {"target_tokens": 40, "x0": 3.0, "k0": 1.0, "gamma": 0.0},
    {"target_tokens": 20, "k0": 0.0, "gamma": 0.0},  # flat
    {"target_tokens": 200},  # nothing to drop in most layers
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_the_same_tokens_stay(model, prompt, options):
    method = AutoPrune(**options)
    with torch.inference_mode():
        output, (ours,) = run_pruned(model, method, prompt)
        other, (theirs,) = run_published(model, method, prompt)
    assert theirs.tokens_in == ours.tokens_in and theirs.tokens_out == ours.tokens_out
    assert all(torch.equal(a, b) for a, b in zip(theirs.kept, ours.kept, strict=True))
    assert theirs.slope == pytest.approx(ours.slope, abs=1e-5)
    assert theirs.mutual_information == pytest.approx(ours.mutual_information, abs=1e-5)
    torch.testing.assert_close(other.last_hidden_state, output.last_hidden_state, atol=1e-3, rtol=1e-3)
    for a, b in zip(other.past_key_values.layers, output.past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(a.values, b.values, atol=1e-3, rtol=1e-3)
    one, two = count_row([theirs]), count_row([ours])
    assert all(one[name] == two[name] for name in ("visual", "nominal", "processed", "flops", "kv_mib"))
    assert layer_widths([theirs]) == layer_widths([ours])


def test_the_schedules_merge_into_one_and_into_several(model, prompt, monkeypatch):
    """What the comparison above is worth: clusterings of every kind, the steepest and the flattest curve."""
    clusters, merge = set(), published._merge
    monkeypatch.setattr(published, "_merge", lambda tokens, count: clusters.add(count) or merge(tokens, count))
    slopes = [traces_of(model, Published(AutoPrune(**options)), prompt)[0].slope for options in SCHEDULES]
    assert {1, 2} <= clusters and max(clusters) > 3
    assert max(slopes) == 8 and min(slopes) == 0


def test_every_layer_has_a_full_map(model, prompt):
    method = AutoPrune(target_tokens=20)
    with torch.no_grad(), spying(model) as spy:
        _, (trace,) = run_published(model, method, prompt)
    widths = layer_widths([trace])
    maps = {layer: [(1, 4, width, width)] for layer, width in enumerate(widths)}
    assert spy.maps == maps
    with torch.no_grad(), spying(model) as spy:
        run_pruned(model, method, prompt)
    assert not any(shape in maps[layer] for layer, shapes in spy.maps.items() for shape in shapes), "ours has none"


def test_the_host_reads_in_every_layer(model, prompt):
    with torch.no_grad(), spying(model) as spy:
        published_prefill(model, AutoPrune(target_tokens=20), prompt)()
    assert set(spy.reads) == set(range(len(model.model.layers)))


def test_half_precision_and_eager_attention():
    model = random_decoder(geometry("tiny"), CPU, torch.bfloat16, "eager")
    prompt = random_prompt(geometry("tiny"), 1, CPU, torch.bfloat16)
    with torch.inference_mode():
        output, (trace,) = run_published(model, AutoPrune(target_tokens=12), prompt)
    assert output.last_hidden_state.dtype == torch.bfloat16 and torch.isfinite(output.last_hidden_state).all()
    assert trace.tokens_out[0] == 30 and trace.mean_tokens("nominal") == pytest.approx(12, abs=0.5)


def test_what_the_published_code_cannot_do(model, prompt):
    two = random_prompt(geometry("tiny"), 2, CPU, torch.float32)
    for method, given, part in (
        (AutoPrune(), two, "one sample at a time, got 2"),
        (get_method("random").from_options({"target_tokens": 8}), prompt, "random"),
        (AutoPrune(recycle_fraction=0.5), prompt, "x0, k0, gamma"),
        (AutoPrune(budget="processed"), prompt, "budget='processed'"),
    ):
        for call in (run_published, published_prefill):
            with pytest.raises(UserError, match=part):
                call(model, method, given)
    with pytest.raises(UserError, match="--methods"):
        with_published({("random", 8): None}, [1])


def test_rows_of_the_benchmarks(capsys):
    def rows(main, *flags):
        return printed(capsys, main, *arguments(*flags, "--published"))["rows"]

    names = [(name, budget) for budget in (8, 12) for name in ("autoprune", "autoprune published")]
    found = rows(prefill.main, "--budgets", "8,12", "--methods", "autoprune,random")
    measured = [(row["method"], row["budget"]) for row in found]
    assert measured == [("dense", None), *names, ("random", 8), ("random", 12)]
    for ours, theirs in zip(found[1:5:2], found[2:5:2], strict=True):
        assert theirs["floor_ms"] == ours["floor_ms"], "the floor is measured once"
        assert theirs["processed"] == ours["processed"] and theirs["over_floor"] > 0 and theirs["of_dense"] > 0
        assert theirs["choice_ms"] is None and "peak_mib" in theirs

    with memory.PeakMemory(CPU) as peak:
        pass
    if peak.bytes is None:
        pytest.skip("this system does not let a process reset its peak memory")
    found = rows(memory.main, "--budgets", "8,12", "--methods", "autoprune")
    assert [(row["method"], row["budget"]) for row in found[1:5]] == names
    assert all(found[i]["floor_mib"] == found[i + 1]["floor_mib"] and found[i + 1]["mib"] > 0 for i in (1, 3))


def test_flags_that_do_not_fit(capsys):
    for main in (prefill.main, memory.main):
        for flags, parts in (
            (["--batch-sizes", "1,2"], ["--published", "--batch-sizes 1"]),
            (["--methods", "random"], ["--published", "autoprune", "--methods"]),
        ):
            fails_with_one_line(main, arguments("--budgets", 8, "--published", *flags), capsys, *parts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_keeps_what_the_cpu_keeps():
    model, method = random_llama().requires_grad_(False), AutoPrune(target_tokens=20, x0=3.0)
    traces = []
    for device in (CPU, torch.device("cuda")):
        prompt = random_prompt(geometry("tiny"), 1, device, torch.float32, _COUNTS["visual"])
        traces += traces_of(model.to(device), Published(method), prompt)
    assert all(torch.equal(a, b) for a, b in zip(*(trace.kept for trace in traces), strict=True))
