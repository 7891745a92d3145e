"""Senna's layout on a checkpoint made here: an adapter along the tokens behind the projector, six views a prompt.

The published weights are not here: this says that the layout is read and computed as its code describes it, not how
well the model drives.
"""

import shutil

import pytest
import torch

from llava.conversation import conv_templates, infer_conv_mode
from llava.eval.answering.adapter import max_visual_tokens
from llava.model.builder import load_pretrained_model
from llava.model.configuration import LlavaConfig
from llava.pruning import build_method, get_method, list_methods
from llava.pruning.engine import notices
from llava.pruning.types import UnsupportedError
from llava.utils import UserError
from tests.model.test_methods_table import OPTIONS, TARGET
from tests.model.tiny import (
    HIDDEN,
    PATCHES,
    original_names,
    tiny_images,
    tiny_model,
    write_json,
    write_original,
    write_tokenizer,
    write_tower_config,
    write_weights,
)

TOKENS, VIEWS, I = 5, 6, -200  # noqa: E741
PUBLISHED_TOWER = "/horizon-bucket/someone/clip-vit-large-patch14-336/"
SENNA = {
    "architectures": ["SennaLlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "tokenizer_model_max_length": 2048,
    "mm_patch_merge_type": "flat",
}
PROMPT = torch.tensor([[1, *[t for view in range(VIEWS) for t in (5 + view, I, 4)], 7, 8, 9]])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 3}


def adapter(widths=(PATCHES, TOKENS, TOKENS, TOKENS)):
    """Tensors as Senna's code saves them: a sequence of linear layers and activations."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        name = f"model.img_adapter.adapter.{2 * layer}"
        tensors[f"{name}.weight"] = torch.randn(after, before, generator=generator) * before**-0.5
        tensors[f"{name}.bias"] = torch.randn(after, generator=generator) * 0.1
    return tensors


def write_senna(folder, extra=None, **fields):
    """A folder in Senna's layout: one file of weights, tower inside, tokenizer."""
    base = tiny_model(seed=3)
    write_original(folder, base, **{**SENNA, **fields})
    (folder / "model.safetensors").unlink()
    write_weights(
        folder, {**original_names(base.state_dict()), **(adapter() if extra is None else extra)}, "bin-sharded"
    )
    write_tokenizer(folder)
    return folder


def load(folder, **options):
    return load_pretrained_model(str(folder), None, "Senna", device="cpu", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_senna(tmp_path_factory.mktemp("checkpoints") / "Senna")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)[1]


def by_hand(images):
    """Features of the same model without adapter, then the adapter in plain tensors."""
    hidden = tiny_model(seed=3).encode_images(images)
    weights = adapter()
    for layer in (0, 2, 4):
        name = f"model.img_adapter.adapter.{layer}"
        if layer:
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        hidden = torch.einsum("npc,tp->ntc", hidden, weights[f"{name}.weight"]) + weights[f"{name}.bias"][None, :, None]
    return hidden


@torch.inference_mode()
def test_tokens_by_hand(model):
    images = tiny_images(VIEWS, seed=1)
    expected = by_hand(images)
    assert expected.shape == (VIEWS, TOKENS, HIDDEN)
    torch.testing.assert_close(model.encode_images(images), expected)
    # `compare` asks for CLS attention whatever the methods are; there is none here.
    tokens = model.encode_visual_tokens(images, [(28, 28)] * VIEWS, with_cls_attention=True)
    assert all(own.cls_attention is None for own in tokens)
    torch.testing.assert_close(torch.stack([own.features for own in tokens]), expected)
    assert model.config.mm_image_adapter == [PATCHES, TOKENS, TOKENS, TOKENS]
    assert model.config.image_seq_length == max_visual_tokens(model) == TOKENS


@torch.inference_mode()
def test_six_views_in_a_prompt(model):
    """What `generate` answers is what the decoder answers to the embeddings put together by hand."""
    images, sizes = tiny_images(VIEWS, seed=1), [(28, 14)] * VIEWS  # padded pictures
    views = iter(by_hand(images))
    embed = model.get_input_embeddings()
    parts = [next(views) if t == I else embed(torch.tensor([t])) for t in PROMPT[0].tolist()]
    base = tiny_model(seed=3)
    states = base.model.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state
    logits = base.lm_head(states)[0, -1]
    with get_method("dense")().attach(model) as run:
        output = model.generate(PROMPT, images=images, image_sizes=sizes, **GREEDY)
    assert output[0, 0] == logits.argmax() and run.traces[0].views == (TOKENS,) * VIEWS
    assert run.traces[0].visual_tokens == VIEWS * TOKENS


