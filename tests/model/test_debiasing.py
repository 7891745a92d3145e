"""Attention debiasing from pixels to traces, and its files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import padding_share
from llava.pruning import OptionError, UnsupportedError, VisualLayout, build_method, get_method
from llava.pruning.debiasing import weights_at
from llava.pruning.methods import sparsevlm
from llava.pruning.selection import top_k
from llava.pruning.types import Selection
from llava.utils import UserError
from tests.model.tiny import GRID, PATCHES, tiny_images, tiny_model
from tests.pruning import naive
from tests.pruning.models import random_llama

I = IMAGE_TOKEN_INDEX  # noqa: E741
# Bands of a third and a sixth: of 4 rows of patches the shares are 1, 1/3, 1/3, 1 and 2/3, 0, 0, 2/3.
SIZES = [(60, 20), (60, 40), (28, 28)]
REAL = [range(4, 12), range(4, 12), range(16)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=7)


@torch.no_grad()
def traces(model, method, rows=(0, 1, 2), **more):
    ids = torch.tensor([[1, 5, I, 6, 7, 8]] * len(rows))
    with method.attach(model) as run:
        inputs = {"images": tiny_images(3, seed=3)[list(rows)], "image_sizes": [SIZES[row] for row in rows], **more}
        model.generate(ids, max_new_tokens=1, eos_token_id=None, pad_token_id=0, do_sample=False, **inputs)
    return run.traces


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (61, 40), (7, 7), (1000, 1)])
def test_share_of_padding_counts_pixels(size):
    """Of a square that is a hundred times finer."""
    fine, side = 100, max(size)
    wide = (np.arange(GRID * fine) + 0.5) / (GRID * fine) * side
    inside = [np.abs(wide - side / 2) < length / 2 for length in reversed(size)]
    picture = (inside[0][:, None] & inside[1][None]).reshape(GRID, fine, GRID, fine)
    expected = 1 - picture.mean((1, 3))
    np.testing.assert_allclose(padding_share(size, GRID).numpy(), expected, atol=0.011)


def test_padding_is_dropped_first_and_lowers_the_budget_of_fastv(model):
    plain = traces(model, get_method("fastv")(layer=1, ratio=0.0))
    for keep in (4, 12):
        method = get_method("fastv")(layer=1, ratio=1 - keep / PATCHES, debias_padding=0.5)
        for row, (trace, real) in enumerate(zip(traces(model, method), REAL, strict=True)):
            assert set(trace.kept[1].tolist()) <= set(real)
            assert len(trace.kept[1]) == min(keep, len(real))
            (alone,) = traces(model, method, [row])
            assert alone.kept[1].tolist() == trace.kept[1].tolist()
    assert [trace.tokens_out[-1] for trace in plain] == [PATCHES] * 3


def test_pyramiddrop_keeps_its_budget(model):
    """Its threshold takes every patch with any padding; what is left over is filled up, the first patches first."""
    method = get_method("pdrop")(layers="1", ratio=0.25, debias_padding=0.01)
    first, second, _ = traces(model, method)
    assert first.kept[0].tolist() == [0, 1, 2, 3]  # all patches have some padding
    assert len(second.kept[0]) == 4 and set(second.kept[0].tolist()) <= set(REAL[1])


def test_a_mask_that_is_given_is_the_padding(model):
    mask = torch.ones(GRID, GRID, dtype=torch.bool)
    mask[2, 1:3] = False
    method = get_method("fastv")(layer=1, ratio=0.5, debias_padding=0.5)
    (trace,) = traces(model, method, [0], image_masks=[mask])
    assert trace.kept[0].tolist() == [9, 10]


def test_a_curve_is_stretched_over_the_prompt():
    curve = torch.tensor([1.0, 0.5, 0.25, 0.125])
    origins = torch.tensor([[0, 1, 2, 3, -1], [0, 3, 6, -1, 5]])
    got = weights_at(curve, origins, (4, 7))
    expected = np.interp([0, 1.5, 3, 2.5], range(4), curve)
    torch.testing.assert_close(got[0], torch.tensor([1.0, 0.5, 0.25, 0.125, 1.0]))
    torch.testing.assert_close(got[1], torch.tensor([*expected[:3], 1.0, expected[3]]).float())


def test_a_curve_changes_the_first_cut_only(model, tmp_path):
    path = tmp_path / "curve.txt"
    path.write_text("".join(f"{weight}\n" for weight in [0.0] * 8 + [1.0] * 8))
    for name in ("fastv", "pdrop", "sparsevlm"):
        method = build_method(name, {"debias_curve": str(path), "target_tokens": "9"})
        for trace in traces(model, method):
            cut = next(kept for kept in trace.kept if len(kept) < PATCHES)
            patches = [patch for patch in cut.tolist() if patch >= 0]
            best = [patch for patch in patches if patch >= 8]
            assert len(best) == min(len(patches), 8)


def test_sparsevlm_recycles_by_attention_as_it_is(monkeypatch, tmp_path):
    path, count = tmp_path / "curve.npy", 40
    curve = np.linspace(1, 0.1, count)
    np.save(path, curve)
    attention = torch.rand(1, 1, 1, count, generator=torch.Generator().manual_seed(0))
    seen = []
    monkeypatch.setattr(sparsevlm, "keep_and_recycle", lambda view, scores, *rest: seen.append(scores))
    view = SimpleNamespace(
        layer=2, num_layers=32, counts=(count,), prompt_counts=(count,), device=torch.device("cpu"),
        attention_BHTV=attention, origins_BV=torch.arange(count)[None],
    )  # fmt: skip
    view.best = lambda values, keep: Selection(top_k(values, view.counts, keep), keep)
    memory = SimpleNamespace(raters=torch.ones(1, 1), keep=[(10, 5, 1)], report={})
    get_method("sparsevlm")(debias_curve=str(path)).select(view, memory)
    raw = attention.flatten().tolist()
    best = naive.ranked([a * w for a, w in zip(raw, curve, strict=True)])[:10]
    order = seen[0][0].sort(descending=True, stable=True).indices.tolist()
    assert order[:10] == sorted(best)
    assert order[10:] == naive.ranked(raw, [i for i in range(count) if i not in best])


def test_what_is_refused(model, tmp_path):
    path = tmp_path / "curve.txt"
    with pytest.raises(OptionError, match="curve.txt cannot be read"):
        get_method("fastv")(debias_curve=str(path))
    path.write_text("one\ntwo\n")
    with pytest.raises(OptionError, match="curve.txt cannot be read as numbers"):
        get_method("pdrop")(debias_curve=str(path))
    path.write_text("1\n-1\n")
    with pytest.raises(OptionError, match="none of them negative"):
        get_method("sparsevlm")(debias_curve=str(path))
    with pytest.raises(OptionError, match="debias_padding must lie in 0..1"):
        get_method("fastv")(debias_padding=1.0)
    method = build_method("tome+fastv", {"tome.target_tokens": 9, "layer": 1, "debias_padding": "0.5"})
    with pytest.raises(UserError, match="have no padding"):
        traces(model, method)
    decoder = random_llama()
    with get_method("fastv")(debias_padding=0.5).attach(decoder) as run, pytest.raises(ValueError, match="'padding'"):
        run.set_visual(VisualLayout.from_spans([[(2, 9)]]))


def test_families_that_do_not_pad_say_so():
    from tests.families.models import FAMILIES

    for tiny in FAMILIES.values():
        with pytest.raises(UnsupportedError, match="debias_padding needs to know how pictures were padded"):
            get_method("fastv")(debias_padding=0.5).attach(tiny.model()).__enter__()


def test_records_of_runs_without_it_stay_equal():
    for name in ("fastv", "pdrop", "sparsevlm"):
        assert not [key for key in get_method(name)().settings() if key.startswith("debias")]
    assert get_method("fastv")(debias_padding=0.5).settings()["debias_padding"] == 0.5
