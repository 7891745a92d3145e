"""The engine on a model that accelerate has spread over several places, as `device_map="auto"` does with several GPUs.

There is one real device here. What stands for the others are layers whose weights lie in host memory or on disk under
accelerate's hooks, which replace their forward and move their inputs; the tests need no GPU.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from llava.pruning import get_method
from tests.model.tiny import tiny_images, tiny_model

METHODS = ("autoprune", "sparsevlm", "fastv", "pdrop", "fastervlm", "random", "dense", "transprune", "entropyprune")
IDS = [[1, 5, -200, 7, 8, 9], [1, 6, 11, -200, 12, 13]]


def answers(model, method_name):
    method = get_method(method_name).from_options({} if method_name == "dense" else {"target_tokens": 4})
    with method.attach(model) as run, torch.inference_mode():
        output = model.generate(
            torch.tensor(IDS), images=tiny_images(2), image_sizes=[(28, 28)] * 2, max_new_tokens=6, do_sample=False
        )
    return output, [trace.tokens_out for trace in run.traces]


def split(model, kind, folder):
    if kind == "hooks":  # every layer a place of its own
        places = {f"model.language_model.layers.{i}": "cpu" for i in range(3)}
        rest = ("embed_tokens", "norm", "rotary_emb")
        places |= {f"model.language_model.{name}": "cpu" for name in rest}
        places |= {name: "cpu" for name, _ in model.model.named_children() if name != "language_model"}
        places = {name if name.startswith("model.") else f"model.{name}": place for name, place in places.items()}
        return dispatch_model(model, {**places, "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    if kind == "host memory":
        cpu_offload(model.model.language_model, torch.device("cpu"))
    else:
        disk_offload(model.model.language_model, folder, torch.device("cpu"))
    return model


@pytest.mark.parametrize("kind", ["hooks", "host memory", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_split_models_answer_and_prune_as_whole_ones(kind, method, tmp_path):
    expected, kept = answers(tiny_model(), method)
    model = split(tiny_model(), kind, tmp_path)
    hooked = [hasattr(layer, "_hf_hook") or any(hasattr(m, "_hf_hook") for m in layer.modules())
              for layer in model.model.language_model.layers]  # fmt: skip
    assert all(hooked), "the layers really are under accelerate's hooks"
    if kind == "disk":
        weight = model.model.language_model.layers[0].self_attn.q_proj.weight
        assert weight.device.type == "meta", "the weights really are elsewhere"
    for _ in range(2):  # leaving a run leaves the hooks as they were
        output, tokens = answers(model, method)
        assert torch.equal(output, expected) and tokens == kept
