"""Attention rows against the full maps of eager attention, and the traps of the stock library around them."""

from __future__ import annotations

import pytest
import torch

from llava import compat
from llava.pruning import AutoPrune, PruningMethod, Rows, scores
from llava.pruning.methods.autoprune.curve import tokens_to_keep
from llava.pruning.recycling import prune_step
from llava.pruning.scores import attention_rows, received_attention
from llava.pruning.selection import top_k
from tests.pruning.models import Batch, random_llama


class Spy(PruningMethod):
    """Keeps everything and remembers what it was shown."""

    name = "spy"
    seen: dict = {}

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "seen", {})

    def stages(self, num_layers):
        return dict.fromkeys(range(num_layers), self.rows)

    def select(self, view, memory):
        self.seen[view.layer] = view
        return None


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_equal_the_full_maps(attention, kv_heads):
    model = random_llama(attention, kv_heads=kv_heads)
    reference = random_llama("eager", kv_heads=kv_heads)
    batch = Batch(model)
    rows = [0, 1, 3]
    inputs = batch.together(rows)
    spy = Spy(Rows.TEXT)
    with spy.attach(model) as run, torch.no_grad():
        run.set_visual(inputs["layout"])
        model(inputs_embeds=inputs["embeds"], attention_mask=inputs["mask"])
    for place, row in enumerate(rows):
        alone = batch.alone(row)
        with torch.no_grad():
            maps = reference(inputs_embeds=alone["embeds"], output_attentions=True).attentions
        visual = [slot for start, end in batch.spans[row] for slot in range(start, end)]
        text = slice(batch.spans[row][-1][1], None)
        for layer, view in spy.seen.items():
            expected = maps[layer][0][:, text][:, :, visual]
            count = expected.shape[1]
            ours = view.attention_BHTV[place]
            assert view.query_rows[place] == count
            torch.testing.assert_close(ours[:, -count:, : len(visual)], expected, atol=2e-5, rtol=1e-3)
            assert ours[:, :-count].abs().sum() == 0 and ours[:, :, len(visual) :].abs().sum() == 0
            torch.testing.assert_close(
                view.relevance_BV[place, : len(visual)], expected.mean((0, 1)), atol=2e-5, rtol=1e-3
            )


def test_last_row_is_the_last_text_row():
    model = random_llama()
    batch = Batch(model)
    views = {}
    for rows in (Rows.TEXT, Rows.LAST):
        spy = Spy(rows)
        with spy.attach(model) as run, torch.no_grad():
            run.set_visual(batch.alone(0)["layout"])
            model(inputs_embeds=batch.alone(0)["embeds"])
        views[rows] = spy.seen
    for layer in views[Rows.LAST]:
        torch.testing.assert_close(
            views[Rows.LAST][layer].attention_BHTV, views[Rows.TEXT][layer].attention_BHTV[:, :, -1:]
        )


def test_ranking_goldens(golden):
    """Who is kept at a share of the retention curve, from full recorded maps."""
    facts, arrays = golden("pure_functions")
    for name, fact in facts["attn_postprocess_rank"].items():
        attention = torch.from_numpy(arrays[f"{name}/attn"]).float()[None]
        start, count = fact["v_start"], fact["v_token_num"]
        block = attention[:, :, start + count :, start : start + count]
        assert block.shape[2] == fact["n_text"]
        relevance = received_attention(block)
        recorded = torch.from_numpy(arrays[f"{name}/relation"])
        torch.testing.assert_close(relevance[0], recorded.flatten(), atol=1e-6, rtol=1e-4)
        step = prune_step(count, tokens_to_keep(fact["image_shape"], fact["keep_percent"]))
        assert step.keep == fact["n_kept"]
        kept = top_k(relevance, [count], [step.keep])[0].tolist()
        assert kept == arrays[f"{name}/mask"].flatten().nonzero()[0].tolist()


def test_large_score_matrices_in_pieces(monkeypatch):
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 11, 8)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    whole = attention_rows(query, key, 8**-0.5, mask)
    monkeypatch.setattr(scores, "_ONE_PIECE", 10)
    torch.testing.assert_close(attention_rows(query, key, 8**-0.5, mask), whole, atol=0, rtol=0)


def test_rows_are_probabilities_in_float32():
    query, key = torch.randn(2, 4, 3, 8).bfloat16(), torch.randn(2, 2, 11, 8).bfloat16()
    rows = attention_rows(query, key, 8**-0.5)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 3))
    double = attention_rows(query.float(), key.float(), 8**-0.5)
    torch.testing.assert_close(rows, double, atol=1e-6, rtol=1e-5)
    large = attention_rows(query.half() * 500, key.half() * 500, 8**-0.5)  # unscaled products overflow float16
    assert torch.isfinite(large).all()
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attention_rows(query, torch.randn(2, 3, 11, 8).bfloat16(), 1.0)


def test_no_full_attention_map_is_computed(monkeypatch):
    """Only text rows are ever scored: the largest probability tensor has T rows, not N."""
    model = random_llama()
    batch = Batch(model)
    sizes = []
    original = torch.softmax

    def watch(logits, dim, *args, **kwargs):
        sizes.append(logits.shape[-2])
        return original(logits, dim, *args, **kwargs)

    monkeypatch.setattr(torch, "softmax", watch)
    with AutoPrune(target_tokens=8).attach(model) as run, torch.no_grad():
        run.set_visual(batch.alone(0)["layout"], batch.alone(0)["cls"])
        model(inputs_embeds=batch.alone(0)["embeds"])
    assert sizes and max(sizes) == 7  # the text tokens of sample 0


def test_layers_get_no_position_ids():
    """Flash attention would read positions with gaps as several packed sequences (transformers 5)."""
    model = random_llama()
    batch = Batch(model)
    given = []
    handles = [
        layer.register_forward_pre_hook(lambda m, a, kw: given.append(kw["position_ids"]), with_kwargs=True)
        for layer in model.model.layers
    ]
    with AutoPrune(target_tokens=8, positions="original").attach(model) as run, torch.no_grad():
        run.set_visual(batch.alone(0)["layout"], batch.alone(0)["cls"])
        model.generate(inputs_embeds=batch.alone(0)["embeds"], max_new_tokens=3, do_sample=False)
    for handle in handles:
        handle.remove()
    assert len(given) == 3 * 6 and not any(ids is not None for ids in given)


def test_a_mask_is_sized_by_its_own_layer():
    """Without the layer index, transformers sizes every mask by layer 0 of the cache."""
    model = random_llama()
    cache = compat.new_cache()
    for layer, length in enumerate((9, 5)):
        cache.update(torch.zeros(2, 4, length, 16), torch.zeros(2, 4, length, 16), layer)
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, :2] = False
    mask = compat.causal_mask(model.config, torch.zeros(2, 1, 64), padding, cache, 1)
    assert mask.shape[-1] == 6
    stock = compat.create_causal_mask(model.config, torch.zeros(2, 1, 64), padding, cache)
    assert stock.shape[-1] == 10


def test_unpadded_prefill_needs_no_mask_on_sdpa_but_one_on_eager():
    hidden = torch.zeros(1, 7, 64)
    assert compat.causal_mask(random_llama("sdpa").config, hidden, None) is None
    assert compat.causal_mask(random_llama("eager").config, hidden, None) is not None
