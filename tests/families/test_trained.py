"""The small trained LLaVA in transformers' own class answers as in the package's, dense and pruned."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image

from benchmarks.whole_model import transformers_own
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import build_prompt
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import AutoPrune, Dense, get_method
from tests.conftest import ROOT

MODEL = ROOT / "playground" / "tiny" / "models" / "tiny-llava-v1.5"
DATA = ROOT / "playground" / "tiny" / "data" / "eval" / "pope"
# 200 questions take two minutes; LLAVA_THOROUGH asks them all.
COUNT = 200 if os.environ.get("LLAVA_THOROUGH") else 8
METHODS = [Dense(), AutoPrune(target_tokens=64), get_method("fastv")(target_tokens=128)]


@pytest.fixture(scope="module")
def both():
    tokenizer, model, image_processor, _ = load_pretrained_model(str(MODEL), None, "llava-v1.5", device="cpu")
    own = transformers_own(model)
    own.config.image_token_id = own.config.text_config.vocab_size - 1  # no prompt has it
    return tokenizer, model, own, image_processor


@pytest.mark.skipif(not DATA.is_dir(), reason="the miniature benchmarks are not made")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_answers_are_those_of_the_packages_own_class(both, method):
    tokenizer, model, own, image_processor = both
    lines = (DATA / "llava_pope_test.jsonl").read_text().splitlines()
    # An odd stride: questions with yes and no for an answer take turns in the file.
    questions = [json.loads(line) for line in lines[:: max(len(lines) // COUNT - 1, 1) | 1]][:COUNT]
    assert len(questions) == COUNT
    yes = 0
    for question in questions:
        image = Image.open(next(DATA.rglob(question["image"]))).convert("RGB")
        pixels = process_images([image], image_processor, model.config)
        prompt = build_prompt(question["text"], 1, "vicuna_v1", False)
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        place = ids[0].tolist().index(IMAGE_TOKEN_INDEX)
        placeholders = torch.full((1, 576), own.config.image_token_id)
        expanded = torch.cat((ids[:, :place], placeholders, ids[:, place + 1 :]), dim=1)
        options = {"max_new_tokens": 8, "do_sample": False}
        with torch.inference_mode():
            with method.attach(model) as run:
                expected = model.generate(ids, images=pixels, **options)
            with method.attach(own) as own_run:
                output = own.generate(input_ids=expanded, pixel_values=pixels, **options)
        assert torch.equal(output[0, expanded.shape[1] :], expected[0]), question["question_id"]
        assert own_run.traces[0].tokens_out == run.traces[0].tokens_out
        for layer, kept in enumerate(run.traces[0].kept):
            assert torch.equal(own_run.traces[0].kept[layer], kept)
        yes += tokenizer.decode(expected[0], skip_special_tokens=True).strip().lower().startswith("y")
    assert 0 < yes < COUNT
