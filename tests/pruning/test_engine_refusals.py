"""What the engine refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

from llava.pruning import AutoPrune, Dense, VisualLayout
from tests.pruning.models import Batch, random_llama

METHOD = AutoPrune(target_tokens=8, x0=3.0)


def test_right_padding_and_holes_are_refused():
    model = random_llama()
    batch = Batch(model)
    inputs = batch.together([0, 2])
    with METHOD.attach(model) as run:
        run.set_visual(inputs["layout"], inputs["cls"])
        with pytest.raises(ValueError, match="left padding only"):
            model(inputs_embeds=inputs["embeds"], attention_mask=inputs["mask"].flip(1))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda m, b: m(inputs_embeds=b.embeds[0][None]), "set_visual"),
        (lambda m, b: visual(m, b, 2) or m(inputs_embeds=b.embeds[0][None].expand(3, -1, -1)), "layout has 2 rows"),
        (lambda m, b: visual(m, b) or m(inputs_embeds=b.embeds[0][None, :20]), "one piece"),
        (lambda m, b: visual(m, b) or m(inputs_embeds=b.embeds[0][None], output_attentions=True), "output_attentions"),
        (lambda m, b: visual(m, b) or m.train()(inputs_embeds=b.embeds[0][None]), "inference"),
        (
            lambda m, b: (
                visual(m, b)
                or m.generate(inputs_embeds=b.embeds[0][None], max_new_tokens=2, cache_implementation="static")
            ),
            "DynamicCache",
        ),
        (lambda m, b: m.model.pruning_run.set_visual(VisualLayout.from_spans([[(4, 52)]])), "cls_attention"),
        (lambda m, b: m.model.pruning_run.set_visual(VisualLayout.from_spans([[(4, 52)]]), torch.rand(7)), "7"),
        (lambda m, b: METHOD.attach(m).__enter__(), "already attached"),
    ],
)
def test_what_cannot_work_is_refused(misuse, message):
    model = random_llama()
    with pytest.raises((ValueError, RuntimeError), match=message), METHOD.attach(model):
        misuse(model, Batch(model))


def visual(model, batch, rows: int = 1) -> None:
    inputs = batch.alone(0)
    layout = inputs["layout"].expand(rows)
    model.model.pruning_run.set_visual(layout, inputs["cls"] * rows)


def test_chunked_prefill_is_refused():
    model = random_llama()
    model.generation_config.prefill_chunk_size = 16
    with pytest.raises(ValueError, match="prefill_chunk_size"), METHOD.attach(model):
        pass
    with Dense().attach(model):
        pass


def test_a_decoder_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Llama-like"):
        METHOD.attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("spans", [[[(3, 3)]], [[(5, 9), (8, 12)]], [[(-1, 4)]], [[(5, 9), (1, 3)]]])
def test_impossible_spans_are_refused(spans):
    with pytest.raises(ValueError, match="row 0"):
        VisualLayout.from_spans(spans)
