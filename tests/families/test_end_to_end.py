"""The whole use, with real processors: ``with method.attach(model): model.generate(**processor(...))``; pipelines."""

from __future__ import annotations

import pytest
import torch
import transformers

from llava.pruning import AutoPrune, get_method
from tests.families.models import FAMILIES, IMAGE
from tests.families.processors import chat_template, inputs_of, picture, processor

# Video-LLaVA's processor does nothing without torchvision.
NAMES = [name for name in FAMILIES if name != "video_llava"]
QUESTIONS = ["what is shown here ?", "how many red shapes are there ?", "say yes or no"]
PICTURES = [[picture(1)], [picture(2, 30, 50), picture(3, 60, 20)], []]


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    return request.param, FAMILIES[request.param].model(), processor(request.param, tmp_path_factory.mktemp("parts"))


def logits_of(model, inputs):
    output = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(output.logits, 1)


def test_everything_kept_is_dense_and_a_row_is_the_row_alone(pair):
    name, model, made = pair
    two = inputs_of(made, name, QUESTIONS[:2], PICTURES[:2])
    dense = logits_of(model, two)
    counts = (two["input_ids"] == IMAGE).sum(1).tolist()
    assert min(counts) > 8 and two["attention_mask"].min() == 0
    with AutoPrune(target_tokens=10_000).attach(model) as run:
        torch.testing.assert_close(logits_of(model, two), dense, atol=1e-4, rtol=1e-4)
    assert [trace.visual_tokens + trace.structure_tokens for trace in run.traces] == counts
    for method in (AutoPrune(target_tokens=6), get_method("hiprune")(target_tokens=6)):
        with method.attach(model) as run:
            together = logits_of(model, two)
            for row in range(2):
                alone = inputs_of(made, name, QUESTIONS[row : row + 1], PICTURES[row : row + 1])
                torch.testing.assert_close(logits_of(model, alone)[0], together[row], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(together, dense, atol=1e-3)
        assert all(trace.tokens_out[-1] < 10 for trace in run.traces)


def test_a_text_only_prompt_between(pair):
    name, model, made = pair
    text = dict(made(text=["user : say yes or no assistant :"], return_tensors="pt"))
    dense = logits_of(model, text)
    with AutoPrune(target_tokens=6).attach(model) as run:
        first = logits_of(model, inputs_of(made, name, QUESTIONS[:1], PICTURES[:1]))
        assert torch.equal(logits_of(model, text), dense)
        again = logits_of(model, inputs_of(made, name, QUESTIONS[:1], PICTURES[:1]))
    assert torch.equal(first, again)
    assert [trace.visual_tokens > 0 for trace in run.traces] == [True, False, True]


def test_pipeline(pair):
    name, model, made = pair
    made.chat_template = chat_template(name)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=made)
    message = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is shown here ?"}],
        }
    ]

    def answer():  # the pipeline writes into its arguments
        return pipe(message, generate_kwargs={"do_sample": False, "max_new_tokens": 6}, return_full_text=False)

    dense = answer()
    with AutoPrune(target_tokens=10_000).attach(model):
        assert answer() == dense
    with AutoPrune(target_tokens=6).attach(model) as run:
        answer()
    assert run.traces[0].visual_tokens > 8 > run.traces[0].tokens_out[-1]
