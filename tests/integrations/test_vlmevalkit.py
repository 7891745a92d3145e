"""VLMEvalKit's real classes under a method: the answers of the same class with the method attached by hand.

VLMEvalKit is on no package index: VLMEVALKIT_PATH is a checkout of it, and VLMEVALKIT_PYTHON a Python that has what it
requires. Its classes ask for CUDA by name, so the script below makes "cuda" mean the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from llava.eval.common.questions import spread
from llava.eval.tasks.registry import get_task
from llava.model import export_hf
from tests.conftest import ROOT
from tests.eval.helpers import TINY_DATA, TINY_MODEL
from tests.families.models import FAMILIES
from tests.families.processors import chat_template, processor, save

KIT = os.environ.get("VLMEVALKIT_PATH", "")
PYTHON = os.environ.get("VLMEVALKIT_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not (KIT and PYTHON), reason="VLMEVALKIT_PATH and VLMEVALKIT_PYTHON are not set: a checkout of it, and its Python"
)

SCRIPT = """
import json, sys
from functools import partial
import torch
torch.nn.Module.cuda = lambda self, *args, **kwargs: self
torch.Tensor.cuda = lambda self, *args, **kwargs: self
own_to = torch.Tensor.to
def to(self, *args, **kwargs):
    args = ["cpu" if arg == "cuda" else torch.float32 if arg is torch.float16 else arg for arg in args]
    if str(kwargs.get("device")) == "cuda":
        kwargs["device"] = "cpu"
    if kwargs.get("dtype") is torch.float16:
        kwargs["dtype"] = torch.float32
    return own_to(self, *args, **kwargs)
torch.Tensor.to = to
import transformers
def on_the_cpu(kind):
    own = kind.from_pretrained
    def from_pretrained(path, **kwargs):
        return own(path, dtype=torch.float32)
    kind.from_pretrained = from_pretrained
for kind in ("LlavaNextForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"):
    on_the_cpu(getattr(transformers, kind))
# Its LLaVA_Next gives the text first, as transformers 4 took it.
own_call = transformers.LlavaNextProcessor.__call__
def text_first(self, text, images, **kwargs):
    return own_call(self, images=images, text=text, **kwargs)
transformers.LlavaNextProcessor.__call__ = text_first
from vlmeval import vlm
from vlmeval.config import supported_VLM
from vlmeval.vlm.qwen2_vl import model as qwen
qwen.get_gpu_memory = lambda: [80]
from llava.integrations import vlmevalkit
from llava.pruning import build_method

folders, images, found = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}
kinds = {"llava": vlm.LLaVA, "next": vlm.LLaVA_Next, "qwen": vlm.Qwen2VLChat}
for name, folder in folders.items():
    how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if name == "qwen" else {}
    supported_VLM[name] = partial(kinds[name], model_path=folder, max_new_tokens=8, **how)
    (added,) = vlmevalkit.register([name], method="divprune", target_ratio=0.1)
    pruned, plain = supported_VLM[added](), supported_VLM[name]()
    method, texts = build_method("divprune", {"target_ratio": 0.1}), {"pruned": [], "by hand": [], "dense": []}
    for image in images:
        def ask(model):
            return model.generate([{"type": "image", "value": image}, {"type": "text", "value": "What is this?"}])
        texts["pruned"].append(ask(pruned))
        texts["dense"].append(ask(plain))
        with method.attach(plain.model):
            texts["by hand"].append(ask(plain))
    found[added] = {**texts, **pruned.measured(), "name": type(pruned).__name__, "prompts": pruned.tally.samples}
found["everything"] = vlmevalkit.register(method="autoprune", target_tokens=64)
found["report"] = vlmevalkit.report()
json.dump(found, open(sys.argv[3], "w"))
"""


def start(*command, **more):
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONPATH": f"{ROOT}{os.pathsep}{KIT}"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([PYTHON, *map(str, command)], env=environment, capture_output=True, text=True, **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The small model in both layouts, and a random Qwen2.5-VL; names as VLMEvalKit's classes look at them."""
    folder = tmp_path_factory.mktemp("models")
    tiled = TINY_MODEL.with_name("tiny-llava-v1.6")
    export_hf.main(["--model-path", str(tiled), "--output", str(folder / "tiny-v1.6-vicuna-hf")])
    qwen = folder / "qwen2_5_vl"
    qwen.mkdir()
    FAMILIES["qwen2_5_vl"].model().save_pretrained(qwen)
    made = processor("qwen2_5_vl", folder)
    made.chat_template = chat_template("qwen2_5_vl")
    save(made, qwen)
    return {"llava": str(TINY_MODEL), "next": str(folder / "tiny-v1.6-vicuna-hf"), "qwen": str(qwen)}


def test_its_classes_answer_under_a_method(folders, tmp_path):
    task = get_task("pope")
    asked = spread(task.read_questions(task.questions_path(TINY_DATA)), 12)[::2]
    images = [str(task.images_path(TINY_DATA) / question.image) for question in asked]
    done = start("-c", SCRIPT, json.dumps(folders), json.dumps(images), tmp_path / "found.json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name, kind in (("llava", "LLaVA"), ("next", "LLaVA_Next"), ("qwen", "Qwen2VLChat")):
        told = found[f"{name}-divprune-r0.1"]
        assert told["pruned"] == told["by hand"] and told["name"] == kind
        assert told["prompts"] == len(images) and told["options"]["target_ratio"] == 0.1
        assert told["tokens_nominal"] == told["tokens_processed"] < 0.11 * told["visual_tokens"]
    differ = [told["pruned"] != told["dense"] for name, told in found.items() if "divprune" in name]
    assert any(differ), "pruning changes some answer"
    assert {"llava_v1.5_7b-autoprune-64", "Qwen2.5-VL-7B-Instruct-autoprune-64"} <= set(found["everything"])
    assert found["report"].count("divprune") == 3


def test_its_own_program_runs_with_the_variants_in_its_table(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "print(sys.argv[1:], sorted(n for n in supported_VLM if n.startswith('llava_v1.5_7b')))\n"
    )
    done = start("-m", "llava.integrations.vlmevalkit", "--budgets", "64,0.1", script, "--", "--data", "MME")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = "['--data', 'MME'] ['llava_v1.5_7b', 'llava_v1.5_7b-autoprune-64', 'llava_v1.5_7b-autoprune-r0.1']"
    assert expected in done.stdout
    done = start("-m", "llava.integrations.vlmevalkit", "--methods", "nosuch", script)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: unknown pruning method 'nosuch'")
