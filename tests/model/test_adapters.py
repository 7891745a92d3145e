"""LoRA and projector-only checkpoints on a base model: the merged weights equal sums computed here, and peft's own."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llava.model import export_hf, llava_hf
from llava.model.builder import load_pretrained_model
from llava.utils import UserError
from tests.eval.helpers import fails_with_one_line
from tests.model.tiny import (
    LLAVA_FIELDS,
    TEXT_FIELDS,
    original_names,
    tiny_model,
    write_json,
    write_original,
    write_tokenizer,
    write_tower_config,
    write_weights,
)

TARGETS = ("q_proj", "v_proj", "down_proj")
ALPHA = 6
WRAPPED = "base_model.model.model."


@pytest.fixture(scope="module")
def source():
    return tiny_model(seed=8)


def load(folder, base, **kwargs):
    return load_pretrained_model(str(folder), str(base), "llava-lora", device="cpu", **kwargs)


def write_vicuna(folder, source, form="bin-sharded"):
    """The language model alone, as Vicuna is published: no projector, no tower."""
    weights = {k: v for k, v in original_names(source.state_dict()).items() if "mm_projector" not in k}
    weights = {k: v for k, v in weights.items() if "vision_tower" not in k}
    write_weights(folder, weights, form)
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT_FIELDS})
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 7], "pad_token_id": 0})
    return write_tokenizer(folder)


def write_tower(folder, source):
    tower = {f"vision_model.{k}": v for k, v in source.model.vision_tower.state_dict().items()}
    write_weights(folder, tower, "safetensors")
    write_tower_config(folder)


def write_config(folder, **fields):
    write_json(
        folder / "config.json",
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], **TEXT_FIELDS, **LLAVA_FIELDS, **fields},
    )


def projector(source, seed=1):
    """New projector weights under LLaVA's names."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in original_names(source.state_dict()) if "mm_projector" in name]
    state = original_names(source.state_dict())
    return {name: torch.randn(state[name].shape, generator=generator) for name in names}


def lora(source, rank=3, seed=2, targets=TARGETS):
    """`{module: (A, B)}` for some linear layers of the decoder."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for name, weight in original_names(source.state_dict()).items():
        if name.startswith("model.layers.") and name.split(".")[-2] in targets:
            rows, columns = weight.shape
            down, up = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
            matrices[name.removesuffix(".weight")] = (down, up)
    return matrices


def write_lora(folder, source, matrices, form="bin", **settings):
    """A folder as LLaVA's `finetune_lora.sh` leaves it."""
    tensors = {}
    for module, (down, up) in matrices.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    folder.mkdir(parents=True, exist_ok=True)
    if form == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
            "bias": "none",
            "fan_in_fan_out": False,
            "lora_alpha": ALPHA,
            "r": 3,
            "target_modules": list(TARGETS),
            "modules_to_save": None,
            **settings,
        },
    )
    return folder


def merged(source, matrices, scale):
    """The sums, one matrix at a time: W + scale * B A."""
    weights = {k: v.clone() for k, v in original_names(source.state_dict()).items()}
    for module, (down, up) in matrices.items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + scale * torch.einsum("or,ri->oi", up, down)
    return weights


def assert_weights(model, expected, atol=0.0):
    found = original_names(model.state_dict())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=atol, rtol=0), name


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_lora_on_a_language_model(tmp_path, source, form):
    matrices, trained = lora(source), projector(source)
    folder = write_lora(tmp_path / "llava-lora", source, matrices, form)
    # LLaVA's trainer saves the other trained weights under half of peft's prefix.
    torch.save({f"base_model.model.{k}": v for k, v in trained.items()}, folder / "non_lora_trainables.bin")
    write_tower(folder / "vision_tower", source)
    write_config(folder)
    tokenizer, model, _, _ = load(folder, write_vicuna(tmp_path / "vicuna", source))
    assert_weights(model, {**merged(source, matrices, ALPHA / 3), **trained}, atol=2e-6)
    # As in LLaVA the tokenizer and the end tokens are the base's.
    assert tokenizer.eos_token_id == 2 and model.generation_config.eos_token_id == [2, 7]


def test_lora_on_a_whole_llava(tmp_path, source):
    matrices = lora(source)
    folder = write_lora(tmp_path / "lora", source, matrices)
    write_config(folder)
    base = write_original(tmp_path / "base", source)
    # A relative vision tower is the base's business here, its weights are inside.
    (base / "vision_tower").rename(folder / "vision_tower")
    model = load(folder, base)[1]
    assert_weights(model, merged(source, matrices, ALPHA / 3), atol=2e-6)
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(original_names(model.state_dict())[untouched], original_names(source.state_dict())[untouched])


