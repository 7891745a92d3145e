"""Options, the registry, and the simple methods."""

from __future__ import annotations

import pytest
import torch

from llava.pruning import AutoPrune, Dense, OptionError, PruningMethod, get_method, list_methods
from tests.pruning.models import Batch, generate, random_llama


@pytest.fixture(scope="module")
def model():
    return random_llama()


def test_registry():
    assert list_methods() == sorted(list_methods()) and {"autoprune", "dense"} <= set(list_methods())
    assert get_method("autoprune") is AutoPrune and get_method("dense") is Dense
    for name in list_methods():
        method = get_method(name)
        assert issubclass(method, PruningMethod) and method.name == name and method.__doc__
    with pytest.raises(OptionError, match="unknown pruning method 'fastvv'; available: .*autoprune"):
        get_method("fastvv")


def test_options_from_strings():
    method = AutoPrune.from_options(
        {"target_tokens": "128", "x0": "12", "positions": "original", "visual_token_num": "none", "gamma": 0.1}
    )
    assert method == AutoPrune(target_tokens=128, x0=12.0, positions="original", gamma=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targettokens": "3"}, "no option 'targettokens'; valid options: target_tokens, positions"),
        ({"x0": "high"}, "option 'x0' must be of type float, got 'high'"),
        ({"target_tokens": "6.5"}, "option 'target_tokens' must be of type int, got '6.5'"),
        ({"target_tokens": 0}, "target_tokens must be an integer of at least 1, got 0"),
        ({"target_tokens": "-3"}, "at least 1, got -3"),
        ({"target_tokens": None}, "autoprune needs target_tokens"),
        ({"visual_token_num": 0}, "visual_token_num must be"),
        ({"positions": "kept"}, "'compact' or 'original', got 'kept'"),
        ({"coarse_factor": 0.5}, "coarse_factor"),
        ({"recycle_fraction": 1.5}, "recycle_fraction"),
        ({"amplitude": 0.0}, "amplitude"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        AutoPrune.from_options(options)


def test_methods_are_immutable():
    with pytest.raises(AttributeError):
        AutoPrune().target_tokens = 3


@pytest.mark.parametrize("name", ["random", "uniform", "fastervlm", "divprune"])
def test_constant_budget_is_exact(model, name):
    for target in (1, 7, 48, 500):
        _, _, (trace,) = generate(model, get_method(name)(target_tokens=target), Batch(model).alone(0), new_tokens=1)
        kept = trace.kept[0]
        assert len(kept) == len(set(kept.tolist())) == min(target, 48)
        assert kept.tolist() == sorted(kept.tolist())
        assert trace.mean_tokens("nominal") == trace.mean_tokens("processed") == min(target, 48)


def test_uniform_is_evenly_spaced(model):
    _, _, (trace,) = generate(model, get_method("uniform")(target_tokens=12), Batch(model).alone(0), new_tokens=1)
    assert trace.kept[0].tolist() == list(range(2, 48, 4))


def test_random_depends_on_seed_and_sample_not_on_the_batch(model):
    batch = Batch(model, samples=((4, 30, 5), (2, 30, 9), (3, 30, 4)))
    method = get_method("random")(target_tokens=10, seed=7)
    _, _, together = generate(model, method, batch.together([0, 1, 2]), new_tokens=1)
    with method.attach(model) as run, torch.no_grad():
        for row in range(3):
            run.set_visual(batch.alone(row)["layout"])
            model(inputs_embeds=batch.embeds[row][None])
    for one, other in zip(together, run.traces, strict=True):
        assert torch.equal(one.kept[0], other.kept[0])
    assert not torch.equal(together[0].kept[0], together[1].kept[0])
    with method.attach(model) as run, torch.no_grad():  # a resumed run goes on counting where the first one stopped
        run.samples_seen = 2
        run.set_visual(batch.alone(2)["layout"])
        model(inputs_embeds=batch.embeds[2][None])
    assert torch.equal(run.traces[0].kept[0], together[2].kept[0]) and run.samples_seen == 3
    _, _, reseeded = generate(model, get_method("random")(target_tokens=10, seed=8), batch.alone(0), new_tokens=1)
    assert not torch.equal(reseeded[0].kept[0], together[0].kept[0])


def test_cap_keeps_the_strongest_cls_attention_in_order(model):
    batch = Batch(model)
    _, _, (trace,) = generate(model, Dense(visual_token_num=10), batch.alone(0), new_tokens=1)
    expected = batch.cls[0].topk(10).indices.sort().values
    assert torch.equal(trace.kept[0], expected)
    assert trace.tokens_in == [10] * 6 and trace.visual_tokens == 48


def test_cap_above_the_number_of_tokens_changes_nothing(model):
    batch = Batch(model)
    for method in (AutoPrune, Dense):
        _, capped, _ = generate(model, method(visual_token_num=2880), batch.alone(0))
        _, free, _ = generate(model, method(), batch.alone(0))
        torch.testing.assert_close(capped, free, atol=1e-5, rtol=1e-5)


def test_autoprune_without_any_pruning_is_dense(model):
    """A budget of all tokens keeps all of them: the owned forward must then equal the stock one."""
    batch = Batch(model)
    tokens, logits, (trace,) = generate(model, AutoPrune(target_tokens=48, positions="original"), batch.alone(0))
    dense_tokens, dense_logits, _ = generate(model, Dense(), batch.alone(0))
    if trace.tokens_out == [48] * 6:
        assert torch.equal(tokens, dense_tokens)
        torch.testing.assert_close(logits, dense_logits, atol=1e-5, rtol=1e-5)
    else:
        pytest.fail(f"a budget of all tokens dropped some: {trace.tokens_out}")


@pytest.mark.parametrize(("target", "kept"), [(40, 36), (24, 12), (20, 6), (16, 1), (4, 1), (48, 48)])
def test_fastv_meets_the_processed_mean_where_it_can(model, target, kept):
    """N = 48, L = 6, K = 2: (6 T - 96) / 4 tokens remain behind layer 1."""
    _, _, (trace,) = generate(model, get_method("fastv")(target_tokens=target), Batch(model).alone(0), new_tokens=1)
    assert trace.tokens_in == [48, 48, kept, kept, kept, kept]
    if kept > 1:
        assert abs(trace.mean_tokens("processed") - target) < 1


def test_fastv_keeps_what_the_last_token_attends_to():
    eager = random_llama("eager")
    batch = Batch(eager)
    with torch.no_grad():
        maps = eager(inputs_embeds=batch.embeds[0][None], output_attentions=True).attentions
    expected = maps[2][0, :, -1, 4:52].mean(0).topk(24).indices.sort().values
    _, _, (trace,) = generate(random_llama(), get_method("fastv")(layer=3, ratio=0.5), batch.alone(0), new_tokens=1)
    assert torch.equal(trace.kept[2], expected) and trace.tokens_out[:3] == [48, 48, 24]


@pytest.mark.parametrize(
    ("options", "message"), [({"layer": 0}, "layer"), ({"ratio": 1.0}, "ratio"), ({"layer": 6}, "6 layers")]
)
def test_fastv_options_are_checked(model, options, message):
    with pytest.raises(OptionError, match=message):
        get_method("fastv")(**options).attach(model)
