"""The dense model equals transformers' own LlavaForConditionalGeneration on the same random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import KeywordsStoppingCriteria
from llava.model.multimodal import positions_from_mask
from llava.utils import UserError
from tests.model.tiny import NATIVE_IMAGE_ID, PATCHES, tiny_images, tiny_model

I = IMAGE_TOKEN_INDEX  # noqa: E741 - prompts below read better


@pytest.fixture(scope="module")
def ours():
    return tiny_model()


@pytest.fixture(scope="module")
def native(ours):
    model = LlavaForConditionalGeneration(ours.config).eval()
    model.load_state_dict(ours.state_dict())
    return model


def expand(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as transformers wants them: one id per visual token, padded on the left."""
    rows = [[i for t in row for i in ([NATIVE_IMAGE_ID] * PATCHES if t == I else [t])] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pad(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    fill = lambda row, x: [x] * (width - len(row))  # noqa: E731
    if side == "left":
        return (
            torch.tensor([fill(row, 0) + row for row in rows]),
            torch.tensor([fill(row, 0) + [1] * len(row) for row in rows]),
        )
    return (
        torch.tensor([row + fill(row, 0) for row in rows]),
        torch.tensor([[1] * len(row) + fill(row, 0) for row in rows]),
    )


PROMPTS = {
    "one image": [[1, 5, I, 7, 8, 9]],
    "placeholder first and last": [[I, 7, 8, I]],
    "several images in one prompt": [[1, 5, I, I, 7, I, 9]],
    "same length, no padding": [[1, 5, I, 7], [1, I, 9, 8], [I, 3, 4, 5]],
    "different lengths": [[1, 5, 6, 10, 11, I, 7], [1, I, 7], [1, 5, I, 8, 9]],
    "different numbers of images, one row without": [[1, 5, I, 6, I, 7], [1, 4, 3], [1, I, 9, 12, 13, 14]],
}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROMPTS)
def test_logits(ours, native, name, side):
    rows = PROMPTS[name]
    images = tiny_images(sum(row.count(I) for row in rows))
    native_ids, native_mask = expand(rows)
    expected = native(
        input_ids=native_ids,
        pixel_values=images,
        attention_mask=native_mask,
        position_ids=positions_from_mask(native_mask),
    ).logits
    ids, mask = pad(rows, side)
    logits = ours(ids, images=images, attention_mask=mask).logits
    assert logits.shape == expected.shape
    valid = native_mask.bool()
    assert expected[valid].std() > 0.1
    torch.testing.assert_close(logits[valid], expected[valid], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", PROMPTS)
def test_generation_returns_the_same_new_tokens_and_only_those(ours, native, name, options):
    rows = PROMPTS[name]
    images = tiny_images(sum(row.count(I) for row in rows), seed=1)
    native_ids, native_mask = expand(rows)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    if "num_beams" in options:
        # Transformers 5.17 hands the images of a prompt to the wrong beams: splice them beforehand.
        embeds = native.get_input_embeddings()(native_ids)
        features = torch.cat(native.get_image_features(images, -2, "default").pooler_output)
        embeds = embeds.masked_scatter((native_ids == NATIVE_IMAGE_ID)[..., None], features)
        expected = native.generate(inputs_embeds=embeds, attention_mask=native_mask, **options)
    else:
        expected = native.generate(input_ids=native_ids, pixel_values=images, attention_mask=native_mask, **options)[
            :, native_ids.shape[1] :
        ]
    ids, mask = pad(rows, "left")
    got = ours.generate(ids, images=images, attention_mask=mask, **options)
    assert got.shape == (len(rows), 6)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_text_only_prompts(ours, native):
    ids, mask = pad([[1, 5, 6, 7, 8], [1, 9]], "left")
    torch.testing.assert_close(
        ours(ids, attention_mask=mask).logits, native(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=0
    )
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = native.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert torch.equal(ours.generate(ids, attention_mask=mask, **options), expected)
    assert torch.equal(ours.generate(input_ids=ids[:1], **options), ours.generate(ids[:1], **options))


@torch.no_grad()
def test_rows_of_a_batch_equal_single_samples(ours):
    rows = PROMPTS["different numbers of images, one row without"]
    images = tiny_images(3, seed=2)
    ids, mask = pad(rows, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = ours.generate(ids, images=images, attention_mask=mask, **options)
    first = 0
    for row, expected in zip(rows, together, strict=True):
        count = row.count(I)
        alone = ours.generate(torch.tensor([row]), images=images[first : first + count] if count else None, **options)
        first += count
        assert torch.equal(alone[0], expected)


@torch.no_grad()
def test_sampling_is_reproducible_and_several_sequences_come_back(ours):
    options = {"max_new_tokens": 5, "do_sample": True, "temperature": 1.5, "eos_token_id": None, "pad_token_id": 0}
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(
            ours.generate(torch.tensor([[1, I, 5]]), images=tiny_images(1), num_return_sequences=4, **options)
        )
    assert outputs[0].shape == (4, 5) and torch.equal(*outputs)
    assert len({tuple(row.tolist()) for row in outputs[0]}) > 1


@torch.no_grad()
def test_images_in_any_container_and_dtype(ours):
    ids = torch.tensor([[1, I, 5, I]])
    images = tiny_images(2)
    expected = ours(ids, images=images).logits
    for given in (list(images), [images[:1], images[1]], images.double(), images[:, None]):
        torch.testing.assert_close(ours(ids, images=given).logits, expected, atol=1e-5, rtol=1e-5)
    single = ours(torch.tensor([[1, I, 5]]), images=images[0]).logits
    torch.testing.assert_close(single, ours(torch.tensor([[1, I, 5]]), images=images[:1]).logits)


def test_image_sizes_in_any_container(ours):
    with torch.no_grad():
        want = ours.encode_visual_tokens(tiny_images(1), [(90, 30)], with_cls_attention=True)[0].cls_attention
        for sizes in ((90, 30), torch.tensor([[90, 30]]), [[90, 30]]):
            got = ours.encode_visual_tokens(tiny_images(1), sizes, with_cls_attention=True)[0].cls_attention
            assert torch.equal(want, got)
    assert want.eq(0).any() and want.gt(0).any()


@torch.no_grad()
@pytest.mark.parametrize("aspect_ratio", [None, "anyres"])
def test_only_checkpoints_that_pad_mask_the_padding(aspect_ratio):
    model = tiny_model(image_aspect_ratio=aspect_ratio)
    scores = model.encode_visual_tokens(tiny_images(1), [(90, 30)], with_cls_attention=True)[0].cls_attention
    assert scores.gt(0).all()


@torch.no_grad()
def test_labels_are_expanded_and_give_the_native_loss(ours, native):
    ids, mask = torch.tensor([[1, 5, I, 7, 8], [1, I, 9, 4, 3]]), None
    labels = torch.where(ids == I, IGNORE_INDEX, ids)
    native_ids, native_mask = expand(ids.tolist())
    native_labels = torch.where(native_ids == NATIVE_IMAGE_ID, IGNORE_INDEX, native_ids)
    expected = native(input_ids=native_ids, pixel_values=tiny_images(2), labels=native_labels).loss
    got = ours(ids, images=tiny_images(2), attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "count"), [([[1, I, 5]], 0), ([[1, I, 5]], 2), ([[1, 4, 5]], 1), ([[1, I], [I, 2]], 1)]
)
def test_placeholders_and_images_must_match(ours, rows, count):
    placeholders = sum(row.count(I) for row in rows)
    with pytest.raises(UserError, match=rf"{placeholders} image placeholder.*but {count} image"):
        ours.generate(torch.tensor(rows), images=tiny_images(count) if count else None, max_new_tokens=1)
    with pytest.raises(UserError, match="one image per placeholder"):
        ours(torch.tensor(rows), images=tiny_images(count) if count else None)


def test_unprocessed_images_and_wrong_lists_are_refused(ours):
    from PIL import Image

    ids = torch.tensor([[1, I, 5]])
    with pytest.raises(UserError, match="process_images"):
        ours.generate(ids, images=[Image.new("RGB", (8, 8))])
    with pytest.raises(UserError, match="image_sizes has 2 entries for 1 image"):
        ours.generate(ids, images=tiny_images(1), image_sizes=[(8, 8), (9, 9)])
    with pytest.raises(UserError, match=r"must have one size.*\[3, 28, 28\], \[3, 14, 28\]"):
        ours.generate(torch.tensor([[I, I]]), images=[tiny_images(1)[0], torch.zeros(3, 14, 28)])
    with pytest.raises(UserError, match="3 to 5 dimensions"):
        ours.generate(ids, images=torch.zeros(3, 4))


def test_arguments_that_cannot_work_are_refused(ours):
    ids, images = torch.tensor([[1, I, 5]]), tiny_images(1)
    with pytest.raises(UserError, match="prefill_chunk_size"):
        ours.generate(ids, images=images, prefill_chunk_size=4)
    with pytest.raises(UserError, match="position_ids"):
        ours.generate(ids, images=images, position_ids=ids)
    with pytest.raises(UserError, match="position_ids"):
        ours(ids, images=images, position_ids=ids)
    with pytest.raises(UserError, match="images="):
        ours.generate(ids, pixel_values=images)
    with pytest.raises(UserError, match="once"):
        ours.generate(ids, input_ids=ids, images=images)
    with pytest.raises(UserError, match="input_ids"):
        ours.generate(images=images)


@torch.no_grad()
def test_long_prompts_are_cut_at_the_end_after_splicing(ours):
    ids = torch.tensor([[1, 5, I, 7, 8, 9], [1, I, 4, I, 5, 6]])
    images = tiny_images(3)
    whole = ours.prepare_multimodal_inputs(ids, images, with_cls_attention=True)
    ours.config.tokenizer_model_max_length = 2 + PATCHES + 1
    try:
        cut = ours.prepare_multimodal_inputs(ids, images, with_cls_attention=True)
    finally:
        del ours.config.tokenizer_model_max_length
    n = 2 + PATCHES + 1
    assert torch.equal(cut.inputs_embeds[1], whole.inputs_embeds[1, :n]) and cut.inputs_embeds.shape[1] == n
    # The first row was padded on the left before; the second image of the second row does not fit any more.
    start = whole.inputs_embeds.shape[1] - (PATCHES + 5)
    assert torch.equal(cut.inputs_embeds[0], whole.inputs_embeds[0, start : start + n])
    assert cut.layout.spans == (((2, 2 + PATCHES),), ((1, 1 + PATCHES), (2 + PATCHES, n)))
    assert [len(a) for a in cut.cls_attention] == [PATCHES, PATCHES + 1]
    assert torch.equal(cut.cls_attention[1], whole.cls_attention[1][: PATCHES + 1])


@torch.no_grad()
def test_layout_counts_left_padding(ours):
    rows = [[1, 5, 6, 7, I, 8], [I, I], [1, 2, 3]]
    ids, mask = pad(rows, "right")
    prepared = ours.prepare_multimodal_inputs(ids, tiny_images(3), attention_mask=mask, with_cls_attention=True)
    length = 2 * PATCHES
    assert prepared.inputs_embeds.shape[1] == length
    first = length - (5 + PATCHES)
    assert prepared.layout.spans == (
        ((first + 4, first + 4 + PATCHES),),
        ((0, PATCHES), (PATCHES, 2 * PATCHES)),
        (),
    )
    assert prepared.attention_mask.sum(dim=1).tolist() == [5 + PATCHES, 2 * PATCHES, 3]
    assert [len(a) for a in prepared.cls_attention] == [PATCHES, 2 * PATCHES, 0]
    assert prepared.position_ids[2, -3:].tolist() == [0, 1, 2]


def test_decoder_is_the_llama_model(ours):
    assert ours.get_decoder() is ours.model.language_model and ours.pruning_run is None
    projected = ours.encode_images(tiny_images(2))
    assert projected.shape == (2, PATCHES, ours.config.text_config.hidden_size)


@torch.no_grad()
def test_images_are_encoded_once_and_not_by_transformers_own_route(ours, monkeypatch):
    # generate() of transformers 5 encodes images itself, through get_image_features; ours must not do it twice.
    def refuse(*args, **kwargs):
        raise AssertionError("get_image_features was called")

    monkeypatch.setattr(ours, "get_image_features", refuse)
    monkeypatch.setattr(ours.model, "get_image_features", refuse)
    calls = []
    handle = ours.model.vision_tower.embeddings.register_forward_hook(
        lambda _, inputs, __: calls.append(len(inputs[0]))
    )
    try:
        ours.generate(
            torch.tensor([[1, I, 5], [1, I, 6]]),
            images=tiny_images(2),
            num_beams=2,
            max_new_tokens=3,
            eos_token_id=None,
        )
    finally:
        handle.remove()
    assert calls == [2]


@torch.no_grad()
def test_placeholder_ids_never_touch_the_embedding_table(ours):
    # -200 has no row; the table is not grown for it, and what the placeholder looks up must not leak into the prompt.
    assert ours.get_input_embeddings().weight.shape[0] == ours.config.text_config.vocab_size
    prepared = ours.prepare_multimodal_inputs(torch.tensor([[7, I, 9]]), tiny_images(1))
    assert prepared.inputs_embeds.shape == (1, PATCHES + 2, 32)
    assert torch.equal(prepared.inputs_embeds[0, [0, -1]], ours.get_input_embeddings()(torch.tensor([7, 9])))
    assert torch.equal(prepared.inputs_embeds[0, 1:-1], ours.encode_images(tiny_images(1))[0])


@torch.no_grad()
def test_images_of_different_tile_grids_in_one_batch():
    model = tiny_model(image_aspect_ratio="anyres", image_grid_pinpoints=[[56, 28], [28, 84], [56, 56]])
    wide, tall, plain = tiny_images(3, 1), tiny_images(4, 2), tiny_images(1, 3)[0]
    sizes = [(100, 50), (20, 60), (28, 28)]
    ids = torch.tensor([[1, I, 5, I], [1, 4, 5, I]])
    prepared = model.prepare_multimodal_inputs(ids, [wide, tall, plain], sizes, with_cls_attention=True)
    assert prepared.layout.counts == (7 * PATCHES, PATCHES)
    (first_a, first_b), (second,) = prepared.layout.spans
    assert (first_a, first_b) == ((1, 1 + 3 * PATCHES), (2 + 3 * PATCHES, 2 + 7 * PATCHES))
    alone = model.encode_visual_tokens([tall], [(20, 60)], with_cls_attention=True)[0]
    torch.testing.assert_close(prepared.inputs_embeds[0, slice(*first_b)], alone.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prepared.cls_attention[0][3 * PATCHES :], alone.cls_attention)
    torch.testing.assert_close(
        prepared.inputs_embeds[1, slice(*second)], model.encode_images(plain[None])[0], atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_generation_stops_at_keywords(ours):
    class Letters:
        """One character per id."""

        bos_token_id = 1

        def __call__(self, text):
            return type("Encoding", (), {"input_ids": [1, *map(ord, text)]})()

        def batch_decode(self, rows, skip_special_tokens=True):
            return ["".join(chr(i) for i in row.tolist()) for row in rows]

    ids, images = torch.tensor([[1, 5, I, 7, 8, 9]]), tiny_images(1, seed=1)
    options = {"images": images, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    free = ours.generate(ids, **options)[0].tolist()
    keyword = "".join(chr(i) for i in free[2:4])
    first = "".join(map(chr, free)).index(keyword) + 2
    stopped = ours.generate(ids, stopping_criteria=[KeywordsStoppingCriteria([keyword], Letters(), ids)], **options)
    assert stopped[0].tolist() == free[:first] and first < 6
