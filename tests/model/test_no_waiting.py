"""In front of the decoder the host reads nothing from the device once the tower is queued.

Proved on the device `meta`, whose tensors have no values: whatever would be read from them raises.
"""

from __future__ import annotations

import copy

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import multimodal
from llava.pruning import get_method
from tests.model.tiny import IMAGE_SIDE, PATCHES, tiny_images, tiny_model

IDS = [[1, 5, IMAGE_TOKEN_INDEX, 7, 8, 9], [0, 0, 1, IMAGE_TOKEN_INDEX, 4, 5]]
MASK = [[1] * 6, [0, 0, 1, 1, 1, 1]]
SIZES = [(50, 20), (20, 50)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prepared(model, method, device="cpu"):
    given = torch.tensor(IDS), tiny_images(2).to(device), SIZES, torch.tensor(MASK)
    with get_method(method)(target_tokens=6).attach(model), torch.no_grad():
        return model.prepare_multimodal_inputs(*given)


METHODS = ["autoprune", "fastv", "divprune", "hiprune", "prumerge_plus", "tome", "visionzip"]
METHODS += ["cdpruner", "flowcut", "gtp_vit", "holov", "mmtok", "zooprune"]
METHODS += ["agilepruner"]


@pytest.mark.parametrize("method", METHODS)
def test_tower_and_prompt_need_nothing_from_the_device(model, method):
    assert model.config_pads_images(), "padding is masked in the CLS attention"
    empty = prepared(copy.deepcopy(model).to("meta"), method, "meta")
    real = prepared(model, method)
    tokens = 6 if get_method(method).reduces_vision or get_method(method).merges_in_tower else PATCHES
    assert empty.inputs_embeds.is_meta and empty.inputs_embeds.shape == real.inputs_embeds.shape == (2, 5 + tokens, 32)
    assert empty.layout == real.layout and empty.attention_mask.is_meta
    assert (empty.cls_attention is None) == (method not in ("autoprune", "visionzip", "holov", "agilepruner"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["autoprune", "divprune"])
def test_gpu_is_not_waited_for_behind_the_tower(model, method):
    """The same on a GPU, copies to it included: from the end of the tower's last layer on, waiting is an error."""
    on_gpu = copy.deepcopy(model).cuda()
    prepared(on_gpu, method, "cuda")  # first call: lazy initializations
    last = on_gpu.model.vision_tower.encoder.layers[-2]
    hook = last.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    try:
        inputs = prepared(on_gpu, method, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    real = prepared(model, method)
    torch.testing.assert_close(inputs.inputs_embeds.cpu(), real.inputs_embeds, atol=1e-4, rtol=1e-3)


def test_a_read_would_be_noticed(model):
    with pytest.raises(NotImplementedError, match="meta"):
        torch.ones(2, device="meta").tolist()
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()


@torch.no_grad()
def test_holes_in_the_mask_are_holes_in_the_prompt(model):
    ids = torch.tensor([[1, 5, 6, IMAGE_TOKEN_INDEX, 7, 8, 9]])
    holes = torch.tensor([[1, 0, 1, 1, 1, 0, 1]])
    image = torch.zeros(1, 3, IMAGE_SIDE, IMAGE_SIDE)
    with_holes = model.prepare_multimodal_inputs(ids, image, attention_mask=holes, labels=ids)
    without = model.prepare_multimodal_inputs(ids[holes.bool()][None], image, labels=ids[holes.bool()][None])
    assert torch.equal(with_holes.inputs_embeds, without.inputs_embeds)
    assert torch.equal(with_holes.labels, without.labels)


def test_pieces_without_holes_are_slices():
    values = torch.arange(12.0).view(6, 2)
    assert multimodal._at(values, [1, 2, 3]).data_ptr() == values[1].data_ptr()
    assert torch.equal(multimodal._at(values, [1, 3, 4]), values[[1, 3, 4]])
    assert torch.equal(multimodal._at(values, [5]), values[5:])
