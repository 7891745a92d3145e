"""The methods in the guide are working ones."""

from __future__ import annotations

import re
import runpy

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.pruning import AutoPrune, OptionError, retention_schedule
from tests.conftest import ROOT
from tests.model.tiny import PATCHES, tiny_images, tiny_model
from tests.pruning.models import Batch, generate, random_llama


@pytest.fixture
def guide(tmp_path):
    """Classes of the guide by name, each from its text alone."""
    text = (ROOT / "docs" / "adding_a_method.md").read_text()
    scope = {}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        file = tmp_path / f"method_{number}.py"
        file.write_text(code)
        scope |= runpy.run_path(str(file))
    return scope


def test_method_inside_the_decoder(guide):
    model = random_llama()
    _, _, traces = generate(model, guide["LastToken"](target_tokens=11), Batch(model).together([0, 1]))
    for trace in traces:
        assert trace.tokens_out[0] == trace.visual_tokens and trace.tokens_out[1:] == [11] * 5


def test_method_in_front_of_the_projector(guide):
    model = tiny_model(seed=7)
    ids, images = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6]] * 2), tiny_images(2)
    with guide["LongKeys"](target_tokens=6).attach(model) as run, torch.no_grad():
        inputs = model.prepare_multimodal_inputs(ids, images)
        model(ids, images)
    tower = model.model.vision_tower
    with torch.no_grad():
        states = tower(images, output_hidden_states=True).hidden_states
        layer = tower.encoder.layers[0]
        lengths = layer.self_attn.k_proj(layer.layer_norm1(states[0]))[:, 1:].norm(dim=2)
        for row, trace in enumerate(run.traces):
            kept = sorted(lengths[row].topk(5).indices.tolist())
            assert trace.kept[0].tolist() == [*kept, -1] and trace.visual_tokens == PATCHES
            rest = [i for i in range(PATCHES) if i not in kept]
            features = states[-2][row, 1:]
            expected = model.model.multi_modal_projector(torch.cat((features[kept], features[rest].mean(0)[None])))
            torch.testing.assert_close(inputs.inputs_embeds[row, 1:7], expected, atol=1e-4, rtol=1e-4)


def test_the_same_method_on_a_bare_decoder(guide):
    model = random_llama()
    inputs = Batch(model).together([0, 1])
    _, _, traces = generate(model, guide["LongKeys"](target_tokens=9), inputs)
    kept = sorted(inputs["facts"]["keys"][0].norm(dim=1).topk(8).indices.tolist())
    assert traces[0].kept[0].tolist() == [*kept, -1] and traces[1].tokens_in == [9] * 6


def test_curve_of_the_guide(guide):
    """The line's proportions, scaled to the budget by the same rules as the published curve."""
    planned, method = guide["planned"], guide["method"]
    assert method.curve == "straight" and sum(planned) / 32 == pytest.approx(64, abs=1)
    assert planned[1] / planned[10] == pytest.approx((1 - 0.2 / 14.9) / (1 - 2 / 14.9), rel=0.06)
    model = random_llama()
    inputs = Batch(model).alone(0)
    options = {"target_tokens": 12, "x0": 3.0, "slope": 0.6}
    _, _, (trace,) = generate(model, AutoPrune(**options, curve="straight"), inputs)
    assert trace.tokens_out == retention_schedule(6, 48, 12, 0.6, x0=3.0, curve="straight")
    _, _, (published,) = generate(model, AutoPrune(**options), inputs)
    assert trace.tokens_out != published.tokens_out
    with pytest.raises(OptionError, match="curve must be one of .*logistic.*, got 'bent'"):
        AutoPrune(curve="bent")
