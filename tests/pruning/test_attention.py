"""What a scored layer computes is what transformers computes, and its modules are afterwards as they were."""

from __future__ import annotations

import pytest
import torch

from llava import compat
from llava.pruning import AutoPrune, Rows
from tests.pruning.models import Batch, random_llama
from tests.pruning.test_scores import Spy


def configurations(model) -> list:
    return [layer.self_attn.config for layer in model.model.layers]


@pytest.mark.parametrize("rows", [Rows.TEXT, Rows.LAST])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scored_layers_compute_what_transformers_computes(attention, kv_heads, rows):
    """Rows that were scored take their output from the scores: alone, and padded beside others."""
    model = random_llama(attention, kv_heads=kv_heads)
    batch = Batch(model)
    for inputs in (batch.alone(0), batch.together([0, 1, 3])):
        with torch.no_grad():
            dense = model.model(inputs_embeds=inputs["embeds"], attention_mask=inputs["mask"]).last_hidden_state
            with Spy(rows).attach(model) as run:
                run.set_visual(inputs["layout"])
                ours = model.model(inputs_embeds=inputs["embeds"], attention_mask=inputs["mask"]).last_hidden_state
        real = torch.ones(ours.shape[:2], dtype=torch.bool) if inputs["mask"] is None else inputs["mask"].bool()
        torch.testing.assert_close(ours[real], dense[real], atol=2e-5, rtol=1e-4)


def test_half_precision_stays_half_precision():
    model = random_llama().bfloat16()
    inputs = Batch(model).alone(0)
    with torch.no_grad(), Spy(Rows.TEXT).attach(model) as run:
        run.set_visual(inputs["layout"])
        output = model.model(inputs_embeds=inputs["embeds"].bfloat16())
    assert output.last_hidden_state.dtype == torch.bfloat16
    assert all(layer.keys.dtype == torch.bfloat16 for layer in output.past_key_values.layers)


def test_modules_get_their_configuration_back(monkeypatch):
    model = random_llama()
    own = configurations(model)
    inputs = Batch(model).alone(0)
    with torch.no_grad(), AutoPrune(target_tokens=8).attach(model) as run:
        run.set_visual(inputs["layout"], inputs["cls"])
        model(inputs_embeds=inputs["embeds"])
        assert all(a is b for a, b in zip(configurations(model), own, strict=True))
        broken = model.model.layers[3].mlp
        monkeypatch.setattr(broken, "forward", lambda *args: 1 / 0)
        run.set_visual(inputs["layout"], inputs["cls"])
        with pytest.raises(ZeroDivisionError):
            model(inputs_embeds=inputs["embeds"])
    assert all(a is b for a, b in zip(configurations(model), own, strict=True))
    assert {config._attn_implementation for config in own} == {"sdpa"}


def test_a_layer_with_an_attention_of_its_own_is_told(monkeypatch):
    """Scores would be silently missing otherwise."""
    model = random_llama()
    inputs = Batch(model).alone(0)
    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with torch.no_grad(), AutoPrune(target_tokens=8).attach(model) as run:
        run.set_visual(inputs["layout"], inputs["cls"])
        with pytest.raises(RuntimeError, match="did not ask transformers for its attention function"):
            model(inputs_embeds=inputs["embeds"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_tables_and_masks_are_made_once_where_only_the_length_changes(attention, rope_type, monkeypatch):
    """Renumbered tokens of static rotary tables share the first ones; dynamic tables depend on the length."""
    model = random_llama(attention)
    monkeypatch.setattr(model.model.rotary_emb, "rope_type", rope_type)
    assert compat.rotary_is_static(model.model.rotary_emb) == (rope_type == "default")
    monkeypatch.setattr(model.model.rotary_emb, "original_max_seq_len", 4096, raising=False)
    inputs = Batch(model).alone(0)
    shapes, masks, make = [], [], compat.causal_mask
    watch = model.model.rotary_emb.register_forward_hook(lambda _, args, out: shapes.append(out[0].shape[1]))
    monkeypatch.setattr(compat, "causal_mask", lambda *args: masks.append(args[1].shape[1]) or make(*args))
    method = AutoPrune(target_tokens=16, x0=3.0)
    with torch.no_grad(), method.attach(model) as run:
        run.set_visual(inputs["layout"], inputs["cls"])
        model(inputs_embeds=inputs["embeds"])
        first = inputs["embeds"].shape[1]
        text = first - run.traces[0].visual_tokens
        widths = list(dict.fromkeys(text + count for count in run.traces[0].tokens_in))
    watch.remove()
    assert len(widths) > 3 and widths[0] == first
    assert shapes == masks
    assert list(dict.fromkeys(shapes)) == ([first] if rope_type == "default" else widths)
    assert rope_type == "dynamic" or len(shapes) == 1
