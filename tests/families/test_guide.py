"""The family in the guide is a working one, and the documents name every family."""

from __future__ import annotations

import re
import runpy

import pytest
import torch
import transformers

from llava.families import registry
from llava.pruning import AutoPrune, UnsupportedError, get_method
from tests.conftest import ROOT
from tests.families.models import _TEXT, IMAGE, _clip, _patches, _sharpened


@pytest.fixture
def vip_llava(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", registry._FAMILIES)  # forgotten afterwards
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_family.md").read_text(), re.DOTALL)
    file = tmp_path / "family.py"
    file.write_text(code)
    runpy.run_path(str(file))
    torch.manual_seed(0)
    config = transformers.VipLlavaConfig(
        vision_config=_clip(), text_config={"model_type": "llama", **_TEXT}, image_token_index=IMAGE,
        vision_feature_layers=[-2, 2], vision_feature_layer=[-2, 2], image_seq_length=36,
    )  # fmt: skip
    return _sharpened(transformers.VipLlavaForConditionalGeneration(config))


def test_the_family_of_the_guide(vip_llava):
    assert "vipllava" in registry.list_families()
    ids, pixels = _patches(36)(1)
    inputs = {"input_ids": torch.tensor([[3, 4, *ids, 5, 6, 7]]), **pixels}
    with torch.no_grad():
        dense = vip_llava(**inputs).logits
        for method in (AutoPrune(target_tokens=10_000), get_method("visionzip")(target_tokens=10_000)):
            with method.attach(vip_llava) as run:
                torch.testing.assert_close(vip_llava(**inputs).logits, dense, atol=1e-4, rtol=1e-4)
            assert run.traces[0].visual_tokens == 36
        states = vip_llava.model.vision_tower(pixels["pixel_values"], output_hidden_states=True).hidden_states
        layer = vip_llava.model.vision_tower.encoder.layers[2]  # the deepest whose output is used
        attention = layer.self_attn
        normed = layer.layer_norm1(states[2])
        query, key = (
            project(normed).unflatten(-1, (2, 8)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj)
        )
        cls = torch.softmax(query[:, :, :1] @ key.transpose(2, 3) * 8**-0.5, -1)[0, :, 0, 1:].mean(0)
        with get_method("fastervlm")(target_tokens=9).attach(vip_llava) as run:
            vip_llava(**inputs)
    assert run.traces[0].kept[0].tolist() == sorted(cls.topk(9).indices.tolist())


def test_without_it_the_class_is_unknown():
    config = transformers.VipLlavaConfig(
        vision_config=_clip(), text_config={"model_type": "llama", **_TEXT}, image_token_index=IMAGE
    )
    model = transformers.VipLlavaForConditionalGeneration(config).eval()
    with AutoPrune(target_tokens=8).attach(model), pytest.raises((RuntimeError, UnsupportedError), match="set_visual"):
        model(input_ids=torch.tensor([[3, 4, 5]]))


def test_documents_name_every_family():
    names = {"qwen2_5_vl": "Qwen2.5-VL", "qwen2_vl": "Qwen2-VL", "qwen3_vl": "Qwen3-VL"}
    for document in ("README.md", "docs/use_it_on_your_model.md"):
        text = (ROOT / document).read_text().lower()
        for name in registry.list_families():
            assert names.get(name, name.replace("_", "")).lower() in text, (document, name)
