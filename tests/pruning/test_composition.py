"""Several methods in one run: compositions and schedules."""

from __future__ import annotations

import pytest
import torch

from llava.pruning import OptionError, get_method
from tests.pruning.models import Batch, generate, random_llama


@pytest.fixture(scope="module")
def model():
    return random_llama()


def compose(name: str, **options):
    return get_method(name).from_options(options)


def test_options_of_the_parts():
    method = compose("divprune+autoprune", **{"divprune.target_tokens": "30", "target_tokens": "8", "x0": "3"})
    first, last = method.parts
    assert (first.name, first.target_tokens) == ("divprune", 30)
    assert (last.name, last.target_tokens, last.x0) == ("autoprune", 8, 3.0)
    assert method.name == "divprune+autoprune" and method.positions == "compact" and method.aim_of(576) == 8
    assert compose("divprune+fastv", **{"divprune.target_tokens": 9, "fastv.layer": "3"}).parts[1].layer == 3
    both = compose("divprune+fastv", **{"divprune.target_tokens": 9, "budget": "processed", "visual_token_num": "20"})
    assert [part.budget for part in both.parts] == ["processed"] * 2 and both.visual_token_num == 20


@pytest.mark.parametrize("name", ["divprune+autoprune", "visionzip+autoprune", "random+divprune+fastv"])
def test_rows_of_a_batch_equal_the_samples_alone(model, name):
    options = {f"{part}.target_tokens": 30 - 5 * i for i, part in enumerate(name.split("+")[:-1])}
    method = compose(name, target_tokens=12 if "fastv" in name else 6, **options)
    batch = Batch(model)
    tokens, logits, traces = generate(model, method, batch.together([0, 3, 4, 1]))
    for place, row in enumerate([0, 3, 4, 1]):
        if "random" in name and place:
            continue
        alone_tokens, alone_logits, (alone,) = generate(model, method, batch.alone(row))
        assert [k.tolist() for k in traces[place].kept] == [k.tolist() for k in alone.kept]
        assert tokens[place].tolist() == alone_tokens[0].tolist()
        torch.testing.assert_close(logits[place], alone_logits[0], atol=2e-4, rtol=1e-4)
    counts = [traces[0].visual_tokens, traces[0].tokens_in[0]]
    assert counts == [48, 30 - 5 * (len(name.split("+")) - 2)]
    assert traces[0].target_tokens == method.parts[-1].target_tokens


def test_the_second_method_works_on_what_the_first_left(model):
    """DivPrune, then AutoPrune, is AutoPrune on the shorter prompt (both number positions anew)."""
    batch = Batch(model)
    _, logits, (trace,) = generate(
        model, compose("divprune+autoprune", **{"divprune.target_tokens": 20, "target_tokens": 6}), batch.alone(0)
    )
    _, _, (first,) = generate(model, get_method("divprune")(target_tokens=20), batch.alone(0), new_tokens=1)
    kept = first.kept[0]
    short = Batch(model, samples=((4, 20, 7),))
    short.embeds[0] = torch.cat((batch.embeds[0][:4], batch.embeds[0][4:52][kept], batch.embeds[0][52:]))
    short.cls[0] = batch.cls[0][kept]
    _, expected, (second,) = generate(model, get_method("autoprune")(target_tokens=6), short.alone(0))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert trace.tokens_out == second.tokens_out and trace.slope == second.slope
    assert (trace.visual_tokens, second.visual_tokens) == (48, 20)
    for ours, theirs in zip(trace.kept, second.kept, strict=True):
        assert ours.tolist() == [-1 if i < 0 else kept[i].item() for i in theirs.tolist()]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("divprune+autoprune", {}, r"give the budget of divprune too, as divprune.target_tokens=... or divprune.targ"),
        ("divprune+autoprune", {"divprune.x0": 3}, "no option 'divprune.x0'; valid options: target_tokens"),
        ("divprune+divprune", {}, "a method may take part once"),
        ("dense+fastv", {}, "dense prunes nothing"),
        ("divprune+nothing", {}, "unknown pruning method 'nothing'"),
        ("divprune+visionzip", {"divprune.target_tokens": 9}, "visionzip works in front of the decoder and must come"),
        ("fastv+autoprune", {"fastv.target_tokens": 9}, "two methods select after layer 1"),
        ("2:fastv", {}, "'2:fastv' must be LAYER:METHOD:SHARE"),
        ("2:fastv:1.5", {}, "'2:fastv:1.5' must be"),
        ("3:fastv:0.5;2:random:0.5", {}, "layers must rise, got 2 after 3"),
        ("3:autoprune:0.5", {}, "autoprune cannot choose"),
        ("0:fastv:0.5", {}, "fastv needs attention"),
        ("0:dart:0.5", {}, "dart needs facts of a layer"),
        ("9:fastv:0.5", {}, "not below the 6 of the decoder"),
    ],
)
def test_nonsense_is_refused(model, name, options, message):
    with pytest.raises(OptionError, match=message):
        compose(name, **options).attach(model)


def test_schedule(model):
    batch = Batch(model)
    method = compose("0:divprune:0.75;2:fastv:0.5;4:random:0.5", positions="original")
    _, _, traces = generate(model, method, batch.together([0, 1]))
    assert traces[0].tokens_in == [36, 36, 18, 18, 9, 9] and traces[0].budget_error is None
    assert traces[1].tokens_in == [38, 38, 19, 19, 10, 10]
    _, _, (alone,) = generate(model, method, batch.alone(0))
    assert [k.tolist() for k in alone.kept] == [k.tolist() for k in traces[0].kept]
    # A schedule of one entry is that method with its ratio.
    _, ours, _ = generate(model, compose("2:fastv:0.5"), batch.alone(0))
    _, theirs, _ = generate(model, get_method("fastv")(layer=2, ratio=0.5), batch.alone(0))
    assert torch.equal(ours, theirs)


def test_schedule_that_needs_cls_attention(model):
    batch = Batch(model)
    _, _, (trace,) = generate(model, compose("3:fastervlm:0.25"), batch.alone(0), new_tokens=1)
    assert trace.kept[2].tolist() == sorted(batch.cls[0].topk(12).indices.tolist())
