"""Every registered method in every situation: what a sample gives alone is what it gives in a batch.

A new method needs no line here: the table reads the registry. Kernels, position modes, left padding, rows of different
make-up, several images, beams, crops with and without unpadding. Budgets per image: tests/pruning/test_views.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.pruning import get_method, list_methods
from tests.model.tiny import IMAGE_SIDE, PATCHES, tiny_images, tiny_model

I = IMAGE_TOKEN_INDEX  # noqa: E741
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TARGET = 6
# Options where the defaults are meant for other sizes than 3 layers and 16 patches.
OPTIONS = {
    "autoprune": {"x0": 1.5},
    "dart": {"layer": 1, "target_tokens": 12},
    "dense": {"target_tokens": None},
    "fastv": {"layer": 1, "ratio": 0.5},
    "entropyprune": {"layer": 1, "ratio": 0.5},
    "todre": {"exit_layer": 2},
    "divprune+information_horizon": {"divprune.target_tokens": 9},
    "visionzip+autoprune": {"visionzip.target_tokens": 12, "x0": 1.5},
    "divprune+fastv": {"divprune.target_tokens": 12, "layer": 1},
}
METHODS = [
    *list_methods(),
    "visionzip+autoprune",
    "divprune+fastv",
    "divprune+information_horizon",
    "0:uniform:0.75;1:fastv:0.5;2:random:0.5",
]


def method(name: str, **options):
    return get_method(name).from_options({"target_tokens": TARGET, **OPTIONS.get(name, {}), **options})


@dataclass(frozen=True)
class Prompts:
    """Rows of one batch and the images in them."""

    rows: list[list[int]]
    images: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    stack: bool  # images as one tensor: no crops

    def call(self, rows: list[int]) -> dict:
        """Arguments of generate for some of the rows, padded on the left."""
        chosen = [self.rows[row] for row in rows]
        firsts = [sum(row.count(I) for row in self.rows[:row]) for row in rows]
        own = [first + i for first, row in zip(firsts, chosen, strict=True) for i in range(row.count(I))]
        width = max(map(len, chosen))
        images = [self.images[i] for i in own]
        return {
            "inputs": torch.tensor([[0] * (width - len(row)) + row for row in chosen]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chosen]),
            "images": (torch.stack(images) if self.stack else images) if images else None,
            "image_sizes": [self.sizes[i] for i in own] if images else None,
        }


PLAIN = Prompts(
    [[1, 5, I, 6, I, 7], [1, 4, 3], [1, 9, 12, I, 13, 14, 15, 16, 17], [1, 8, I]],
    list(tiny_images(4, seed=3)),
    [(28, 28), (90, 30), (28, 60), (40, 40)],
    True,
)
CROPS = Prompts(
    [[1, 5, I, 6, 7], [1, 9, I, 12, I, 13, 14]],
    [tiny_images(3, seed=1), tiny_images(5, seed=2), tiny_images(3, seed=3)],
    [(60, 20), (50, 40), (20, 50)],
    False,
)


@pytest.fixture(scope="module")
def models():
    grids = [[IMAGE_SIDE * w, IMAGE_SIDE * h] for w, h in ((1, 2), (2, 1), (2, 2))]
    crops = {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": grids, "image_aspect_ratio": "anyres"}
    return {
        "sdpa": tiny_model(seed=7),
        "eager": tiny_model(seed=7, attn_implementation="eager"),
        "crops": tiny_model(seed=7, **crops),
    }


def check(model, pruning, prompts: Prompts, **generation):
    """A batch and its rows alone, under one run each so that seeded methods count the samples alike."""
    rows = range(len(prompts.rows))
    with pruning.attach(model) as run:
        together = model.generate(**prompts.call(list(rows)), max_new_tokens=3, **GREEDY, **generation)
        batch = list(run.traces)
    with pruning.attach(model) as run:
        alone = [model.generate(**prompts.call([row]), max_new_tokens=3, **GREEDY, **generation)[0] for row in rows]
    for row in rows:
        one, other = batch[row], run.traces[row]
        assert together[row].tolist() == alone[row].tolist()
        assert one.tokens_in == other.tokens_in and one.tokens_out == other.tokens_out
        assert [k.tolist() for k in one.kept] == [k.tolist() for k in other.kept]
        assert one.flops() == other.flops() and one.visual_tokens == other.visual_tokens
        # The last token of a prompt that ends in its image counts as text, whichever patch or merged token it is.
        patches_of_prompt = one.visual_tokens + (prompts.rows[row][-1] == I)
        before = None
        for kept in one.kept:
            patches = [i for i in kept.tolist() if i >= 0]
            assert len(set(patches)) == len(patches) and all(i < patches_of_prompt for i in patches)
            assert before is None or set(patches) <= before
            before = set(patches)
    return batch


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_batches(models, name, kernel, positions):
    traces = check(models[kernel], method(name, positions=positions), PLAIN)
    assert [trace.visual_tokens for trace in traces[:3]] == [2 * PATCHES, 0, PATCHES]
    assert all(trace.tokens_out[-1] < trace.visual_tokens for trace in traces[:1]) == (name != "dense")


@pytest.mark.parametrize("name", METHODS)
def test_budgets_counted_alike(models, name):
    """Where a method says that the way of counting changes nothing, it does not, and elsewhere it does."""
    if name.startswith("0:"):
        return  # a schedule has no budget
    found = []
    for budget in ("nominal", "processed"):
        pruning = method(name, budget=budget)
        with pruning.attach(models["sdpa"]) as run:
            models["sdpa"].generate(**PLAIN.call([0, 2]), max_new_tokens=1, **GREEDY)
        found.append([trace.tokens_out for trace in run.traces])
    assert (found[0] == found[1]) == method(name).counts_alike


@pytest.mark.parametrize("name", METHODS)
def test_beams(models, name):
    check(models["sdpa"], method(name), PLAIN, num_beams=2)


@pytest.mark.parametrize("merge_type", ["spatial", "spatial_unpad"])
@pytest.mark.parametrize("name", METHODS)
def test_crops(models, name, merge_type):
    model = models["crops"]
    model.set_patch_merge_type(merge_type)
    try:
        traces = check(model, method(name), CROPS)
    finally:
        model.set_patch_merge_type(None)
    # Tokens merged inside the tower are never unpadded.
    unpadded = merge_type == "spatial_unpad" and not method(name).merges_in_tower
    assert all((trace.structure_tokens > 0) == unpadded for trace in traces)
    assert [trace.visual_tokens == crops * PATCHES for trace, crops in zip(traces, (3, 8), strict=True)] == [
        not unpadded
    ] * 2


@pytest.mark.parametrize("kernel", ["sdpa", "crops"])
@pytest.mark.parametrize("name", ["divprune", "random", "todre", "catp", "visionzip", "scope", "vscan", "vflowopt"])
def test_markers(models, name, kernel):
    """Runs of dropped tokens, each with a marker: in every row as many as it has alone, more tokens than without."""
    prompts, marked, plain = CROPS if kernel == "crops" else PLAIN, method(name, pospad=True), method(name)
    counts = []
    for pruning in (marked, plain):
        counts.append([trace.tokens_in[0] for trace in check(models[kernel], pruning, prompts)])
    assert all(a > b or a == b == 0 for a, b in zip(*counts, strict=True))


@pytest.mark.parametrize("kernel", ["sdpa", "crops"])
@pytest.mark.parametrize("name", list_methods())
def test_a_budget_of_all_tokens_changes_nothing(models, name, kernel):
    model, prompts = models[kernel], CROPS if kernel == "crops" else PLAIN
    cuts = ("target_tokens", "ratio", "exit_layer")
    options = {key: value for key, value in OPTIONS.get(name, {}).items() if key not in cuts}
    whole = get_method(name).from_options({**options, **({} if name == "dense" else {"target_ratio": 1.0})})
    found = {}
    model.set_patch_merge_type("spatial")  # what is pruned is not unpadded
    for pruning in (get_method("dense").from_options({}), whole):
        with pruning.attach(model) as run:
            arguments = prompts.call(list(range(len(prompts.rows))))
            output = model.generate(
                **arguments, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, **GREEDY
            )
        found[pruning.name] = torch.stack(output.logits, 1)
        assert all(set(trace.tokens_out) == {trace.visual_tokens} for trace in run.traces)
    model.set_patch_merge_type(None)
    torch.testing.assert_close(found[whole.name], found["dense"], atol=1e-4, rtol=1e-4)
