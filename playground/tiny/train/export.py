"""Writes the trained parts as a checkpoint in the original LLaVA-1.5 layout, and reads such a folder back into the
parts.

The weights are stored in fp16. Reading back is independent of `llava.model`, so that the arena measures the stored
weights with transformers' own modules.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava.utils import UserError, cli_main
from playground.tiny.train import text
from playground.tiny.train.common import RUNS
from playground.tiny.train.deep import LAYERS
from playground.tiny.train.joint import TinyLlava
from playground.tiny.train.wide import PINPOINTS
from playground.tiny.world import scenes

TOWER = "model.vision_tower.vision_tower.vision_model."


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(
    model: TinyLlava,
    folder: Path = text.CHECKPOINT,
    newline: torch.Tensor | None = None,
    adapter: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write config, weights, tower folder and generation config; the tokenizer's files are copied from the 1.5
    checkpoint. newline: [D], what makes it a LLaVA-1.6 (anyres) checkpoint; adapter: what makes it one of Senna's, by
    the names of its layers."""
    decoder, tower = model.decoder.config, model.tower.config
    # Five views of 1.6 have 2880 patches, six of a car 3456; longer prompts would be cut.
    length = 2048 if newline is None and folder != text.CHECKPOINT_DRIVE else 4096
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaForCausalLM" if adapter is None else "SennaLlavaLlamaForCausalLM"],
            "model_type": "llava" if adapter is None else "llava_llama",
            "mm_vision_tower": "vision_tower",
            "mm_hidden_size": tower.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "flat" if newline is None else "spatial_unpad",
            "image_aspect_ratio": "pad" if newline is None else "anyres",
            **({} if newline is None else {"image_grid_pinpoints": [list(size) for size in PINPOINTS]}),
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "torch_dtype": "float16",
            "tokenizer_model_max_length": length,
            "tokenizer_padding_side": "right",
            "max_position_embeddings": length,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_attention_heads": decoder.num_attention_heads,
            "num_key_value_heads": decoder.num_key_value_heads,
            "vocab_size": decoder.vocab_size,
            "hidden_act": "silu",
            "rms_norm_eps": decoder.rms_norm_eps,
            "rope_theta": 1e6,
            "pretraining_tp": 1,
            "use_cache": True,
            "initializer_range": 0.02,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
    )
    write_json(
        folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    )
    write_json(
        folder / "vision_tower" / "config.json",
        {
            "model_type": "clip_vision_model",
            "hidden_size": tower.hidden_size,
            "hidden_act": tower.hidden_act,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_hidden_layers,
            "num_attention_heads": tower.num_attention_heads,
            "num_channels": 3,
            "patch_size": tower.patch_size,
            "image_size": tower.image_size,
            "projection_dim": tower.projection_dim,
            "layer_norm_eps": tower.layer_norm_eps,
            "attention_dropout": 0.0,
        },
    )
    side = tower.image_size
    write_json(
        folder / "vision_tower" / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": list(scenes.PIXEL_MEAN),
            "image_std": list(scenes.PIXEL_STD),
        },
    )
    weights = {
        TOWER + name.removeprefix("vision_model."): value
        for name, value in model.tower.state_dict().items()
        if "position_ids" not in name
    }
    weights |= {f"model.mm_projector.{name}": value for name, value in model.projector.state_dict().items()}
    weights |= dict(model.decoder.state_dict())
    weights["lm_head.weight"] = model.decoder.lm_head.weight.detach().clone()
    if newline is not None:
        weights["model.image_newline"] = newline
    for name, value in (adapter or {}).items():
        number, kind = name.removeprefix("linear_").split(".")
        weights[f"model.img_adapter.adapter.{2 * int(number) - 2}.{kind}"] = value
    save_file(
        {k: v.detach().to(torch.float16).contiguous().clone() for k, v in weights.items()},
        str(folder / "model.safetensors"),
        metadata={"format": "pt"},
    )
    text.tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    if folder != text.CHECKPOINT:
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(text.CHECKPOINT / name, folder / name)


def load(folder: Path = text.CHECKPOINT) -> TinyLlava:
    """The parts with the stored weights, in fp32; every tensor is used and none is missing."""
    model = TinyLlava(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    parts: dict[str, dict[str, torch.Tensor]] = {"tower": {}, "projector": {}, "decoder": {}}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.startswith(TOWER):
            parts["tower"][name.removeprefix(TOWER)] = value.float()
        elif name == "model.image_newline":
            continue  # see `load_newline`
        elif name.startswith("model.mm_projector."):
            parts["projector"][name.removeprefix("model.mm_projector.")] = value.float()
        else:
            parts["decoder"][name] = value.float()
    if hasattr(model.tower, "vision_model"):
        parts["tower"] = {"vision_model." + name: value for name, value in parts["tower"].items()}
    for part, state in parts.items():
        getattr(model, part).load_state_dict(state)
    return model.eval()


def load_newline(folder: Path) -> torch.Tensor:
    """The newline embedding of an anyres checkpoint, [D] in fp32."""
    return load_file(folder / "model.safetensors")["model.image_newline"].float()


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", default="joint.pt", help="what a stage left in playground/tiny/runs (%(default)s)")
    parser.add_argument("--folder", type=Path, default=RUNS, help="where it lies, if elsewhere")
    args = parser.parse_args()
    path = args.folder / args.state
    if not path.is_file():
        raise UserError(f"{path}: no such file; train first")
    state = torch.load(path, map_location="cpu")
    model = TinyLlava(state["layers"])
    model.load_state_dict(state["model"])
    if state["layers"] == LAYERS:
        export(model, text.CHECKPOINT_DEEP)
    elif "newline" in state:
        export(model, text.CHECKPOINT_16, state["newline"]["embedding"])
    elif "adapter" in state:
        export(model, text.CHECKPOINT_SENNA, adapter=state["adapter"])
    elif path.stem == "drive":
        export(model, text.CHECKPOINT_DRIVE)
    else:
        export(model)


if __name__ == "__main__":
    main()
