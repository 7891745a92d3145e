"""The owned loop against transformers' own decoders: it computes the same where nothing is dropped, or refuses by name.

Random decoders of transformers' classes. "The same" is prefill and several decoded tokens, alone and padded on the
left; the scores are compared with the rows of an eager attention map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers

from llava.pruning import Dense, LayerFact, PruningMethod, Rows, UnsupportedError, VisualLayout
from llava.pruning.engine.support import CHECKED_DECODERS, NEXT_LAYER_DECODERS

FULL = {"layer_types": ["full_attention"] * 4}
OWN_FIELDS = {
    "Mistral": {"sliding_window": None},
    "Starcoder2": {"sliding_window": None},
    "Gemma2": FULL,
    "Cohere2": FULL,
    "Exaone4": FULL,
    "Ministral": FULL,
}
# Decoders of vision-language models have no model of text alone: `tests/families` runs them.
CHECKED = sorted(name.removesuffix("Model") for name in CHECKED_DECODERS if "VLText" not in name)
INPUTS = {"alone": [40], "padded": [40, 33]}


@dataclass(frozen=True, kw_only=True)
class KeepAll(PruningMethod):
    """Looks at every layer and drops nothing."""

    rows_wanted: str = "none"
    facts_wanted: tuple[LayerFact, ...] = ()
    name: ClassVar[str] = "keep_all"

    def stages(self, num_layers):
        return dict.fromkeys(range(num_layers - 1), Rows(self.rows_wanted))

    def layer_facts(self, num_layers):
        return dict.fromkeys(range(num_layers - 1), self.facts_wanted)

    def select(self, view, memory):
        memory.report["facts"] = [
            memory.report.get("facts", [[]])[0]
            + [view.layer_facts | {"keys": view.of_visual(view.keys_BGND.transpose(2, 3)).transpose(2, 3)}]
        ] * len(view.counts)
        memory.report.setdefault("relevance", [[] for _ in view.counts])
        if view.relevance_BV is not None:
            for row, count in enumerate(view.counts):
                memory.report["relevance"][row].append(view.relevance_BV[row, :count])
        return None


def random_decoder(name: str, attention: str | None = None, **fields):
    """A random causal language model of that family, 4 layers; attention and outputs far from uniform."""
    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    config = kind(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation=attention or ("eager" if name == "Gemma2" else "sdpa"),
        **{**OWN_FIELDS.get(name, {}), **fields},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(8 if "q_proj" in key or "k_proj" in key or "qkv" in key else 3)
    return model


def prompts(lengths):
    """Embeddings, mask and layout: the visual tokens are 16 tokens from the fourth on."""
    width = max(lengths)
    embeds = torch.zeros(len(lengths), width, 64)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        embeds[row, width - length :] = torch.randn(length, 64, generator=torch.Generator().manual_seed(row))
        mask[row, width - length :] = 1
    return embeds, mask, VisualLayout.from_spans([[(width - n + 4, width - n + 20)] for n in lengths])


def generated(model, embeds, mask):
    output = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits, 1)


@pytest.mark.parametrize("lengths", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("name", CHECKED)
def test_nothing_dropped_is_the_stock_decoder(name, lengths):
    model = random_decoder(name)
    embeds, mask, layout = prompts(lengths)
    tokens, logits = generated(model, embeds, mask)
    assert logits.std() > 0.02
    kinds = [Rows.NONE, Rows.TEXT, Rows.LAST, *[Rows.NEXT_LAST] * (f"{name}Model" in NEXT_LAYER_DECODERS)]
    for rows in kinds if name != "Gemma2" else [Rows.NONE]:
        facts = {Rows.NONE: (LayerFact.BLOCKS, LayerFact.QUERIES), Rows.TEXT: (LayerFact.TEXT_ATTENTION,)}.get(rows, ())
        for positions in ("original", "compact"):
            with KeepAll(rows_wanted=rows.value, facts_wanted=facts, positions=positions).attach(model) as run:
                run.set_visual(layout)
                own_tokens, own_logits = generated(model, embeds, mask)
            assert torch.equal(own_tokens, tokens), (rows, positions)
            torch.testing.assert_close(own_logits, logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CHECKED)
def test_scores_are_the_rows_of_the_attention_map(name):
    """Mean over heads of what the last token pays to each visual token, in this layer and in the next one."""
    if name == "Gemma2":
        pytest.skip("scores are refused: it caps its attention logits")
    model = random_decoder(name, "eager")
    embeds, _, layout = prompts([40])
    with torch.no_grad():
        maps = model(inputs_embeds=embeds, output_attentions=True).attentions
    for rows, shift in ((Rows.LAST, 0), (Rows.NEXT_LAST, 1), (Rows.TEXT, 0), (Rows.NEXT_TEXT, 1)):
        if shift and f"{name}Model" not in NEXT_LAYER_DECODERS:
            continue
        text = rows in (Rows.TEXT, Rows.NEXT_TEXT)
        with KeepAll(rows_wanted=rows.value).attach(model) as run, torch.no_grad():
            run.set_visual(layout)
            model(inputs_embeds=embeds)
        for layer, relevance in enumerate(run.traces[0].details["relevance"]):
            expected = maps[layer + shift][0, :, 20 if text else -1 :, 4:20].mean((0, 1))
            torch.testing.assert_close(relevance, expected, atol=2e-6, rtol=1e-4)


ADDS_WITHIN = ("Exaone4", "Gemma2", "Glm4", "Olmo2", "Cohere2", "Cohere")
"""These norm what attention and MLP return before they add it, or scale it."""


@pytest.mark.parametrize("name", CHECKED)
def test_facts_of_a_layer_are_those_of_the_decoder(name):
    """Queries and keys: their softmax is the map's, within the picture. Blocks: what was added is their outputs."""
    model = random_decoder(name, "eager")
    embeds, mask, layout = prompts([40, 33])
    with torch.no_grad():
        given = {"inputs_embeds": embeds, "attention_mask": mask}
        output = model(**given, output_attentions=True, output_hidden_states=True)
    capped = name == "Gemma2"  # its scores are refused
    wanted = (LayerFact.QUERIES, LayerFact.BLOCKS, *[LayerFact.TEXT_ATTENTION] * (not capped))
    with KeepAll(rows_wanted="none" if capped else "text", facts_wanted=wanted).attach(model) as run, torch.no_grad():
        run.set_visual(layout)
        model(inputs_embeds=embeds, attention_mask=mask)
    for layer, facts in enumerate(run.traces[0].details["facts"]):
        queries, keys = facts[LayerFact.QUERIES], facts["keys"]
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scaling = model.model.layers[layer].self_attn.scaling
        logits = (queries @ keys.transpose(2, 3) * scaling).masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf)
        blocks = facts[LayerFact.BLOCKS]
        for row, (first, text) in enumerate(((4, 20), (11, 13))):
            own = output.attentions[layer][row]
            if not capped:
                inside = own[:, first : first + 16, first : first + 16]
                torch.testing.assert_close(
                    logits[row].softmax(2), inside / inside.sum(2, keepdim=True), atol=1e-5, rtol=1e-4
                )
                rows = facts[LayerFact.TEXT_ATTENTION][row]
                torch.testing.assert_close(rows[:, -text:, -text:], own[:, -text:, -text:], atol=2e-6, rtol=1e-4)
                assert not rows[:, : 20 - text].any() and not rows[:, :, : 20 - text].any()
            if name not in ADDS_WITHIN:
                added = blocks.attention_out[row] + blocks.mlp_out[row]
                before, after = output.hidden_states[layer][row], output.hidden_states[layer + 1][row]
                torch.testing.assert_close((before + added)[-33:], after[-33:], atol=1e-4, rtol=1e-4)


