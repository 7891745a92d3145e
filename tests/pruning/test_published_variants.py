"""Where the authors' code does something else than its paper, or than this project's other choice: both ways."""

from __future__ import annotations

import pytest
import torch

from llava.pruning import OptionError, VisualLayout, get_method, recycling
from llava.pruning.selection import density_peaks
from tests.pruning import naive
from tests.pruning.models import Batch, generate, random_llama


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.mark.parametrize(
    ("name", "depth", "layers", "expected"),
    [
        ("sparsevlm", 32, None, (2, 6, 15)),
        ("sparsevlm", 40, None, (2, 6, 15)),
        ("sparsevlm_v2", 40, None, (2, 6, 15)),
        ("sparsevlm", 40, "scaled", (3, 8, 19)),
        ("sparsevlm_v2", 40, "scaled", (3, 8, 19)),
        ("sparsevlm", 16, None, (2, 6, 15)),
        ("sparsevlm", 12, None, (0, 2, 5)),
        ("sparsevlm", 12, "scaled", (0, 2, 5)),
        ("adaptinfer", 40, None, (1, 13, 25)),
        ("adaptinfer", 40, "1/10/20", (1, 10, 20)),
    ],
)
def test_published_layers_at_every_depth_that_has_them(name, depth, layers, expected):
    assert get_method(name)(layers=layers).cut_layers(depth) == expected


def test_layers_are_numbers_or_scaled():
    with pytest.raises(OptionError, match="or 'scaled'"):
        get_method("sparsevlm")(layers="relative")


@pytest.mark.parametrize("name", ["sparsevlm", "autoprune"])
def test_noise_of_the_published_clustering(model, name, monkeypatch):
    """By seed and sample, not by chance or batch; none unless asked for."""
    batch, seen = Batch(model), []
    plain = recycling.density_peaks
    monkeypatch.setattr(recycling, "density_peaks", lambda *given: (seen.append(given[3]), plain(*given))[1])
    options = {"target_tokens": 14, **({"layers": "1/3"} if name == "sparsevlm" else {"coarse_cut": False})}
    drawn = {}
    for seed in (None, 0, 1):
        method = get_method(name)(**options, noise_seed=seed)
        assert getattr(method, "capturable", False) == (name == "autoprune" and seed is None)
        together = generate(model, method, batch.together([0, 2]), new_tokens=1)[1]
        batched = seen.copy()
        seen.clear()
        alone = generate(model, method, batch.alone(0), new_tokens=1)[1]
        torch.testing.assert_close(together[0], alone[0], atol=2e-4, rtol=1e-4)
        assert seen and (seed is None) == (seen[0] is None)
        if seed is not None:
            drawn[seed] = seen[0][0]
            assert torch.equal(batched[0][0, : len(seen[0][0])], seen[0][0])
            assert (0 <= seen[0]).all() and (seen[0] < 1).all() and len(set(seen[0][0].tolist())) > 5
        seen.clear()
    assert not torch.equal(drawn[0], drawn[1])


def test_noise_parts_the_pair_that_ties():
    """Of the two closest tokens one becomes the other's parent, so the second center is another token."""
    tokens = torch.tensor([[0.0], [1.0], [1.1], [2.5]])[None]
    assert density_peaks(tokens, [2], [4]).centers_BK[0].tolist() == [1, 2]
    noise = torch.tensor([[0.5, 0.9, 0.1, 0.5]])
    assert density_peaks(tokens, [2], [4], noise).centers_BK[0].tolist() == [1, 0]


def crops_of(batch: Batch, row: int) -> tuple[dict, list[list[int]]]:
    """A row whose first image of 48 tokens has three crops, interleaved like rows of tiles; and the crops' tokens."""
    labels = [0] * 16 + [1 + i // 4 % 2 for i in range(32)]
    prompt = batch.alone(row)
    layout = VisualLayout.from_spans([batch.spans[row]], crops=[[labels]])
    return {**prompt, "layout": layout}, [[i for i in range(48) if labels[i] == crop] for crop in range(3)]


@pytest.mark.parametrize("target", [1, 5, 12, 30, 47])
def test_fastervlm_keeps_of_each_crop_or_lets_crops_compete(model, target):
    batch = Batch(model)
    prompt, crops = crops_of(batch, 0)
    cls = batch.cls[0]
    _, _, (trace,) = generate(model, get_method("fastervlm")(target_tokens=target), prompt, new_tokens=1)
    # Each a third of the budget; what is left over goes to the first crops.
    shares = [target // 3 + (crop < target % 3) for crop in range(3)]
    expected = [i for crop, share in zip(crops, shares, strict=True) for i in naive.ranked(cls, crop)[:share]]
    assert trace.kept[0].tolist() == sorted(expected)
    method = get_method("fastervlm")(target_tokens=target, across_crops=True)
    _, _, (trace,) = generate(model, method, prompt, new_tokens=1)
    assert trace.kept[0].tolist() == sorted(naive.ranked(cls)[:target])


def test_images_of_a_prompt_are_crops_to_fastervlm_whatever_the_batch(model):
    batch = Batch(model)
    method, cls = get_method("fastervlm")(target_tokens=10), batch.cls[1]
    together = generate(model, method, batch.together([0, 4, 1]), new_tokens=1)[2]
    (alone,) = generate(model, method, batch.alone(1), new_tokens=1)[2]
    expected = sorted(naive.ranked(cls, range(30))[:6] + naive.ranked(cls, range(30, 50))[:4])
    assert together[2].kept[0].tolist() == alone.kept[0].tolist() == expected
    assert together[0].kept[0].tolist() == sorted(naive.ranked(batch.cls[0])[:10])


def test_fastervlm_behind_a_cap_and_behind_another_method(model):
    """Crops that have less left than their share leave it to the others: the budget is met."""
    prompt, _ = crops_of(Batch(model), 0)
    for name, options in (
        ("fastervlm", {"visual_token_num": 20, "target_tokens": 19}),
        ("random+fastervlm", {"random.target_tokens": 21, "target_tokens": 20}),
        ("vispruner+fastervlm", {"vispruner.target_tokens": 24, "target_tokens": 10}),
    ):
        _, _, (trace,) = generate(model, get_method(name).from_options(options), prompt, new_tokens=1)
        assert trace.tokens_out == [options["target_tokens"]] * 6
