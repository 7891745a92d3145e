"""The engine against a masking oracle, against itself alone and in batches, and against the unmodified model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from llava.pruning import AutoPrune, Dense, PruningMethod, Rows, Selection, get_method
from llava.pruning.selection import top_k
from tests.pruning.models import Batch, generate, masked_oracle, random_llama


@dataclass(frozen=True, kw_only=True)
class LastRowTop(PruningMethod):
    """A method as a researcher would write one: after two layers keep a share of the tokens the last row attends to."""

    share: float = 0.5

    name: ClassVar[str] = "last_row_top"

    def stages(self, num_layers):
        return {1: Rows.LAST, 3: Rows.LAST}

    def select(self, view, memory):
        keep = tuple(int(count * self.share) for count in view.counts)
        return Selection(top_k(view.relevance_BV, view.counts, keep), keep)


@dataclass(frozen=True, kw_only=True)
class MergeTail(PruningMethod):
    """After layer 2 keep the first half and append the mean of the second half at the position of its first token."""

    name: ClassVar[str] = "merge_tail"

    def stages(self, num_layers):
        return {2: Rows.NONE}

    def select(self, view, memory):
        keep = tuple(count // 2 for count in view.counts)
        scores = -torch.arange(max(view.counts)).float().expand(len(keep), -1)
        tails = [hidden[kept:count] for hidden, kept, count in zip(view.hidden_BVC, keep, view.counts, strict=True)]
        merged = torch.stack([tail.mean(0, keepdim=True) if len(tail) else torch.zeros(1, 64) for tail in tails])
        return Selection(
            top_k(scores, view.counts, keep),
            keep,
            merged,
            tuple(int(len(tail) > 0) for tail in tails),
            torch.tensor(keep)[:, None],
        )


AUTOPRUNE = AutoPrune(target_tokens=8, x0=3.0)
METHODS = {
    "autoprune": AUTOPRUNE,
    "autoprune-original": AutoPrune(target_tokens=8, x0=3.0, positions="original"),
    "autoprune-capped": AutoPrune(target_tokens=8, x0=3.0, visual_token_num=17),
    "random": get_method("random")(target_tokens=9),
    "uniform": get_method("uniform")(target_tokens=9, positions="compact"),
    "last-row": LastRowTop(),
    "fastv": get_method("fastv")(target_tokens=22),
    "dart": get_method("dart")(target_tokens=22),
    "dart-compact": get_method("dart")(target_tokens=20, layer=1, text_pivots=2, positions="compact"),
    "entropyprune": get_method("entropyprune")(target_tokens=22),
    "fastervlm": get_method("fastervlm")(target_tokens=9),
    "divprune": get_method("divprune")(target_tokens=9),
    "sparsevlm": get_method("sparsevlm")(target_tokens=20),
    "sparsevlm-original": get_method("sparsevlm")(target_tokens=20, positions="original"),
    "pdrop": get_method("pdrop")(target_tokens=16),
    "pdrop-original": get_method("pdrop")(target_tokens=16, positions="original"),
    "sparsevlm_v2": get_method("sparsevlm_v2")(target_tokens=20),
    "sparsevlm_v2-compact": get_method("sparsevlm_v2")(target_tokens=20, heads=2, positions="compact"),
    "adaptinfer": get_method("adaptinfer")(target_tokens=20),
    "adaptinfer-smooth": get_method("adaptinfer")(target_tokens=20, smoothing=0.4, positions="original"),
    "todre": get_method("todre")(target_tokens=9),
    "todre-exit": get_method("todre")(target_tokens=9, exit_layer=4),
    "todre-exit-original": get_method("todre")(target_tokens=9, exit_layer=3, positions="original"),
    "information_horizon": get_method("information_horizon")(target_tokens=30, layer=3),
    "catp": get_method("catp")(target_tokens=12),
    "catp-original": get_method("catp")(drop=0.6, layer=2, positions="original"),
    "transprune": get_method("transprune")(target_tokens=20),
    "transprune-original": get_method("transprune")(shares="0.8/0.5/0.2", positions="original"),
    "visionzip": get_method("visionzip")(target_tokens=9),
    "visionzip-original": get_method("visionzip")(target_tokens=9, positions="original"),
    "prumerge_plus": get_method("prumerge_plus")(target_tokens=9, neighbors=4),
    "hiprune": get_method("hiprune")(target_tokens=9, alpha=0.6),
    "vispruner": get_method("vispruner")(target_tokens=9),
    "autoprune_plus": get_method("autoprune_plus")(target_tokens=9, slope=0.5),
    "autoprune_plus-original": get_method("autoprune_plus")(target_tokens=12, positions="original", saliency=0.0),
    "vscan": get_method("vscan")(target_tokens=14),
    "vscan-original": get_method("vscan")(tokens="24/16/7", layers="2/4", window=3, positions="original"),
    "mmtok": get_method("mmtok")(target_tokens=9),
    "zooprune": get_method("zooprune")(target_tokens=9),
    "holov": get_method("holov")(target_tokens=9, chunks=4),
    "cdpruner": get_method("cdpruner")(target_tokens=9),
    "cdpruner-original": get_method("cdpruner")(target_tokens=9, relevance="none", positions="original"),
    "agilepruner": get_method("agilepruner")(target_tokens=9, most=0.8),
    "vflowopt": get_method("vflowopt")(target_tokens=12),
    "vflowopt-original": get_method("vflowopt")(target_tokens=12, side=2.0, positions="original"),
    "scope": get_method("scope")(target_tokens=9, positions="original"),
    "tome": get_method("tome")(target_tokens=9, inside=False),
    "tome-original": get_method("tome")(target_tokens=9, inside=False, positions="original"),
    "merge-tail": MergeTail(positions="original"),
    "dense-capped": Dense(visual_token_num=12),
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return random_llama(request.param)


@pytest.fixture(scope="module")
def sdpa_model():
    return random_llama("sdpa")


@pytest.mark.parametrize(
    "method",
    [AutoPrune(target_tokens=8, x0=3.0, positions="original", recycle_fraction=0.0), LastRowTop(), METHODS["random"]],
    ids=lambda method: method.name,
)
def test_pruned_run_equals_masking_the_dropped_tokens(model, method):
    batch = Batch(model)
    rows = range(len(batch))
    tokens, logits, traces = generate(model, method, batch.together(rows))
    for row in rows:
        kept = [identity.tolist() for identity in traces[row].kept]
        if batch.spans[row]:
            assert min(traces[row].tokens_out) < traces[row].visual_tokens
        before_decoder = kept[0] if method.name == "random" else None
        expected_tokens, expected = masked_oracle(model, batch.embeds[row], batch.spans[row], kept, 6, before_decoder)
        assert tokens[row].tolist() == expected_tokens
        torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)


def drop_before(embeds, spans, kept):
    visual = [slot for start, end in spans for slot in range(start, end)]
    dropped = set(visual) - {visual[i] for i in kept}
    return embeds[[slot for slot in range(len(embeds)) if slot not in dropped]]


def test_selection_before_the_decoder_equals_a_shorter_prompt(model):
    """In compact mode, tokens dropped before layer 0 leave exactly the prompt that never had them."""
    batch = Batch(model)
    method = get_method("random")(target_tokens=9, positions="compact")
    tokens, logits, traces = generate(model, method, batch.together([0, 1, 2]))
    for row in range(3):
        embeds = drop_before(batch.embeds[row], batch.spans[row], traces[row].kept[0].tolist())
        plain = model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert tokens[row].tolist() == plain.sequences[0].tolist()
        torch.testing.assert_close(logits[row], torch.stack(plain.logits, 1)[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_merged_tokens_equal_an_oracle_with_a_slot_for_them(model, positions):
    """MergeTail in a hand-made forward: keep the slots, put the mean into an extra one, mask the rest."""
    batch = Batch(model)
    embeds, ((start, end),) = batch.embeds[0], batch.spans[0]
    count, half, length = end - start, (end - start) // 2, len(batch.embeds[0])
    _, logits, traces = generate(model, MergeTail(positions=positions), batch.alone(0), new_tokens=1)
    assert traces[0].kept[2].tolist() == [*range(half), -1]

    decoder = model.model
    alive = torch.ones(length, dtype=torch.bool)
    hidden, position = embeds[None], torch.arange(length)
    with torch.no_grad():
        for index, layer in enumerate(decoder.layers):
            if index == 3:  # the slot of the first dropped token becomes the merged one
                hidden = hidden.clone()
                hidden[0, start + half] = hidden[0, start + half : end].mean(0)
                alive[start + half + 1 : end] = False
                if positions == "compact":
                    position = alive.cumsum(0) - 1
            allowed = (torch.ones(length, length, dtype=torch.bool).tril() & alive) | torch.eye(
                length, dtype=torch.bool
            )
            mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
            rotary = decoder.rotary_emb(hidden, position[None])
            hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
        expected = model.lm_head(decoder.norm(hidden))[0, -1]
    assert count > half
    torch.testing.assert_close(logits[0, 0], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_a_batch_equal_the_samples_alone(model, name):
    method = METHODS[name]
    batch = Batch(model)
    rows = [3, 0, 4, 1, 2]
    tokens, logits, traces = generate(model, method, batch.together(rows, tell_lengths=True))
    assert torch.equal(generate(model, method, batch.together(rows))[1], logits)  # lengths read from the mask
    for place, row in enumerate(rows):
        if name in ("random", "information_horizon") and place:
            continue  # its choice follows the running number of the sample, see test_methods
        alone_tokens, alone_logits, (alone,) = generate(model, method, batch.alone(row))
        assert traces[place].tokens_out == alone.tokens_out and traces[place].tokens_in == alone.tokens_in
        for ours, theirs in zip(traces[place].kept, alone.kept, strict=True):
            assert torch.equal(ours, theirs)
        assert tokens[place].tolist() == alone_tokens[0].tolist()
        torch.testing.assert_close(logits[place], alone_logits[0], atol=2e-4, rtol=1e-4)
        assert traces[place].flops() == alone.flops() and traces[place].kv_bytes() == alone.kv_bytes()


def test_several_images_are_pruned_together(sdpa_model):
    batch = Batch(sdpa_model)
    _, _, (trace,) = generate(sdpa_model, AUTOPRUNE, batch.alone(1))
    assert trace.visual_tokens == 50 and trace.text_tokens == 14
    assert trace.tokens_out[0] == 20
    assert trace.kept[0].min() < 30 <= trace.kept[0].max()  # survivors from both images


def test_grouped_query_attention():
    model = random_llama(kv_heads=2)
    batch = Batch(model)
    _, logits, (trace,) = generate(model, LastRowTop(), batch.alone(2))
    _, expected = masked_oracle(model, batch.embeds[2], batch.spans[2], [k.tolist() for k in trace.kept], 6)
    torch.testing.assert_close(logits[0], expected, atol=2e-4, rtol=1e-4)
    assert trace.kv_bytes() == sum(2 * (trace.text_tokens + n) * 32 * 4 for n in trace.tokens_in)


@pytest.mark.parametrize("method", [AUTOPRUNE, METHODS["last-row"], METHODS["random"]], ids=lambda m: m.name)
def test_beam_search_of_a_batch_equals_samples_alone(sdpa_model, method):
    batch = Batch(sdpa_model)
    rows = [0] if method.name == "random" else [0, 2, 1]
    tokens, _, traces = generate(sdpa_model, method, batch.together(rows), num_beams=3, num_return_sequences=2)
    assert len(traces) == len(rows)  # one per sample, not per beam
    for place, row in enumerate(rows):
        alone, _, _ = generate(sdpa_model, method, batch.alone(row), num_beams=3, num_return_sequences=2)
        assert tokens[2 * place : 2 * place + 2].tolist() == alone.tolist()


def test_beam_search_equals_beam_search_over_the_oracle(sdpa_model):
    """With one beam kept apart by scores, the best beam's log-probability is that of the masked full sequence."""
    batch = Batch(sdpa_model)
    method = LastRowTop()
    with method.attach(sdpa_model) as run, torch.no_grad():
        run.set_visual(batch.alone(0)["layout"])
        output = sdpa_model.generate(
            inputs_embeds=batch.embeds[0][None],
            attention_mask=torch.ones(1, len(batch.embeds[0]), dtype=torch.long),
            max_new_tokens=4, num_beams=3, do_sample=False, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    sequence = output.sequences[0]
    forced = torch.cat((batch.embeds[0], sdpa_model.model.embed_tokens(sequence[:-1])))
    kept = [identity.tolist() for identity in run.traces[0].kept]
    total = 0.0
    for step, token in enumerate(sequence.tolist()):
        prompt = forced[: len(batch.embeds[0]) + step]
        _, logits = masked_oracle(sdpa_model, prompt, batch.spans[0], kept, 1)
        total += logits[0].log_softmax(-1)[token].item()
    assert output.sequences_scores[0].item() == pytest.approx(total, abs=1e-3)


def test_sampling_is_reproducible_and_matches_greedy_at_low_temperature(sdpa_model):
    batch = Batch(sdpa_model)
    inputs = batch.together([0, 1])
    torch.manual_seed(5)
    first, _, _ = generate(sdpa_model, AUTOPRUNE, inputs, do_sample=True, temperature=1.3, num_return_sequences=2)
    torch.manual_seed(5)
    second, _, _ = generate(sdpa_model, AUTOPRUNE, inputs, do_sample=True, temperature=1.3, num_return_sequences=2)
    assert first.shape[0] == 4 and torch.equal(first, second)
    cold, _, _ = generate(sdpa_model, AUTOPRUNE, inputs, do_sample=True, temperature=1e-4)
    greedy, _, _ = generate(sdpa_model, AUTOPRUNE, inputs)
    assert torch.equal(cold, greedy)


def test_compact_and_original_positions_differ_only_with_gaps(sdpa_model):
    batch = Batch(sdpa_model)

    @dataclass(frozen=True, kw_only=True)
    class KeepFirst(PruningMethod):
        """Drops the front of the visual tokens or the back, in front of no text at all."""

        name: ClassVar[str] = "keep_first"

        def stages(self, num_layers):
            return {2: Rows.NONE}

        def select(self, view, memory):
            return None

    for method in (KeepFirst, LastRowTop):
        _, compact, _ = generate(sdpa_model, method(positions="compact"), batch.alone(0))
        _, original, _ = generate(sdpa_model, method(positions="original"), batch.alone(0))
        assert torch.allclose(compact, original, atol=1e-4) == (method is KeepFirst)


@pytest.mark.parametrize("use_cache", [True, False])
def test_dense_is_bit_identical_and_the_model_is_restored(model, use_cache):
    batch = Batch(model)
    inputs = batch.together([0, 1, 2])
    call = {"inputs_embeds": inputs["embeds"], "attention_mask": inputs["mask"], "use_cache": use_cache}
    with torch.no_grad():
        expected = model(**call, output_hidden_states=True)
        before = set(model.model.__dict__)
        with Dense().attach(model) as run:
            run.set_visual(inputs["layout"])
            dense = model(**call, output_hidden_states=True)
            run.set_visual(inputs["layout"])
            dense_tokens = model.generate(**{**call, "use_cache": True}, max_new_tokens=5, do_sample=False)
        with AUTOPRUNE.attach(model) as pruned_run:
            pruned_run.set_visual(inputs["layout"], inputs["cls"])
            model(**call)
        again = model(**call)
        tokens = model.generate(**{**call, "use_cache": True}, max_new_tokens=5, do_sample=False)
    assert torch.equal(dense.logits, expected.logits) and torch.equal(again.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(dense.hidden_states, expected.hidden_states, strict=True))
    assert torch.equal(dense_tokens, tokens)
    assert set(model.model.__dict__) == before
    assert not any(layer.self_attn.q_proj._forward_hooks for layer in model.model.layers)
    trace = run.traces[0]
    assert trace.tokens_in == trace.tokens_out == [48] * 6 and trace.flops() == trace.dense_flops()


def test_model_is_restored_after_an_exception(sdpa_model):
    with pytest.raises(ZeroDivisionError), AUTOPRUNE.attach(sdpa_model):
        raise ZeroDivisionError
    assert "forward" not in sdpa_model.model.__dict__ and not hasattr(sdpa_model.model, "pruning_run")


def test_attach_works_on_a_bare_decoder_without_a_cache(sdpa_model):
    batch = Batch(sdpa_model)
    inputs = batch.alone(0)
    with AUTOPRUNE.attach(sdpa_model.model) as run, torch.no_grad():

        def prefill(**kwargs):
            run.set_visual(inputs["layout"], cls_attention=inputs["cls"][0])
            return sdpa_model.model(inputs_embeds=inputs["embeds"], **kwargs)

        with_cache = prefill(use_cache=True)
        without = prefill(use_cache=False)
        (as_tuple, *_) = prefill(use_cache=True, return_dict=False)
    assert without.past_key_values is None and with_cache.past_key_values is not None
    assert torch.equal(with_cache.last_hidden_state, without.last_hidden_state)
    assert torch.equal(with_cache.last_hidden_state, as_tuple)
    lengths = [with_cache.past_key_values.get_seq_length(layer) for layer in range(6)]
    assert lengths == [11 + count for count in run.traces[0].tokens_in]


def test_options_are_not_used_up(sdpa_model):
    """The published code loses its parameters after the first call and goes on with others."""
    batch = Batch(sdpa_model)
    with AutoPrune(target_tokens=5, x0=2.0).attach(sdpa_model) as run, torch.no_grad():
        for _ in range(3):
            run.set_visual(batch.alone(0)["layout"], batch.alone(0)["cls"])
            sdpa_model(inputs_embeds=batch.embeds[0][None])
    assert run.traces[0].tokens_out == run.traces[1].tokens_out == run.traces[2].tokens_out
    assert len(run.prefill_seconds) == 3 and min(run.prefill_seconds) > 0


def test_prompt_that_ends_in_its_image(model):
    """No text behind the image: the last patch stays, asks the question, and predicts the next token."""
    batch = Batch(model, samples=((5, 40), (3, 30, 6)))
    tokens, logits, traces = generate(model, AUTOPRUNE, batch.together([0, 1]))
    alone, alone_logits, (trace,) = generate(model, AUTOPRUNE, batch.alone(0))
    assert tokens[0].tolist() == alone[0].tolist()
    torch.testing.assert_close(logits[0], alone_logits[0], atol=2e-4, rtol=1e-4)
    assert trace.tokens_out[-1] < 20 and torch.isfinite(alone_logits).all()


def test_text_only_prompts_are_untouched(sdpa_model):
    """The published code leaves layer 0 out for them, or crashes."""
    batch = Batch(sdpa_model)
    inputs = batch.alone(4)
    tokens, logits, (trace,) = generate(sdpa_model, AUTOPRUNE, inputs)
    plain, plain_logits, _ = generate(sdpa_model, Dense(), inputs)
    assert torch.equal(tokens, plain) and torch.equal(logits, plain_logits)
    assert trace.tokens_in == [0] * 6 and trace.flops() == trace.dense_flops() and trace.slope is None


def test_hidden_states_and_tuples_are_given_where_nothing_is_pruned_too(sdpa_model):
    """A text-only prompt under a pruning method, and a pruned cache continued under `dense`."""
    batch = Batch(sdpa_model)
    text, image = batch.alone(4), batch.alone(0)
    decoder = sdpa_model.model
    with AUTOPRUNE.attach(sdpa_model) as run, torch.no_grad():
        run.set_visual(text["layout"], text["cls"])
        output = decoder(inputs_embeds=text["embeds"], output_hidden_states=True)
        run.set_visual(image["layout"], image["cls"])
        cache = decoder(inputs_embeds=image["embeds"], use_cache=True).past_key_values
    expected = decoder(inputs_embeds=text["embeds"], output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected, strict=True))
    with Dense().attach(sdpa_model), torch.no_grad():
        step = decoder(input_ids=torch.tensor([[5]]), past_key_values=cache, output_hidden_states=True)
    assert len(step.hidden_states) == 7 and torch.equal(step.hidden_states[-1], step.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_close_to_float32(sdpa_model, dtype):
    batch = Batch(sdpa_model, samples=((4, 48, 7),))
    half = random_llama("sdpa").to(dtype)
    inputs = batch.alone(0)
    inputs["embeds"] = inputs["embeds"].to(dtype)
    tokens, logits, (trace,) = generate(half, AUTOPRUNE, inputs)
    _, _, (full,) = generate(sdpa_model, AUTOPRUNE, batch.alone(0))
    assert torch.isfinite(logits.float()).all() and trace.tokens_out[0] == full.tokens_out[0]
    # Information is summed in float32; what is left is the rounding of the attention logits.
    assert trace.mutual_information["layer1"] == pytest.approx(full.mutual_information["layer1"], rel=0.1)
    assert trace.kv_bytes() < full.kv_bytes()


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["autoprune", "fastv", "visionzip", "random"])
def test_positions_that_were_given_are_used(sdpa_model, name, positions):
    """Rotary embedding is relative: the same prompt numbered from 5 gives the same logits, decoded tokens too."""
    batch = Batch(sdpa_model)
    inputs = batch.together([0, 2])
    own = (inputs["mask"].cumsum(1) - 1).clamp_min(0)
    results = []
    for shift in (0, 5):
        with get_method(name)(target_tokens=12, positions=positions).attach(sdpa_model) as run, torch.no_grad():
            run.set_visual(inputs["layout"], inputs["cls"], facts=inputs["facts"])
            call = {"attention_mask": inputs["mask"], "position_ids": own + shift, "use_cache": True}
            output = sdpa_model(inputs_embeds=inputs["embeds"], **call)
            record = output.past_key_values.pruning_record
            step = sdpa_model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=output.past_key_values)
            results.append((output.logits[:, -1], step.logits[:, -1], record.next_positions_LB))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-4, rtol=1e-4)
    assert torch.equal(results[0][2] + 5, results[1][2])


def test_compact_takes_the_first_positions_that_were_given(sdpa_model):
    """Against the same prompt without the dropped tokens: its tokens have the first positions, one after another."""
    batch = Batch(sdpa_model)
    given = torch.arange(59)[None] * 2 + 3
    method = get_method("uniform")(target_tokens=9, positions="compact")
    with method.attach(sdpa_model) as run, torch.no_grad():
        run.set_visual(batch.alone(0)["layout"])
        pruned = sdpa_model(inputs_embeds=batch.embeds[0][None], position_ids=given).logits
    short = drop_before(batch.embeds[0], batch.spans[0], run.traces[0].kept[0].tolist())
    with torch.no_grad():
        expected = sdpa_model(inputs_embeds=short[None], position_ids=given[:, : len(short)]).logits
    torch.testing.assert_close(pruned, expected, atol=2e-4, rtol=1e-4)
