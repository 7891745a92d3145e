"""The tiny LLaVA-1.6: an anyres checkpoint in the original layout whose crops reach the decoder as in training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from playground.tiny.build.benchmarks import DATA_WIDE, build_wide
from playground.tiny.train import export, packing, text, wide
from playground.tiny.train.anyres import visual_tokens
from playground.tiny.world.scenes import WIDE, render, sample_wide

FOLDER = text.CHECKPOINT_16


@pytest.fixture(scope="module")
def parts() -> export.TinyLlava:
    return export.load(FOLDER)


def loaded(merge: str):
    return load_pretrained_model(
        str(FOLDER), None, FOLDER.name, device="cpu", torch_dtype=torch.float32, mm_patch_merge_type=merge
    )


def test_layout_is_that_of_llava_1_6() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["image_aspect_ratio"] == "anyres" and config["mm_patch_merge_type"] == "spatial_unpad"
    assert [tuple(size) for size in config["image_grid_pinpoints"]] == list(wide.PINPOINTS)
    longest = max(len(wide.order(*layout, merge)) for layout in WIDE for merge in wide.MERGES)
    assert config["tokenizer_model_max_length"] >= longest + 500, "prompts with all views are not cut"
    weights = load_file(FOLDER / "model.safetensors")
    assert weights["model.image_newline"].shape == (config["hidden_size"],)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 8e6
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / name).read_bytes() == (text.CHECKPOINT / name).read_bytes()


def test_the_tower_is_that_of_1_5_and_the_decoder_is_not() -> None:
    old, new = (load_file(folder / "model.safetensors") for folder in (text.CHECKPOINT, FOLDER))
    assert set(new) - set(old) == {"model.image_newline"}
    assert all(torch.equal(new[name], old[name]) for name in old if "vision_tower" in name)
    assert not torch.equal(new["model.layers.5.mlp.up_proj.weight"], old["model.layers.5.mlp.up_proj.weight"])


@pytest.mark.parametrize("merge", wide.MERGES)
def test_large_pictures_reach_the_decoder_as_in_training(parts: export.TinyLlava, merge: str) -> None:
    tokenizer, model, processor, _ = loaded(merge)
    scene = sample_wide(np.random.default_rng(9), 4, 6, held_out=False)
    while (scene.rows, scene.cols) != (4, 6):  # two crops with padding: the cheapest of all
        scene = sample_wide(np.random.default_rng(scene.texture), 4, 6, held_out=False)
    picture = Image.fromarray(render(scene))
    (crops,) = process_images([picture], processor, model.config)
    ids = tokenizer_image_token(text.prompt("Describe the image."), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[
        None
    ]
    with torch.inference_mode():
        logits = model(input_ids=ids, images=[crops], image_sizes=[picture.size]).logits[0, -1]
        places = wide.order(scene.rows, scene.cols, merge)
        tokens = visual_tokens(parts, export.load_newline(FOLDER), [wide.views(scene)], [places])
        tail = tuple(ids[0, ids[0].tolist().index(IMAGE_TOKEN_INDEX) + 1 :].tolist())
        data = packing.pack_ids([np.arange(len(places))], [[(tail, 0, "")]], np.zeros(1, dtype=bool))
        hidden = parts.decoder.model(
            inputs_embeds=packing.embed(parts.decoder, data, tokens),
            attention_mask=data.mask,
            position_ids=data.positions,
        ).last_hidden_state
        ours = parts.decoder.lm_head(hidden.flatten(0, 1)[data.rows])[0]
    torch.testing.assert_close(logits, ours, atol=5e-3, rtol=1e-3)


def test_it_reads_words_that_1_5_cannot_see() -> None:
    """On some of the wide TextVQA questions: what `figures.json` says of all of them."""
    items = [i for i in build_wide().items if i.benchmark == "textvqa"][::6]

    def right(model_folder) -> int:
        tokenizer, model, processor, _ = load_pretrained_model(
            str(model_folder), None, model_folder.name, device="cpu", torch_dtype=torch.float32
        )
        count = 0
        for item in items:
            with Image.open(DATA_WIDE / "textvqa/train_images" / item.image) as file:
                picture = file.convert("RGB")
            ids = tokenizer_image_token(
                text.prompt(item.line["text"]), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"
            )[None]
            pixels = process_images([picture], processor, model.config)
            out = model.generate(ids, images=pixels, image_sizes=[picture.size], do_sample=False, max_new_tokens=5)
            count += tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip() == item.question.answer
        return count

    new, old = right(FOLDER), right(text.CHECKPOINT)
    assert new >= old + len(items) // 4