REFUSED = {
    "Mistral": ({"sliding_window": 16}, "MistralModel .*sliding_window=16"),
    "Phi3": ({"sliding_window": 16}, "Phi3Model .*sliding_window=16"),
    "Qwen2": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "Qwen2Model .*sliding"),
    "Gemma2": ({"layer_types": None}, "Gemma2Model .*sliding_attention"),
    "Gemma3Text": ({}, "Gemma3TextModel .*rotary table per type of layer"),
    "Granite": ({"embedding_multiplier": 3.0}, "GraniteModel .*never compared"),
    "Mixtral": ({"sliding_window": None}, "MixtralModel .*never compared"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loop_would_run_differently_is_refused_by_name(name):
    fields, message = REFUSED[name]
    model = random_decoder(name, **fields)
    with pytest.raises(UnsupportedError, match=message), KeepAll().attach(model):
        pass
    embeds, mask, layout = prompts([40])
    with torch.no_grad(), Dense().attach(model) as run:  # nothing of ours runs there
        run.set_visual(layout)
        dense = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(dense, model(inputs_embeds=embeds, attention_mask=mask).logits)
    assert run.traces[0].tokens_out == [16] * 4


def test_scores_that_the_decoder_cannot_give_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="attn_logit_softcapping"):
        KeepAll(rows_wanted="text").attach(random_decoder("Gemma2")).__enter__()
    with pytest.raises(UnsupportedError, match="Phi3Model .*layer that comes next"):
        KeepAll(rows_wanted="next_last").attach(random_decoder("Phi3")).__enter__()


def test_a_subclass_is_judged_by_the_forward_it_has():
    class Same(transformers.LlamaModel):
        """Adds nothing to the forward."""

    class Other(transformers.LlamaModel):
        def forward(self, **kwargs):
            return super().forward(**kwargs)

    config = random_decoder("Llama").config
    with KeepAll().attach(Same(config).eval()):
        pass
    with pytest.raises(UnsupportedError, match="Other .*never compared"), KeepAll().attach(Other(config).eval()):
        pass