def test_an_adapter_that_peft_wrote_for_llava_hf(tmp_path, source):
    # No config.json of its own; names of transformers' model.
    matrices = lora(source)
    renamed = {f"model.language_model.{k.removeprefix('model.')}": v for k, v in matrices.items()}
    folder = write_lora(tmp_path / "lora", source, renamed, "safetensors")
    base = write_original(tmp_path / "base", source)
    assert_weights(load(folder, base)[1], merged(source, matrices, ALPHA / 3), atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, lambda module: ALPHA / 2),
        (
            {"alpha_pattern": {"layers.1.self_attn.q_proj": 20, "v_proj": 1}},
            lambda module: (20 if module.endswith("1.self_attn.q_proj") else 1 if "v_proj" in module else ALPHA) / 4,
        ),
    ],
    ids=["rslora", "alpha per module"],
)
def test_scales(tmp_path, source, settings, scale):
    matrices = lora(source, rank=4)
    folder = write_lora(tmp_path / "lora", source, matrices, **settings)
    found = original_names(load(folder, write_original(tmp_path / "base", source))[1].state_dict())
    for module, (down, up) in matrices.items():
        expected = original_names(source.state_dict())[f"{module}.weight"] + scale(module) * (up @ down)
        torch.testing.assert_close(found[f"{module}.weight"], expected, atol=2e-6, rtol=0)


def test_half_precision_rounds_the_base_first_and_the_sum_once(tmp_path, source):
    matrices = lora(source)
    folder = write_lora(tmp_path / "lora", source, matrices)
    base = write_original(tmp_path / "base", source)
    model = load(folder, base, dtype="bfloat16")[1]
    assert model.dtype == torch.bfloat16
    name = "model.layers.2.mlp.down_proj"
    down, up = matrices[name]
    start = original_names(source.state_dict())[f"{name}.weight"].bfloat16().double()
    exact = start + ALPHA / 3 * (up.double() @ down.double())
    found = original_names(model.state_dict())[f"{name}.weight"].double()
    # Half a unit in the last place of bfloat16 (8 bits of mantissa), and no more.
    assert ((found - exact).abs() <= exact.abs() * 2**-8).all()


def test_modules_trained_in_full_beside_lora(tmp_path, source):
    matrices = lora(source)
    folder = write_lora(tmp_path / "lora", source, matrices, modules_to_save=["lm_head"])
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    head = torch.randn(source.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    torch.save(tensors | {"base_model.model.lm_head.weight": head}, folder / "adapter_model.bin")
    model = load(folder, write_original(tmp_path / "base", source))[1]
    assert torch.equal(model.lm_head.weight, head)


def test_peft_merges_to_the_same_weights(tmp_path, source):
    peft = pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra)")
    model = copy.deepcopy(source.model.language_model)
    settings = peft.LoraConfig(r=3, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "lora")
    # The wrapped model was the bare decoder; LLaVA wraps the whole one.
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = {k.replace("base_model.model.", "base_model.model.model."): v for k, v in load_file(file).items()}
    save_file(tensors, file)
    found = load(tmp_path / "lora", write_original(tmp_path / "base", source))[1].model.language_model.state_dict()
    for name, tensor in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["bin", "bin-sharded", "safetensors"])
def test_projector_only(tmp_path, source, form):
    trained = projector(source)
    folder = tmp_path / "llava-pretrain"
    write_config(folder)
    torch.save(trained, folder / "mm_projector.bin")
    write_tower(folder / "vision_tower", source)
    model = load(folder, write_vicuna(tmp_path / "vicuna", source, form))[1]
    assert_weights(model, {**original_names(source.state_dict()), **trained})


@pytest.mark.parametrize("shards", [1 << 30, 2000])
@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_export_merges(tmp_path, source, kind, shards):
    """llava-hf's layout of a checkpoint that lies on a base: transformers alone gives the logits of our loader."""
    trained = projector(source)
    folder = tmp_path / "trained"
    if kind == "lora":
        write_lora(folder, source, lora(source))
        torch.save({f"base_model.model.{k}": v for k, v in trained.items()}, folder / "non_lora_trainables.bin")
        expected = {**merged(source, lora(source), ALPHA / 3), **trained}
    else:
        folder.mkdir()
        torch.save(trained, folder / "mm_projector.bin")
        expected = {**original_names(source.state_dict()), **trained}
    write_tower(folder / "vision_tower", source)
    write_config(folder)
    base = write_vicuna(tmp_path / "vicuna", source)
    made = llava_hf.export(str(folder), str(tmp_path / "hf"), model_base=str(base), shard_bytes=shards)
    assert made.shards == 1 if shards > 2000 else made.shards > 5
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = load(folder, base)[1]
    again = load_pretrained_model(str(tmp_path / "hf"), None, "llava", device="cpu")[1]
    words = ours.config.text_config.vocab_size
    found = original_names(again.state_dict())
    for name, tensor in expected.items():
        assert torch.allclose(found[name][: len(tensor)], tensor, atol=2e-6, rtol=0), name
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    image_id = theirs.config.image_token_id
    with torch.no_grad():
        own = ours(torch.tensor([[1, 5, -200, 9, 11]]), images=pixels, image_sizes=[(28, 28)]).logits
        ids = torch.tensor([[1, 5, *[image_id] * (own.shape[1] - 4), 9, 11]])
        assert torch.equal(theirs(input_ids=ids, pixel_values=pixels).logits[..., :words], own)


