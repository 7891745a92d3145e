"""Peak memory while a checkpoint loads: `python -m benchmarks.loading [--save]`.

Writes a synthetic checkpoint in the original LLaVA layout (float16, shards with an index, vision tower inside) to a
temporary folder and loads it in a fresh process per case. What counts is what the process holds above what it held
before, with everything imported: the model alone is 1.0 times its own size. All weights are read once before the peak
is taken, because weights that are mapped from disk occupy memory only then.

Two figures: resident memory, which holds pages of the mapped file too (the system takes those back when it needs them),
and anonymous memory, which it cannot take back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks.flags import add_saving_arguments
from benchmarks.saved import deliver
from llava.eval.common.arguments import Parser
from llava.eval.reports.memory import PeakMemory, resident_bytes
from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.utils import UserError, cli_main

SHARD_BYTES = 200 << 20
LORA_RANK = 64
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# One decoder layer of these sizes has 12.6 million weights, 25 MB in float16; the vocabulary is Llama's.
TEXT = {"hidden_size": 1024, "intermediate_size": 2736, "num_attention_heads": 8, "vocab_size": 32000}
VISION = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 512,
}


@dataclass(frozen=True)
class Case:
    """One way to load: stored as safetensors or `.bin`, run in `dtype`, with LoRA matrices to merge or without."""

    form: str
    dtype: str
    lora: bool = False


CASES = (
    Case("safetensors", "float16"),
    Case("bin", "float16"),
    Case("safetensors", "float32"),
    Case("bin", "float32"),
    Case("safetensors", "bfloat16"),
    Case("safetensors", "float16", lora=True),
)
COLUMNS = ("stored", "dtype", "lora", "file_mb", "model_mb", "peak_rss_mb", "peak_rss_ratio", "peak_anon_ratio")


# --- the checkpoint -----------------------------------------------------------------------------------------


def geometry(layers: int) -> LlavaConfig:
    """A LLaVA of that many decoder layers."""
    text = LlamaConfig(**TEXT, num_key_value_heads=TEXT["num_attention_heads"], num_hidden_layers=layers)
    return LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION))


def original_name(name: str) -> str:
    """The name in LLaVA's own checkpoints."""
    for ours, theirs in (
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def shapes(config: LlavaConfig) -> dict[str, torch.Size]:
    """Original name -> shape of all weights."""
    with torch.device("meta"):
        return {original_name(k): v.shape for k, v in LlavaLlamaForCausalLM(config).state_dict().items()}


def layers_for(megabytes: float) -> int:
    """Decoder layers that bring the float16 checkpoint closest to a size; at least one."""
    one, two = (sum(shape.numel() for shape in shapes(geometry(n)).values()) for n in (1, 2))
    return max(1, round(1 + (megabytes * 1e6 / 2 - one) / (two - one)))


def write_checkpoint(folder: Path, form: str, layers: int) -> None:
    """A folder in the original layout; `form` is `safetensors` or `bin`. What the weights are does not matter here."""
    folder.mkdir(parents=True)
    weights = {name: torch.full(shape, 0.02, dtype=torch.float16) for name, shape in shapes(geometry(layers)).items()}
    save_torch_state_dict(weights, folder, max_shard_size=SHARD_BYTES, safe_serialization=form == "safetensors")
    (folder / "vision_tower").mkdir()
    (folder / "vision_tower" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **VISION}))
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **TEXT,
        "num_hidden_layers": layers,
        "mm_vision_tower": "vision_tower",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_lora(folder: Path, layers: int) -> None:
    """LoRA matrices for all linear layers of the decoder, as LLaVA's training script leaves them."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, shape in shapes(geometry(layers)).items():
        if name.startswith("model.layers.") and name.split(".")[-2] in LORA_LAYERS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.full((LORA_RANK, shape[1]), 0.01)
            tensors[f"{module}.lora_B.weight"] = torch.full((shape[0], LORA_RANK), 0.01)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": 16}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


# --- measuring ----------------------------------------------------------------------------------------------


class AnonymousPeak:
    """Highest anonymous memory of this process, looked at every few milliseconds: the kernel keeps no peak of it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.004):
            self.bytes = max(self.bytes, resident_bytes("RssAnon") or 0)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident_bytes("RssAnon") or 0)


def measure(folder: Path, warmup: Path, dtype: str, lora: Path | None) -> dict[str, int]:
    """Loads in this process; bytes. `warmup` is a small checkpoint that brings in all imports."""
    from llava.model.builder import load_pretrained_model

    load_pretrained_model(str(warmup), device="cpu", dtype=dtype)
    cpu = torch.device("cpu")
    with PeakMemory(cpu) as peak:
        anonymous_before = resident_bytes("RssAnon") or 0
        with AnonymousPeak() as anonymous:
            model = load_pretrained_model(
                str(lora or folder), str(folder) if lora else None, device="cpu", dtype=dtype
            )[1]
            for parameter in model.parameters():
                # A read of every page, without a temporary of the weights' size.
                parameter.detach().flatten()[::512].sum()
    if peak.bytes is None:
        raise UserError("this system does not tell a process its peak memory (Linux is needed)")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"model": size, "peak": peak.bytes, "anonymous": max(anonymous.bytes - anonymous_before, 0)}


def run_case(case: Case, folders: dict[str, Path]) -> dict[str, Any]:
    """One row, measured in a process of its own."""
    folder = folders[case.form]
    command = [sys.executable, "-m", "benchmarks.loading", "--child", str(folder), "--dtype", case.dtype]
    command += ["--warmup", str(folders["warmup"]), *(["--lora", str(folders["lora"])] if case.lora else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    stored = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    return {
        "stored": case.form,
        "dtype": case.dtype,
        "lora": case.lora,
        "file_mb": stored / 1e6,
        "model_mb": found["model"] / 1e6,
        "peak_rss_mb": found["peak"] / 1e6,
        "peak_rss_ratio": found["peak"] / stored,
        "peak_anon_ratio": found["anonymous"] / stored,
    }


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Peak memory while a checkpoint loads, as multiples of the checkpoint's size.")
    parser.add_argument("--size-mb", type=float, default=1000.0, help="size of the float16 checkpoint in megabytes")
    parser.add_argument("--folder", default=None, help="where to write it; default: a temporary folder, removed after")
    add_saving_arguments(parser)
    for name in ("child", "warmup", "lora", "dtype"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)  # a process that loads one case
    return parser.parse_args(arguments)


@cli_main
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.child:
        lora = Path(args.lora) if args.lora else None
        print(json.dumps(measure(Path(args.child), Path(args.warmup), args.dtype, lora)))
        return
    if args.size_mb <= 0:
        raise UserError(f"--size-mb must be above 0, got {args.size_mb}")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="llava-loading-") as place:
        layers = layers_for(args.size_mb)
        folders = {name: Path(place) / name for name in ("safetensors", "bin", "lora", "warmup")}
        write_checkpoint(folders["safetensors"], "safetensors", layers)
        write_checkpoint(folders["bin"], "bin", layers)
        write_checkpoint(folders["warmup"], "safetensors", 1)
        write_lora(folders["lora"], layers)
        rows = [run_case(case, folders) for case in tqdm(CASES, desc="loading", unit="case")]
    label = f"{round(rows[0]['file_mb'], -1):.0f} MB, float16"
    deliver("loading", label, rows, COLUMNS, args, torch.device("cpu"))


if __name__ == "__main__":
    main()
