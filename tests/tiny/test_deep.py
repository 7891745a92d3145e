"""The deep decoder: grown without a change, trained by a forward pass that is transformers' own, resumed whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from playground.tiny.train import crowd, deep, export, extend, guidance, packing
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.muon import BatchedMuon
from playground.tiny.train.vision import normalize, run_tower


@pytest.fixture(scope="module")
def shallow() -> TinyLlava:
    return export.load()


@pytest.fixture(scope="module")
def batch() -> crowd.Batch:
    return crowd.draw_batch(np.random.default_rng(5), 2, (extend.mixture(), crowd.crowd_mixture()), crowded=0.6)


@torch.no_grad()
def logits(model: TinyLlava, batch: crowd.Batch) -> torch.Tensor:
    pixels, _, data = batch
    pictures = model.projector(run_tower(model.tower, normalize(pixels))[0])
    hidden = model.decoder.model(
        inputs_embeds=packing.embed(model.decoder, data, pictures),
        attention_mask=data.mask,
        position_ids=data.positions,
        use_cache=False,
    ).last_hidden_state
    return model.decoder.lm_head(hidden.flatten(0, 1)[data.where])


def test_new_layers_change_nothing(shallow: TinyLlava, batch: crowd.Batch) -> None:
    grown = deep.start(shallow, None)
    assert len(grown.decoder.model.layers) == 32
    want, got = logits(shallow, batch), logits(grown, batch)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    with torch.no_grad():
        grown.decoder.model.layers[15].mlp.down_proj.weight.add_(0.05)
    assert (logits(grown, batch) - want).abs().max() > 0.1, "a layer that does something is noticed"


def test_the_forward_pass_of_training_is_that_of_transformers(shallow: TinyLlava, batch: crowd.Batch) -> None:
    model = deep.start(shallow, None)
    pixels, _, data = batch
    with torch.no_grad():
        pictures = model.projector(run_tower(model.tower, normalize(pixels))[0])
    losses, gradients = [], []
    for run in (
        lambda: deep.Runner(torch.float32, compiled=False)(model.decoder, data, pictures),
        lambda: guidance.forward(model.decoder, data, pictures, deep.WATCH, 0.1, deep.OPTIONS),
    ):
        model.zero_grad()
        loss, right = run()
        loss.backward()
        losses.append((loss.detach(), right))
        gradients.append(model.decoder.model.layers[14].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert torch.equal(losses[0][1], losses[1][1])


def test_batched_muon_is_that_of_torch() -> None:
    torch.manual_seed(1)
    shapes = ((8, 8), (8, 8), (20, 8), (8, 20), (20, 8))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    pair = BatchedMuon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.01)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=1e-3)  # both iterate in bf16


def test_a_batch_has_one_shape_and_points_at_what_it_asks_about(batch: crowd.Batch) -> None:
    pixels, labels, data = batch
    prefix, tail = crowd.room()
    assert data.ids.shape == (2, prefix + tail) and data.prefix == prefix
    assert pixels.dtype == torch.uint8 and labels.shape == (2, 6, 576)
    assert (data.rows % (prefix + tail) >= prefix).all()
    assert (data.visual[:, prefix:] == -1).all()
    shown = (labels[:, 0] > 0) | (labels[:, 2] > 0)
    for marks in (data.asked, data.named, data.whole):
        assert marks.any()
    rows = data.rows // (prefix + tail)
    for row, mark in zip(rows.tolist(), data.asked, strict=True):
        places = data.visual[row][mark]
        assert (places >= 0).all() and shown[row][places].float().mean() > 0.95 if mark.any() else True


def test_a_run_goes_on_where_it_stopped(shallow: TinyLlava, tmp_path, monkeypatch) -> None:
    """Weights, momentum, time spent and steps are those that were left; the weights alone can be taken at any time."""
    monkeypatch.setattr(deep, "LAYERS", 12)
    monkeypatch.setattr(deep, "PLACES", tuple(range(12)))
    monkeypatch.setattr(deep, "WATCH", (2, 4, 6, 8))
    monkeypatch.setattr(deep, "OPTIONS", (1, 6, 9))
    model = TinyLlava(12)
    kwargs = {"minutes": 1000.0, "batch": 1, "stop_after": 1e-9, "precise": True}
    deep.train_deep(model, tmp_path, **{**kwargs, "stop_after": 0.5})
    state = torch.load(tmp_path / deep.STATE)
    assert state["step"] >= 1 and state["spent"] > 0
    other = TinyLlava(12)
    deep.train_deep(other, tmp_path, **kwargs)
    again = torch.load(tmp_path / deep.STATE)
    assert again["step"] == state["step"] and again["spent"] >= state["spent"]
    for name, value in state["model"].items():
        assert torch.equal(again["model"][name], value), name
    for old, new in zip(state["optimizers"][0]["buffers"], again["optimizers"][0]["buffers"], strict=True):
        assert torch.equal(old, new) and old.abs().max() > 0
    taken = torch.load(tmp_path / deep.WEIGHTS)["model"]
    assert all(torch.equal(taken[k].float(), v.half().float()) for k, v in state["model"].items())
