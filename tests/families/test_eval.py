"""The evaluation tools on folders of other families: answers are those of the model and its processor used directly."""

from __future__ import annotations

import json

import pytest
import torch

from llava.eval.answering.family import family_folder, load_processor
from llava.eval.common.paths import meta_path
from llava.eval.model_vqa_loader import main
from llava.pruning import AutoPrune, Dense
from tests.families.models import FAMILIES
from tests.families.processors import chat_template, picture, processor, save

QUESTIONS = ["what is shown here ?", "how many red shapes are there ?", "say yes or no", "what is blue ?"]
NAMES = ["llava_onevision", "internvl", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    """A checkpoint with everything a user has on disk, and a question file; the third question has no image."""
    name, place = request.param, tmp_path_factory.mktemp("checkpoint")
    made = processor(name, tmp_path_factory.mktemp("parts"))
    made.chat_template = chat_template(name)
    FAMILIES[name].model().save_pretrained(place)
    save(made, place)
    lines = []
    for number, text in enumerate(QUESTIONS):
        line = {"question_id": number, "text": text, "image": f"{number}.png"}
        picture(number, 30 + 9 * number, 40).save(place / f"{number}.png")
        if number == 2:
            del line["image"]
        lines.append(json.dumps(line))
    (place / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return name, place


def answers(place, file, *flags):
    arguments = ["--model-path", place, "--image-folder", place, "--question-file", place / "questions.jsonl"]
    arguments += ["--answers-file", place / file, "--max_new_tokens", 6, "--temperature", 0, "--device", "cpu", *flags]
    assert not main([str(argument) for argument in arguments])
    lines = [json.loads(line) for line in (place / file).read_text().splitlines()]
    return [line["text"] for line in lines], json.loads(meta_path(place / file).read_text())


def directly(name, place, method):
    model, made = FAMILIES[name].model(), load_processor(str(place))
    texts = []
    for number, question in enumerate(QUESTIONS):
        images = [] if number == 2 else [picture(number, 30 + 9 * number, 40)]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        prompt = made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = made(text=[prompt], **({"images": [images]} if images else {}), return_tensors="pt")
        with method.attach(model), torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        texts.append(made.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def test_answers_are_those_of_direct_use(folder):
    name, place = folder
    assert family_folder(str(place)) == name
    dense, metadata = answers(place, "dense.jsonl", "--method", "dense", "--batch-size", 3)
    assert metadata["family"] == name and metadata["complete"] and metadata["tokens"]["visual"] > 8
    assert dense == directly(name, place, Dense())
    pruned, metadata = answers(place, "pruned.jsonl", "--target-token-num", 6, "--batch-size", 3)
    assert pruned == directly(name, place, AutoPrune(target_tokens=6))
    assert metadata["tokens"]["nominal"] == pytest.approx(6, abs=3)
    alone, _ = answers(place, "alone.jsonl", "--target-token-num", 6, "--batch-size", 1)
    assert alone == pruned


def test_kept_traces_say_where_all_tokens_lie(folder):
    """The rasters of a trace are as many tokens as the model really had, whatever the picture's shape."""
    name, place = folder
    answers(place, "v.jsonl", "--target-ratio", 0.5, "--trace-file", place / "v.trace.jsonl", "--trace-kept")
    lines = [json.loads(line) for line in (place / "v.trace.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        if number == 2:
            assert line["visual_tokens"] == 0 and "rasters" not in line
            continue
        grids = [raster["grid"] for raster in line["rasters"]]
        assert sum(rows * columns for rows, columns in grids) == line["visual_tokens"]
        assert [raster["image"] for raster in line["rasters"]] == [0] * len(line["rasters"])
