"""Budgets per image: against slow loops, in every method that can, and refused by name by every other."""

import json

import pytest
import torch

from llava.eval.common.arguments import Parser, add_pruning_arguments, method_from_args
from llava.pruning import build_method, get_method, list_methods
from llava.pruning.diversity import max_min_order
from llava.pruning.selection import top_k
from llava.pruning.types import OptionError, UnsupportedError
from llava.pruning.views import Views, parts_of, read_view_budget
from llava.utils import UserError
from tests.model.test_methods_table import OPTIONS, TARGET, Prompts
from tests.model.tiny import PATCHES, tiny_images, tiny_model

SHARES = ["autoprune", "sparsevlm", "sparsevlm_v2", "adaptinfer", "transprune", "entropyprune", "pdrop", "fastv",
          "fastervlm", "random", "information_horizon", "divprune", "autoprune_plus"]  # fmt: skip
I = -200  # noqa: E741
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 2}


def kept_slowly(scores, views, keep, shares):
    """One row by loops: merged tokens (view -1) compete with all, then every view has its floor, then the best."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    chosen = [i for i in order[:keep] if views[i] < 0]
    room, whole = keep - len(chosen), sum(shares)
    for view, share in enumerate(shares):
        chosen += [i for i in order if views[i] == view][: room * share // whole]
    for i in order:
        if len(chosen) < keep and i not in chosen:
            chosen.append(i)
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(12))
def test_ranking_against_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    shares = [1] * 4 if seed % 2 else [3, 0, 1, 4]
    sizes = [(7, 5, 9, 6), (6, 6, 6, 6), (4, 4, 4, 4)]
    origins, counts = [], []
    for row in sizes:  # some were dropped before, some are merged
        left = torch.randperm(sum(row), generator=generator)[: sum(row) - seed % 5].sort().values
        merged = torch.full((seed % 3,), -1)
        origins.append(torch.cat([left, merged]))
        counts.append(len(origins[-1]))
    origins_BV = torch.nn.utils.rnn.pad_sequence(origins, batch_first=True)
    scores = torch.randint(0, 12, origins_BV.shape, generator=generator).float()  # with ties
    keep = [min(count, 3 + seed + row) for row, count in enumerate(counts)]
    budget = "equal" if seed % 2 else tuple(map(float, shares))
    padding = torch.arange(origins_BV.shape[1]) >= torch.tensor(counts)[:, None]
    views = Views.of(budget, sizes, origins_BV.masked_fill(padding, -1))
    found = top_k(views.ranked(scores, counts, keep), counts, keep)
    for row, size in enumerate(sizes):
        bounds = torch.tensor(size).cumsum(0)
        own = [int(torch.bucketize(o, bounds, right=True)) if o >= 0 else -1 for o in origins[row]]
        expected = kept_slowly(scores[row, : counts[row]].tolist(), own, keep[row], shares)
        assert found[row, : keep[row]].tolist() == expected, (seed, row)


def test_a_view_that_cannot_fill_its_part_leaves_it_to_the_best():
    views = Views.of("equal", [(2, 10)], torch.arange(12)[None])
    scores = torch.arange(12.0)[None]
    assert top_k(views.ranked(scores, [12], [8]), [12], [8])[0].tolist() == [0, 1, 6, 7, 8, 9, 10, 11]


def test_diversity_with_room_against_loops():
    """Always the token farthest from all picked, among those whose view has room."""
    tokens = torch.randn(1, 18, 5, generator=torch.Generator().manual_seed(3))
    group, quota = torch.arange(18)[None] // 6, torch.tensor([[2, 1, 4, 0]])
    unit = torch.nn.functional.normalize(tokens[0], dim=1)
    distance = 1 - unit @ unit.T
    isolation = (distance + 9 * torch.eye(18)).amin(1)
    left, picked = [2, 1, 4], []
    for _ in range(9):
        able = [i for i in range(18) if i not in picked and (left[i // 6] > 0 or not any(n > 0 for n in left))]
        values = isolation if not picked else distance[:, picked].amin(1)
        picked.append(max(able, key=lambda i: (float(values[i]), -i)))
        left[picked[-1] // 6] -= 1
    assert max_min_order(tokens, [18], 9, (group, quota))[0].tolist() == picked
    roomy = max_min_order(tokens, [18], 9, (group, torch.tensor([[9, 9, 9, 0]])))
    assert torch.equal(roomy, max_min_order(tokens, [18], 9)), "with room everywhere nothing changes"


def test_shares_of_a_file(tmp_path):
    path = tmp_path / "shares.json"
    for text in ("[2, 1, 1]", "2 1\n1\n", "2, 1, 1"):
        path.write_text(text)
        read_view_budget.__globals__["_read"].cache_clear()
        method = build_method("fastv", {"view_budget": str(path)})
        assert method.view_budget == (2.0, 1.0, 1.0) == method.settings()["view_budget"]
    assert parts_of((2.0, 1.0, 1.0), 3) == [500_000, 250_000, 250_000] and parts_of("equal", 3) == [1, 1, 1]
    assert "view_budget" not in build_method("fastv").settings(), "records from before stay equal"
    with pytest.raises(UnsupportedError, match="3 shares, and a prompt has 6 images"):
        parts_of((2.0, 1.0, 1.0), 6)


@pytest.mark.parametrize("text", ["", "[1, -1]", "[0, 0]", '["a"]', "{}", "1e999", "null"])
def test_bad_shares(tmp_path, text):
    (tmp_path / "bad").write_text(text)
    with pytest.raises(OptionError, match="view_budget must be joint, equal or a file"):
        build_method("fastv", {"view_budget": str(tmp_path / "bad")})
    with pytest.raises(OptionError, match="cannot be read .No such file"):
        build_method("fastv", {"view_budget": str(tmp_path / "nowhere")})


def method(name, **options):
    return get_method(name).from_options({"target_tokens": TARGET, **OPTIONS.get(name, {}), **options})


@pytest.mark.parametrize("name", sorted(set(list_methods()) - set(SHARES)))
def test_methods_that_cannot_say_so_by_name(name):
    with pytest.raises(OptionError, match=f"{name} cannot share its budget out among images"):
        method(name, view_budget="equal")


def test_compositions_and_schedules():
    both = build_method("divprune+fastv", {"divprune.target_tokens": 12, "view_budget": "equal"})
    assert [part.view_budget for part in both.parts] == ["equal", "equal"]
    own = build_method("divprune+fastv", {"divprune.target_tokens": 12, "divprune.view_budget": "equal"})
    assert [part.view_budget for part in own.parts] == ["equal", "joint"]
    assert build_method("1:fastv:0.5;2:random:0.5", {"view_budget": "equal"}).view_budget == "equal"
    with pytest.raises(OptionError, match="cannot share"):
        build_method("1:fastv:0.5;2:uniform:0.5", {"view_budget": "equal"})
    with pytest.raises(OptionError, match="visionzip cannot share"):
        build_method("visionzip+fastv", {"visionzip.target_tokens": 12, "view_budget": "equal"})


def test_the_flag():
    parser = Parser()
    add_pruning_arguments(parser)
    assert method_from_args(parser.parse_args(["--method", "fastv", "--view-budget", "equal"])).view_budget == "equal"
    assert method_from_args(parser.parse_args([])).view_budget == "joint"
    assert method_from_args(parser.parse_args(["--method", "dense", "--view-budget", "equal"])).view_budget == "joint"
    with pytest.raises(UserError, match="--method tome: tome cannot share"):
        method_from_args(parser.parse_args(["--method", "tome", "--view-budget", "equal"]))


# -- in a model

VIEWS = Prompts(
    [[1, 5, I, 6, I, 7, I, 8, 9], [1, 4, 3], [1, 9, I, 12, 13], [1, I, 8, I, 4, I, 3, I, 5]],
    list(tiny_images(8, seed=4)),
    [(28, 28)] * 8,
    True,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=7)


@pytest.mark.parametrize("name", SHARES)
def test_every_image_keeps_its_part_in_every_layer(model, name):
    """And a row of a batch is what the sample is alone; one image keeps what it keeps jointly."""
    equal = method(name, view_budget="equal")
    with torch.inference_mode():
        with equal.attach(model) as together:
            output = model.generate(**VIEWS.call([0, 1, 2, 3]), **GREEDY)
        with equal.attach(model) as alone:
            apart = [model.generate(**VIEWS.call([row]), **GREEDY)[0] for row in range(4)]
        with method(name).attach(model) as joint:
            model.generate(**VIEWS.call([0, 1, 2, 3]), **GREEDY)
    assert torch.equal(output, torch.stack(apart))
    dropped = 0
    for row, views in ((0, 3), (3, 4)):
        trace = together.traces[row]
        assert trace.views == (PATCHES,) * views and trace.tokens_out == joint.traces[row].tokens_out
        assert trace.kept_per_view == alone.traces[row].kept_per_view
        for kept, origins in zip(trace.kept_per_view, trace.kept, strict=True):
            assert sum(kept) == int((origins >= 0).sum())
            assert max(kept) - min(kept) <= views - 1, (name, kept)
            dropped += views * PATCHES - sum(kept)
    assert dropped
    assert [k.tolist() for k in together.traces[2].kept] == [k.tolist() for k in joint.traces[2].kept]
    assert together.traces[1].views == () and together.traces[1].kept_per_view is None


def test_shares_decide_what_stays(model):
    with torch.inference_mode(), method("random", view_budget=(0.0, 1.0, 2.0)).attach(model) as run:
        model.generate(**VIEWS.call([0]), **GREEDY)
        assert run.traces[0].kept_per_view[-1] == [0, 2, 4]
        summary = run.traces[0].to_dict()
        assert summary["views"] == [PATCHES] * 3 and json.dumps(summary["kept_per_view"][-1]) == "[0, 2, 4]"
        with pytest.raises(UnsupportedError, match="3 shares, and a prompt has 1 images"):
            model.generate(**VIEWS.call([2]), **GREEDY)


def test_behind_a_reduction_there_are_no_views(model):
    later = build_method("visionzip+fastv", {"visionzip.target_tokens": 12, "target_tokens": 4, "layer": 1,
                                             "visionzip.view_budget": "joint", "view_budget": "equal"})  # fmt: skip
    with torch.inference_mode(), later.attach(model), pytest.raises(UnsupportedError, match="behind a method that"):
        model.generate(**VIEWS.call([0]), **GREEDY)


def test_views_of_a_dense_run(model):
    with torch.inference_mode(), get_method("dense")().attach(model) as run:
        model.generate(**VIEWS.call([0]), **GREEDY)
    assert run.traces[0].kept_per_view == [[PATCHES] * 3] * 3
