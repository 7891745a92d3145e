"""The trained checkpoint: size, layout, tokenizer, and that training saw exactly the ids that evaluation feeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from playground.tiny.build import benchmarks as make_benchmarks
from playground.tiny.build.short import build_vqav2
from playground.tiny.train import export, packing, text
from playground.tiny.train.vision import SELECTED, normalize, run_tower
from playground.tiny.world.questions import KINDS, sample_questions
from playground.tiny.world.scenes import pad_square, render, sample_scene
from tests.tiny.prompts import of_vlmevalkit

FOLDER = text.CHECKPOINT


@pytest.fixture(scope="module")
def parts() -> export.TinyLlava:
    return export.load()


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(str(FOLDER), None, FOLDER.name, device="cpu", torch_dtype=torch.float32)


def test_at_most_25_megabytes() -> None:
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 25e6


def test_layout_is_that_of_llava_1_5() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["model_type"] == "llava"
    assert config["num_hidden_layers"] >= 12 and config["image_aspect_ratio"] == "pad"
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(n).get_dtype() for n in names} == {"F16"}
    tower = "model.vision_tower.vision_tower.vision_model."
    assert {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        tower + "pre_layrnorm.weight",
        tower + "embeddings.class_embedding",
        "model.layers.11.self_attn.q_proj.weight",
    } <= names


def test_the_real_loader_finds_every_weight(parts: export.TinyLlava, loaded) -> None:
    """`export.load` is strict; the model loader must give the same logits with its own translation of names."""
    tokenizer, model, processor, context = loaded
    assert context == 2048
    scene = sample_scene(np.random.default_rng(1), 5, 6, held_out=False)
    question = sample_questions(scene, np.random.default_rng(1), 1)[0]
    ids = tokenizer_image_token(text.prompt(question.text), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    pixels = normalize(pad_square(render(scene))[None])
    with torch.inference_mode():
        logits = model(input_ids=ids, images=[pixels[0]], image_sizes=[(192, 192)]).logits
        features, _, _ = run_tower(parts.tower, pixels)
        tail = tuple(ids[0, ids[0].tolist().index(IMAGE_TOKEN_INDEX) + 1 :].tolist())
        data = packing.pack_ids([np.arange(576)], [[(tail, 0, "")]], np.zeros(1, dtype=bool))
        ours = parts.decoder(
            inputs_embeds=packing.embed(parts.decoder, data, parts.projector(features)),
            attention_mask=data.mask,
            position_ids=data.positions,
        ).logits
    length = logits.shape[1]
    torch.testing.assert_close(logits[0, -1], ours[0, length - 1], atol=2e-3, rtol=1e-3)


def test_pictures_reach_the_model_as_in_training(loaded) -> None:
    from PIL import Image

    _, model, processor, _ = loaded
    rng = np.random.default_rng(2)
    for shape in ((4, 4), (3, 4), (4, 3)):
        scene = sample_scene(rng, 5, 6, held_out=False)
        while (scene.rows, scene.cols) != shape:
            scene = sample_scene(rng, 5, 6, held_out=False)
        picture = render(scene)
        (real,) = process_images([Image.fromarray(picture)], processor, model.config)
        torch.testing.assert_close(real.float(), normalize(pad_square(picture)[None])[0], atol=1e-5, rtol=1e-5)


def test_evaluation_feeds_the_ids_of_training(loaded) -> None:
    tokenizer = loaded[0]
    rng = np.random.default_rng(3)
    kinds = set()
    for _ in range(12):
        scene = sample_scene(rng, 4, 6, held_out=False)
        for question in sample_questions(scene, rng, 10):
            kinds.add(question.kind)
            fed = tokenizer_image_token(text.prompt(question.text), tokenizer, IMAGE_TOKEN_INDEX)
            tail, answer = text.tail_ids(question.text, question.answer)
            assert fed == [*text.head_ids(), IMAGE_TOKEN_INDEX, *tail[:-answer]]
            assert tail[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(tail[-answer:-1]).strip() == question.answer
    assert kinds == set(KINDS)


def test_tokenizer_is_a_llama_tokenizer(loaded) -> None:
    tokenizer = loaded[0]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for sentence in ("What color is the star?", "über 42 naïve words\nand lines", "日本"):
        ids = tokenizer(sentence).input_ids
        assert ids[0] == 1 and 0 not in ids, "byte fallback: nothing is unknown"
        assert tokenizer.decode(ids[1:]).strip() == sentence
    assert tokenizer.convert_ids_to_tokens(tokenizer("red star").input_ids) == ["<s>", "▁red", "▁star"]


def plain(question: str) -> str:
    return text.prompt(question)


def with_a_blank(question: str) -> str:
    return text.prompt(question) + " "


@pytest.mark.parametrize("prompt", [plain, with_a_blank, of_vlmevalkit])
def test_real_generation_gives_the_right_answers(loaded, prompt) -> None:
    """`model.generate` on question files and pictures as they lie on disk; some answers are digits, which begin with
    the token of a blank."""
    from PIL import Image

    tokenizer, model, processor, _ = loaded
    counts = [item for item in build_vqav2(20).items if item.question.answer.isdigit()][:8]
    asked = [("gqa/data/images", item) for item in make_benchmarks.build_gqa(4).items[:20]]
    asked += [("vqav2/test2015", item) for item in counts]
    said = []
    for folder, item in asked:
        with Image.open(make_benchmarks.DATA / folder / item.image) as file:
            picture = file.convert("RGB")
        ids = tokenizer_image_token(prompt(item.line["text"]), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        out = model.generate(
            ids[None],
            images=process_images([picture], processor, model.config),
            image_sizes=[picture.size],
            do_sample=False,
            max_new_tokens=8,
        )
        said.append(tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip())
    right = [answer == item.question.answer for answer, (_, item) in zip(said, asked, strict=True)]
    assert sum(right[:20]) >= 18
    assert all(answer.isdigit() for answer in said[20:]) and sum(right[20:]) >= 4, "counting is its weak side"


def test_packed_questions_are_first_turns(parts: export.TinyLlava) -> None:
    """Many questions in one sequence give the logits that each gives alone."""
    rng = np.random.default_rng(4)
    scene = sample_scene(rng, 5, 6, held_out=False)
    questions = sample_questions(scene, rng, 4)
    with torch.inference_mode():
        features, attention, _ = run_tower(parts.tower, normalize(pad_square(render(scene))[None]))
        tokens = parts.projector(features)
        kept = np.sort(rng.permutation(576)[:80])

        def last_logits(row: list) -> torch.Tensor:
            data = packing.pack([kept], [row], np.zeros(1, dtype=bool))
            hidden = parts.decoder.model(
                inputs_embeds=packing.embed(parts.decoder, data, tokens),
                attention_mask=data.mask,
                position_ids=data.positions,
            ).last_hidden_state
            return parts.decoder.lm_head(hidden.flatten(0, 1)[data.rows])

        together = last_logits(questions)
        alone = torch.cat([last_logits([q]) for q in questions])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
    assert attention.shape == (1, 576) and SELECTED == 2
