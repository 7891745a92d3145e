"""Exported checkpoints answer in transformers' own classes as the originals do here: ids, pixels, logits to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import llava_hf, reading
from llava.model.builder import load_pretrained_model
from llava.model.export_hf import main
from llava.model.names import llava_hf_name, translate_name
from llava.pruning import AutoPrune, Dense
from tests.conftest import ROOT
from tests.eval.helpers import fails_with_one_line
from tests.model.layouts import MISTRAL_FIELDS, NEXT_FIELDS
from tests.model.tiny import tiny_model, write_json, write_original, write_tokenizer

TRAINED = ROOT / "playground" / "tiny" / "models" / "tiny-llava-v1.5"
QUESTIONS = ROOT / "playground" / "tiny" / "data" / "eval" / "pope"
# 200 questions take minutes; LLAVA_THOROUGH asks them all.
COUNT = 200 if os.environ.get("LLAVA_THOROUGH") else 20
CLASSES = {"1.5": "LlavaForConditionalGeneration", "1.6": "LlavaNextForConditionalGeneration"}
SIZES = [(28, 28), (90, 31), (13, 60), (57, 40), (9, 9)]
PIECES = 360  # of the tests' tokenizer


def original(folder, version="1.5", rows=PIECES, form="safetensors", legacy=False, **fields):
    """A random checkpoint in the original layout, with a tokenizer."""
    if version == "1.6":
        fields = {**NEXT_FIELDS, **fields}
        model = tiny_model(
            seed=3, text={"vocab_size": rows}, mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres",
            image_grid_pinpoints=NEXT_FIELDS["image_grid_pinpoints"],
        )  # fmt: skip
    else:
        model = tiny_model(seed=3, text={"vocab_size": rows})
    write_original(folder, model, form, vocab_size=rows, tower_inside=version == "1.6", **fields)
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "legacy": legacy})
    return folder


def exported(source, folder, *flags):
    assert not main(["--model-path", str(source), "--output", str(folder), *flags])
    return folder


def picture(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def prompt_here(mode, turns):
    """LLaVA's own prompt of a conversation: texts by turns, the first one behind its images."""
    conversation = conv_templates[mode].copy()
    for number, text in enumerate([*turns, None] if len(turns) % 2 else turns):
        conversation.append_message(conversation.roles[number % 2], text)
    return conversation.get_prompt()


def messages_there(images, turns):
    return [
        {
            "role": ("user", "assistant")[number % 2],
            "content": [{"type": "image"}] * (0 if number else images) + [{"type": "text", "text": text}],
        }
        for number, text in enumerate(turns)
    ]


def folded(ids, image_id):
    """One id for a run of the placeholder's."""
    return [token for place, token in enumerate(ids) if token != image_id or ids[place - 1 : place] != [image_id]]


@torch.inference_mode()
def compare(source, folder, version="1.5", mode="vicuna_v1", sizes=SIZES):
    """Original and export, by transformers alone and by the package's loader: ids, pixels and logits."""
    tokenizer, model, processor, _ = load_pretrained_model(str(source), None, "llava", device="cpu")
    again = load_pretrained_model(str(folder), None, "llava", device="cpu")
    theirs = getattr(transformers, CLASSES[version]).from_pretrained(folder, dtype=torch.float32).eval()
    there = transformers.AutoProcessor.from_pretrained(folder)
    words = model.config.text_config.vocab_size
    image_id = theirs.config.image_token_id
    turns = ["What color is the star?\nAnswer with a word.", "red", "And how many circles?"]
    for number, size in enumerate(sizes):
        image = picture(size, number)
        own = tokenizer_image_token(prompt_here(mode, [f"<image>\n{turns[0]}", *turns[1:]]), tokenizer)
        pixels = process_images([image], processor, model.config)
        text = there.apply_chat_template(messages_there(1, turns), add_generation_prompt=True)
        inputs = there(images=[image], text=text, return_tensors="pt")
        given = folded(inputs["input_ids"][0].tolist(), image_id)
        assert given == [image_id if token < 0 else token for token in own]
        crops = pixels if isinstance(pixels, torch.Tensor) else pixels[0]
        assert torch.equal(inputs["pixel_values"].reshape(crops.shape), crops), size
        expected = model(torch.tensor([own]), images=pixels, image_sizes=[size]).logits
        assert torch.equal(theirs(**inputs).logits[..., :words], expected), size
        read = tokenizer_image_token(prompt_here(mode, [f"<image>\n{turns[0]}", *turns[1:]]), again[0])
        assert read == own
        repeated = process_images([image], again[2], again[1].config)
        logits = again[1](torch.tensor([read]), images=repeated, image_sizes=[size]).logits
        assert torch.equal(logits[..., :words], expected), size
    return theirs, there, again[1]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("version", ["1.5", "1.6"])
