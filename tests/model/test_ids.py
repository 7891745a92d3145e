"""Negative ids: -200 is the place of an image, anything else is refused before the vision tower runs."""

from types import SimpleNamespace

import pytest
import torch

from llava.mm_utils import tokenizer_image_token
from llava.model.multimodal import splice
from llava.pruning import get_method
from llava.utils import UserError
from tests.model.tiny import IMAGE_SIDE, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("wrong", [-1, -100, -199, -201, -300])
@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_other_negative_ids_are_refused(model, wrong, with_image, call, monkeypatch):
    monkeypatch.setattr(type(model), "encode_visual_tokens", lambda *args, **kw: pytest.fail("found before the tower"))
    ids = torch.tensor([[1, -200, 5, 6], [1, 7, wrong, 8]]) if with_image else torch.tensor([[1, 5, wrong]])
    images = torch.zeros(1, 3, IMAGE_SIDE, IMAGE_SIDE) if with_image else None
    run = {"generate": lambda **kw: model.generate(max_new_tokens=1, **kw), "forward": model}[call]
    row = 1 if with_image else 0
    for attached in (False, True):
        with pytest.raises(UserError, match=rf"input_ids have {wrong} in row {row}, column 2.*-200"):
            if attached:
                with get_method("autoprune")(target_tokens=4).attach(model):
                    run(input_ids=ids, images=images)
            else:
                run(input_ids=ids, images=images)


def test_what_the_mask_hides_does_not_matter(model):
    image = torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, -200, 5, 6]])
    padded = torch.tensor([[-1, -100, 1, -200, 5, 6]])
    mask = (padded != -1) & (padded != -100)
    options = {"images": image, "max_new_tokens": 3, "do_sample": False}
    alone = model.generate(ids, **options)
    assert torch.equal(model.generate(padded, attention_mask=mask.long(), **options), alone)


class Letters:
    """One id per character."""

    bos_token_id = 1

    def __call__(self, text):
        return SimpleNamespace(input_ids=[1, *(ord(letter) % 50 + 2 for letter in text)])


def test_a_prompt_tokenized_with_another_placeholder_is_refused(model):
    ids = tokenizer_image_token("See <image> here", Letters(), -300, return_tensors="pt")[None]
    with pytest.raises(UserError, match="-300"):
        model.generate(ids, images=torch.zeros(1, 3, IMAGE_SIDE, IMAGE_SIDE), max_new_tokens=1)
    with pytest.raises(UserError, match="-300"):
        splice(lambda ids: torch.zeros(*ids.shape, 4), ids, [])
