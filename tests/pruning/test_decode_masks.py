"""Masks of decoding steps on padded batches: right, of the form that attention expects, and cheap."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from benchmarks.launches import LaunchCounter
from llava import compat
from llava.pruning import get_method
from llava.pruning.engine import cache as cache_module
from tests.pruning.models import Batch, random_llama

STEPS = 4
ROWS = [0, 1, 2, 4]  # of different length; one without an image


def prefilled(model, inputs, positions="compact", **options):
    """The cache of a pruned prefill, and its run."""
    method = get_method("autoprune")(target_tokens=12, slope=0.2, positions=positions, **options)
    run = method.attach(model).__enter__()
    run.set_visual(inputs["layout"], inputs["cls"])
    output = model.model(inputs_embeds=inputs["embeds"], attention_mask=inputs["mask"], use_cache=True)
    return output.past_key_values, run


def steps(model, inputs, tokens, positions="compact"):
    """Logits ``[B, steps, vocab]`` of given tokens ``[B, steps]`` behind the prompt."""
    cache, run = prefilled(model, inputs, positions)
    try:
        return torch.cat([model(input_ids=step, past_key_values=cache).logits for step in tokens.split(1, dim=1)], 1)
    finally:
        run.__exit__(None, None, None)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_ragged_rows_decode_as_each_alone_without_the_mask_factory(attention, kv_heads, positions, monkeypatch):
    model = random_llama(attention, kv_heads=kv_heads)
    batch = Batch(model)
    tokens = torch.randint(1, 97, (len(ROWS), STEPS), generator=torch.Generator().manual_seed(3))
    alone = [steps(model, batch.alone(row), own[None], positions)[0] for row, own in zip(ROWS, tokens, strict=True)]
    inputs = batch.together(ROWS)
    monkeypatch.setattr(compat, "one_token_masks", lambda *_: None)
    by_factory = steps(model, inputs, tokens, positions)
    monkeypatch.undo()

    calls = []
    factory = compat.create_causal_mask
    monkeypatch.setattr(compat, "create_causal_mask", lambda **given: calls.append(given) or factory(**given))
    cache, run = prefilled(model, inputs, positions)
    assert len({layer.keys.shape[2] for layer in cache.layers}) > 3, "layers differ in width"
    calls.clear()
    own = [model(input_ids=step, past_key_values=cache).logits for step in tokens.split(1, dim=1)]
    run.__exit__(None, None, None)
    assert not calls
    torch.testing.assert_close(torch.cat(own, 1), torch.stack(alone), atol=2e-4, rtol=1e-4)
    assert torch.equal(torch.cat(own, 1), by_factory)


@torch.no_grad()
def test_a_padded_step_asks_for_what_an_unpadded_one_does(monkeypatch):
    """Operators that compute, and copies to the device; the first step makes the table."""
    model = random_llama()
    batch = Batch(model)

    def counts(inputs):
        cache, run = prefilled(model, inputs)
        found = []
        for _ in range(3):
            with LaunchCounter(torch.device("cpu")) as counter, torch.inference_mode():
                model.model(inputs_embeds=inputs["embeds"][:, -1:], past_key_values=cache)
            found.append((counter.launches_of(), sum(counter.uploads.values()), sum(counter.waits.values())))
        run.__exit__(None, None, None)
        return found

    alone, together = counts(batch.alone(0)), counts(batch.together(ROWS))
    assert alone[0] == alone[1] == alone[2] == together[1] == together[2] and alone[0][1:] == (0, 0)
    assert together[0][1:] == (1, 0) and together[0][0] - alone[0][0] < 10


@torch.no_grad()
def test_the_table_grows_with_the_cache(monkeypatch):
    model = random_llama()
    inputs = Batch(model).together(ROWS)
    tokens = torch.randint(1, 97, (len(ROWS), 6), generator=torch.Generator().manual_seed(3))
    expected = steps(model, inputs, tokens)
    made = []
    own = compat.one_token_masks
    monkeypatch.setattr(compat, "one_token_masks", lambda *given: made.append(given[1].shape[-1]) or own(*given))
    monkeypatch.setattr(cache_module, "_SPARE", 1)
    monkeypatch.setattr(cache_module, "_ALIGNED", 1)
    torch.testing.assert_close(steps(model, inputs, tokens), expected)
    assert len(made) == 3 and made == sorted(set(made)), "one table for two steps"


@torch.no_grad()
def test_several_new_tokens_and_several_rows_per_prompt():
    """A text in one piece is a text token by token; beams have the masks of their prompt."""
    model = random_llama()
    inputs = Batch(model).together(ROWS)
    tokens = torch.randint(1, 97, (len(ROWS), STEPS), generator=torch.Generator().manual_seed(3))
    one_by_one = steps(model, inputs, tokens)
    cache, run = prefilled(model, inputs)
    in_pieces = [model(input_ids=part, past_key_values=cache).logits for part in tokens.split([1, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(in_pieces, 1), one_by_one, atol=2e-4, rtol=1e-4)
    run.__exit__(None, None, None)
    cache, run = prefilled(model, inputs)
    cache.batch_repeat_interleave(2)
    twice = tokens.repeat_interleave(2, dim=0)
    doubled = [model(input_ids=step, past_key_values=cache).logits for step in twice.split(1, dim=1)]
    run.__exit__(None, None, None)
    torch.testing.assert_close(torch.cat(doubled, 1), one_by_one.repeat_interleave(2, dim=0), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(ALL_MASK_ATTENTION_FUNCTIONS))
def test_masks_are_those_of_the_factory(name):
    """For every attention implementation, without running it; of those not known here nothing is made."""
    config = random_llama().config
    config._attn_implementation = name
    real = torch.arange(20) >= torch.tensor([[3, 0, 7], [0, 1, 0]])[:, :, None]
    table = compat.one_token_masks(config, real, torch.float32)
    if name not in ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"):
        assert table is None
        return
    hidden = torch.zeros(3, 1, config.hidden_size)
    for row, keys in ((0, 20), (1, 20), (0, 12)):
        cache = compat.new_cache()
        cache.update(*torch.zeros(2, 3, 4, keys - 1, 16), 0)
        expected = compat.causal_mask(config, hidden, real[row, :, :keys], cache, 0)
        if name == "sdpa":
            expected = torch.zeros(expected.shape).masked_fill(~expected, -torch.inf)
        assert torch.equal(table[row][..., :keys], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_gpu_kernels_take_parts_of_the_table(attention, dtype, monkeypatch):
    model = random_llama(attention).to("cuda", dtype)
    inputs = Batch(model).together(ROWS)
    inputs |= {"embeds": inputs["embeds"].to("cuda", dtype), "mask": inputs["mask"].cuda()}
    tokens = torch.randint(1, 97, (len(ROWS), STEPS), generator=torch.Generator().manual_seed(3)).cuda()
    own = steps(model, inputs, tokens)
    monkeypatch.setattr(compat, "one_token_masks", lambda *_: None)
    close = {"atol": 1e-3, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(own, steps(model, inputs, tokens), **close)