def test_export_needs_the_base(tmp_path, source, capsys):
    folder = write_lora(tmp_path / "lora", source, lora(source))
    fails_with_one_line(
        export_hf.main, ["--model-path", folder, "--output", tmp_path / "out"], capsys, "pass --model-base"
    )
    assert not (tmp_path / "out").exists()


# --- bad input ---


def test_without_a_base_the_message_names_it(tmp_path, source):
    folder = write_lora(tmp_path / "lora", source, lora(source))
    with pytest.raises(UserError, match=r"pass --model-base .*\(lmsys/vicuna-7b-v1.5\)") as caught:
        load_pretrained_model(str(folder), None, "llava-lora")
    assert str(folder) in str(caught.value)
    write_config(tmp_path / "projector")
    torch.save(projector(source), tmp_path / "projector" / "mm_projector.bin")
    with pytest.raises(UserError, match="projector: holds LoRA matrices or a projector only: pass --model-base"):
        load_pretrained_model(str(tmp_path / "projector"), None, "llava")


def test_a_base_for_a_whole_checkpoint_is_refused(tmp_path, source):
    folder = write_original(tmp_path / "llava", source)
    with pytest.raises(UserError, match="leave --model-base out"):
        load(folder, folder)


def edit(folder, name, **fields):
    write_json(folder / name, json.loads((folder / name).read_text()) | fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.bin").unlink(), "but no adapter_model.safetensors or adapter_model.bin"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file, but the LoRA weights"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json:1: malformed JSON"),
        (lambda f: (f / "adapter_model.bin").write_bytes(b"PK"), "adapter_model.bin: weights cannot be read"),
        (lambda f: torch.save({}, f / "adapter_model.bin"), "adapter_model.bin: holds no LoRA matrices"),
        (lambda f: edit(f, "adapter_config.json", use_dora=True), "use_dora True is not supported"),
        (lambda f: edit(f, "adapter_config.json", peft_type="IA3"), "peft_type 'IA3' is not supported"),
        (lambda f: (f / "non_lora_trainables.bin").write_bytes(b"x"), "non_lora_trainables.bin: weights cannot be"),
    ],
)
def test_broken_adapters(tmp_path, source, damage, message):
    folder = write_lora(tmp_path / "lora", source, lora(source))
    base = write_original(tmp_path / "base", source)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder, base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {f"{WRAPPED}layers.9.mlp.up_proj.lora_A.weight": torch.ones(3, 32)}, "no weights for 1 LoRA"),
        (lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj.lora_B" not in k}, "only lora_A is there"),
        (lambda t: {k: v[:, :5] if "lora_A" in k else v for k, v in t.items()}, "do not fit the base's weight"),
        (lambda t: t | {f"{WRAPPED}x.lora_magnitude_vector": torch.ones(3)}, "not a LoRA matrix"),
        (lambda t: t | {f"{WRAPPED}newcomer.weight": torch.ones(3)}, "1 unexpected .model.newcomer.weight"),
    ],
)
def test_updates_that_do_not_fit_the_base(tmp_path, source, change, message):
    folder = write_lora(tmp_path / "lora", source, lora(source))
    file = folder / "adapter_model.bin"
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(UserError, match=message):
        load(folder, write_original(tmp_path / "base", source))


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"])
def test_no_pickle_runs_code(tmp_path, source, name):
    class Bomb:
        def __reduce__(self):
            return sys.exit, (99,)

    folder = tmp_path / "trained"
    write_config(folder)
    if name != "mm_projector.bin":
        write_lora(folder, source, lora(source))
    with (folder / name).open("wb") as file:
        pickle.dump({"model.mm_projector.0.weight": Bomb()}, file, protocol=2)
    with pytest.raises(UserError, match=f"{name}: weights cannot be read"):
        load(folder, write_original(tmp_path / "base", source))