def test_logits_are_those_of_the_original(tmp_path, version, legacy):
    source = original(tmp_path / "a", version, legacy=legacy)
    theirs, there, _ = compare(source, exported(source, tmp_path / "b"), version)
    # 360 words and <image>, in rows of 64; what is no word is not said.
    assert theirs.config.text_config.vocab_size == 384 and theirs.config.image_token_id == PIECES
    assert theirs.generation_config.suppress_tokens == list(range(PIECES, 384))
    assert there.tokenizer.convert_ids_to_tokens(PIECES) == "<image>" and there.tokenizer.padding_side == "left"


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "square", "absent"])
def test_pictures_are_prepared_as_the_original_asks(tmp_path, image_aspect_ratio):
    source = original(tmp_path / "a", image_aspect_ratio=image_aspect_ratio)
    compare(source, exported(source, tmp_path / "b"))


def test_a_vocabulary_with_room_does_not_grow(tmp_path):
    source = original(tmp_path / "a", rows=400)
    theirs, _, again = compare(source, exported(source, tmp_path / "b"), sizes=SIZES[:2])
    assert theirs.config.text_config.vocab_size == again.config.text_config.vocab_size == 400


def test_start_and_end_tokens_around_pictures(tmp_path):
    """They are in the template, and have ids behind the words."""
    source = original(tmp_path / "a", rows=400, mm_use_im_start_end=True)
    folder = exported(source, tmp_path / "b")
    tokenizer, *_ = load_pretrained_model(str(source), None, "llava", device="cpu")
    there = transformers.AutoProcessor.from_pretrained(folder)
    text = there.apply_chat_template(messages_there(2, ["Which?"]), add_generation_prompt=True)
    marked = "<im_start><image><im_end>\n" * 2 + "Which?"
    expected = tokenizer_image_token(prompt_here("vicuna_v1", [marked]), tokenizer, there.image_token_id)
    images = [picture((28, 28)), picture((40, 20))]
    inputs = there(images=images, text=text, return_tensors="pt")
    assert folded(inputs["input_ids"][0].tolist(), there.image_token_id) == expected
    assert load_pretrained_model(str(folder), None, "llava", device="cpu")[1].config.mm_use_im_start_end


def test_mistral(tmp_path):
    source = original(tmp_path / "a", "1.6", **MISTRAL_FIELDS)
    theirs, _, _ = compare(source, exported(source, tmp_path / "b"), "1.6", "mistral_instruct", SIZES[:3])
    assert theirs.config.text_config.model_type == "mistral" and theirs.config.text_config.sliding_window is None


def test_small_square_pictures_of_1_6_take_the_shape_that_comes_first(tmp_path):
    """Two shapes are equally good for them; transformers reads the list as (height, width)."""
    pinpoints = [[28, 56], [56, 28]]
    source = original(tmp_path / "a", "1.6", image_grid_pinpoints=pinpoints)
    _, _, again = compare(source, exported(source, tmp_path / "b"), "1.6", sizes=[(20, 20), (28, 28), (60, 60)])
    assert again.config.image_grid_pinpoints == pinpoints