@pytest.mark.parametrize("name", [*list_methods(), "divprune+fastv"])
def test_methods_run_or_say_why_not(model, name):
    """What looks at patches cannot; AutoPrune and AutoPrune+ leave out their CLS terms."""
    options = {"target_tokens": TARGET, **OPTIONS.get(name, {})}
    method = build_method(name, options)
    looks = bool(method.needs_cls or method.vision_facts(24) or method.reduces_vision or method.merges_in_tower)
    if looks and name not in ("autoprune", "autoprune_plus"):
        with pytest.raises(UnsupportedError, match=f"{name} .*the image adapter of this model mixes"):
            method.attach(model)
        return
    with torch.inference_mode(), method.attach(model) as run:
        model.generate(PROMPT, images=tiny_images(VIEWS), image_sizes=[(28, 14)] * VIEWS, **GREEDY)
    assert run.traces[0].visual_tokens == VIEWS * TOKENS
    assert name == "dense" or min(run.traces[0].tokens_out) < VIEWS * TOKENS


def test_what_can_and_cannot(model):
    """By name, so that the table above cannot hide a mistake in what it derives."""
    for name in ("fastervlm", "visionzip", "hiprune", "prumerge_plus", "tome", "vispruner"):
        with pytest.raises(UnsupportedError, match=name):
            get_method(name)().attach(model)
    for name in ("fastv", "pdrop", "sparsevlm", "divprune", "random", "uniform"):
        get_method(name)().attach(model)
    with pytest.raises(UnsupportedError, match="fastv"):
        get_method("fastv")(visual_token_num=3).attach(model)
    with pytest.raises(UnsupportedError, match="autoprune"):
        get_method("autoprune")(text_weight=0.0).attach(model)


def test_autoprune_leaves_out_the_cls_term_and_says_so(model, caplog):
    notices.forget()
    with get_method("autoprune")(target_tokens=TARGET, x0=1.5).attach(model) as run:
        assert run.method.cls_weight == 0 and not run.needs_cls_attention
    assert "cls_weight=0, because the image adapter" in caplog.text


def test_budgets_per_view(model):
    method = get_method("random")(target_tokens=12, view_budget="equal")
    with torch.inference_mode(), method.attach(model) as run:
        model.generate(PROMPT, images=tiny_images(VIEWS), **GREEDY)
    assert run.traces[0].kept_per_view == [[2] * VIEWS] * 3


def test_a_saved_model_says_what_it_is(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    assert LlavaConfig.from_pretrained(tmp_path / "saved").mm_image_adapter == [PATCHES, TOKENS, TOKENS, TOKENS]


def test_the_lora_form(folder, tmp_path):
    """The adapter in `non_lora_trainables.bin`, under the names that peft's wrapper gives."""
    base = write_original(tmp_path / "base", tiny_model(seed=3))
    lora = tmp_path / "Senna-lora"
    write_json(lora / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 2, "r": 2})
    pair = {"A": torch.zeros(2, HIDDEN), "B": torch.zeros(HIDDEN, 2)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    torch.save({f"{module}.lora_{side}.weight": t for side, t in pair.items()}, lora / "adapter_model.bin")
    torch.save({f"base_model.model.{name}": t for name, t in adapter().items()}, lora / "non_lora_trainables.bin")
    shutil.copy(folder / "config.json", lora / "config.json")
    shutil.copytree(folder / "vision_tower", lora / "vision_tower")
    write_tokenizer(base)
    model = load_pretrained_model(str(lora), str(base), "Senna-lora", device="cpu")[1]
    with torch.inference_mode():
        images = tiny_images(2, seed=2)
        torch.testing.assert_close(model.encode_images(images), by_hand(images))


def test_the_tower_by_the_last_part_of_its_path(tmp_path, caplog):
    """The published file names a folder on its author's disk."""
    folder = write_senna(tmp_path / "Senna", mm_vision_tower=PUBLISHED_TOWER)
    config = LlavaConfig.from_pretrained(folder)
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (1024, 336), "known by its name"
    assert "it has the shape of openai/clip-vit-large-patch14-336" in caplog.text
    write_tower_config(folder / "clip-vit-large-patch14-336")
    assert load(folder)[1].image_adapter.tokens == TOKENS


@pytest.mark.parametrize(
    ("extra", "fields", "part"),
    [
        (adapter((9, TOKENS)), {}, "img_adapter takes 9 tokens of a picture, the vision tower gives 16"),
        ({k: v for k, v in adapter().items() if ".2." not in k}, {}, "layers 1, 3 alone"),
        ({**adapter(), "model.img_adapter.adapter.2.weight": torch.zeros(TOKENS, 7)}, {}, "do not follow one another"),
        (None, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56]]}, "takes a picture in one piece"),
        ({}, {"mm_image_adapter": [PATCHES, TOKENS]}, "image_adapter.linear_1.weight"),
        (None, {"mm_image_adapter": [16]}, "mm_image_adapter must have 2 or more entries"),
    ],
)
def test_broken_adapters(tmp_path, extra, fields, part):
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        load(write_senna(tmp_path / "Senna", extra, **fields))


def test_what_the_adapter_does_not_take(model, folder, tmp_path):
    with pytest.raises(UserError, match="in one piece, found 3 crops"):
        model.encode_visual_tokens([tiny_images(3)], [(28, 28)])
    from llava.model.llava_hf import export

    with pytest.raises(UserError, match="image adapter .Senna."):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_templates():
    assert conv_templates["senna"] is conv_templates["vicuna_v1"]
    assert infer_conv_mode("Senna") == infer_conv_mode("senna-v1-lora") == "senna"