@pytest.mark.parametrize("form", ["safetensors-sharded", "bin", "bin-sharded"])
@pytest.mark.parametrize("version", ["1.5", "1.6"])
def test_shards_are_small_and_listed(tmp_path, monkeypatch, version, form):
    """Read in pieces too: never more than a shard, whatever the files it comes from."""
    source = original(tmp_path / "a", version, form=form)
    read, most = reading.read_weights, []

    def watched(files, translate, only=None):
        tensors = read(files, translate, only)
        if only is not None:  # not the look at names and shapes, which maps all of them and reads nothing
            most.append(sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    monkeypatch.setattr(reading, "read_weights", watched)
    made = llava_hf.export(str(source), str(tmp_path / "b"), shard_bytes=60_000)
    assert made.shards > 4 and 0 < max(most) <= 60_000
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{made.shards:05d}.safetensors" for n in range(1, made.shards + 1)]
    stored = {}
    for file in files:
        with safe_open(tmp_path / "b" / file, framework="pt") as archive:
            own = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - not a mapping
        assert all(index["weight_map"][name] == file for name in own)
        assert sum(tensor.nbytes for tensor in own.values()) <= 60_000
        assert (tmp_path / "b" / file).stat().st_mode == (tmp_path / "b" / "config.json").stat().st_mode
        stored |= own
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    compare(source, tmp_path / "b", version, sizes=SIZES[:1])


def test_a_disk_that_is_full(tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(llava_hf, "save_file", fails)
    arguments = ["--model-path", original(tmp_path / "a"), "--output", tmp_path / "b"]
    fails_with_one_line(main, arguments, capsys, "model.safetensors", "No space left")
    assert not (tmp_path / "b" / "config.json").exists()


def test_a_plan_of_shards():
    sizes = {"a": 3, "b": 3, "c": 4, "d": 20, "e": 1, "f": 9}
    assert llava_hf.shard_plan(sizes, 10) == [["a", "b", "c"], ["d"], ["e", "f"]]


def test_the_precision_stays(tmp_path):
    model = tiny_model(seed=3, text={"vocab_size": PIECES}).half()
    write_original(tmp_path / "a", model, vocab_size=PIECES)
    write_tokenizer(tmp_path / "a")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(exported(tmp_path / "a", tmp_path / "b"))
    assert theirs.dtype is torch.float16
    with safe_open(tmp_path / "b" / "model.safetensors", framework="pt") as archive:
        assert {archive.get_tensor(name).dtype for name in archive.keys()} == {torch.float16}  # noqa: SIM118


def test_names_lead_back():
    names = ["lm_head.weight", "model.image_newline", "model.multi_modal_projector.linear_2.bias"]
    names += ["model.language_model.layers.3.mlp.up_proj.weight", "model.vision_tower.encoder.layers.1.mlp.fc1.bias"]
    assert [translate_name(llava_hf_name(name)) for name in names] == names
    with pytest.raises(ValueError, match="no tensor"):
        llava_hf_name("model.other")


@pytest.mark.parametrize(
    "mode", ["vicuna_v1", "llava_v1", "llava_v0", "mistral_instruct", "llava_llama_2", "chatml_direct", "mpt"]
)
def test_chat_templates_write_the_prompts_of_the_package(mode):
    import jinja2

    template = llava_hf.chat_template(conv_templates[mode], "<image>\n")
    # As transformers compiles them.
    written = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    turns = ['What\'s "this"?\n{{ no template }}', "Two\nlines", "And then?", "No.", "  blanks "]
    for count in range(1, 6):
        for images in (0, 1, 3):
            expected = prompt_here(mode, ["<image>\n" * images + turns[0], *turns[1:count]])
            given = {"messages": messages_there(images, turns[:count]), "add_generation_prompt": count % 2 == 1}
            assert written.render(**given) == expected
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhy?"}]
    own = conv_templates[mode].copy()
    own.system = "Be brief."
    own.append_message(own.roles[0], "<image>\nWhy?")
    own.append_message(own.roles[1], None)
    assert written.render(messages=plain, add_generation_prompt=True) == own.get_prompt()


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, ["config.json", "mm_projector_type", "mlp2x_gelu"]),
        ({**NEXT_FIELDS, "mm_patch_merge_type": "flat"}, ["config.json", "mm_patch_merge_type flat", "spatial_unpad"]),
        ({"num_hidden_layers": 4}, ["missing", "layers.3"]),
        ({"model_type": "qwen2"}, ["config.json", "qwen2"]),
    ],
)
def test_what_cannot_be_exported(tmp_path, capsys, fields, parts):
    source = original(tmp_path / "a", **fields)
    arguments = ["--model-path", source, "--output", tmp_path / "b"]
    fails_with_one_line(main, arguments, capsys, *parts)
    assert not (tmp_path / "b").exists()


def test_wrong_arguments(tmp_path, capsys):
    source = original(tmp_path / "a")
    folder = exported(source, tmp_path / "b")
    given = ("--model-path", source)
    fails_with_one_line(main, [*given, "--output", folder], capsys, "--output", "already")
    fails_with_one_line(main, [*given, "--output", source / "config.json"], capsys, "--output", "config.json")
    fails_with_one_line(main, ["--model-path", folder, "--output", tmp_path / "c"], capsys, "already", "config.json")
    fails_with_one_line(main, ["--model-path", tmp_path / "no", "--output", tmp_path / "c"], capsys, "no")
    fails_with_one_line(main, [*given, "--output", tmp_path / "c", "--conv-mode", "x"], capsys, "--conv-mode", "vicuna")
    fails_with_one_line(main, [*given, "--output", tmp_path / "c", "--conv-mode", "plain"], capsys, "--conv-mode plain")
    fails_with_one_line(main, [*given], capsys, "--output")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer_config.json").unlink()
    fails_with_one_line(main, [*given, "--output", tmp_path / "c"], capsys, "tokenizer")
    assert not (tmp_path / "c").exists()


ALONE = """
import json, sys, torch, transformers
from PIL import Image
for folder in sys.argv[1:]:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (50, 30), (9, 99, 199))], text=text, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(json.dumps([type(model).__name__, new.tolist()]))
assert not any(module.startswith("llava.") for module in sys.modules)
"""


def test_transformers_needs_nothing_of_this_package(tmp_path):
    sources = [original(tmp_path / f"{version} original", version) for version in CLASSES]
    folders = [exported(source, source.parent / source.name.split()[0]) for source in sources]
    command = [sys.executable, "-c", ALONE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    image, expected = Image.new("RGB", (50, 30), (9, 99, 199)), []
    prompt = prompt_here("vicuna_v1", ["<image>\nWhat color is it?"])
    for source, name in zip(sources, CLASSES.values(), strict=True):
        tokenizer, model, processor, _ = load_pretrained_model(str(source), None, "llava", device="cpu")
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        pixels = process_images([image], processor, model.config)
        output = model.generate(ids, images=pixels, image_sizes=[image.size], max_new_tokens=6, do_sample=False)
        expected.append([name, output[0].tolist()])
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return exported(TRAINED, tmp_path_factory.mktemp("exported") / "tiny-llava-1.5-hf")


@pytest.mark.skipif(not QUESTIONS.is_dir(), reason="the miniature benchmarks are not made")
@pytest.mark.parametrize("method", [Dense(), AutoPrune(target_tokens=64)], ids=lambda method: method.name)
def test_the_trained_model_answers_as_the_original(trained, method):
    tokenizer, model, processor, _ = load_pretrained_model(str(TRAINED), None, "llava", device="cpu")
    again = load_pretrained_model(str(trained), None, "llava", device="cpu")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(trained, dtype=torch.float32).eval()
    there = transformers.AutoProcessor.from_pretrained(trained)
    lines = (QUESTIONS / "llava_pope_test.jsonl").read_text().splitlines()
    # An odd stride: questions with yes and no for an answer take turns in the file.
    questions = [json.loads(line) for line in lines[:: max(len(lines) // COUNT - 1, 1) | 1]][:COUNT]
    assert len(questions) == COUNT
    options, said = {"max_new_tokens": 8, "do_sample": False}, set()
    for question in questions:
        image = Image.open(next(QUESTIONS.rglob(question["image"]))).convert("RGB")
        prompt = prompt_here("vicuna_v1", [f"<image>\n{question['text']}"])
        answers, kept = [], []
        for words, own, pictures in ((tokenizer, model, processor), (again[0], again[1], again[2])):
            ids = tokenizer_image_token(prompt, words, return_tensors="pt")[None]
            with torch.inference_mode(), method.attach(own) as run:
                output = own.generate(ids, images=process_images([image], pictures, own.config), **options)
            answers.append(words.batch_decode(output, skip_special_tokens=True)[0].strip())
            kept.append([layer.tolist() for layer in run.traces[0].kept])
        text = there.apply_chat_template(messages_there(1, [question["text"]]), add_generation_prompt=True)
        inputs = there(images=[image], text=text, return_tensors="pt")
        with torch.inference_mode(), method.attach(theirs) as run:
            output = theirs.generate(**inputs, **options)
        answers.append(there.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        kept.append([layer.tolist() for layer in run.traces[0].kept])
        assert answers[0] == answers[1] == answers[2] and answers[0], question["question_id"]
        assert kept[0] == kept[1] == kept[2]
        said.add(answers[0])
    assert len(said) > 1
