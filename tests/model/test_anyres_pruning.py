"""Pruning LLaVA-1.6: arrangements under a run, newlines in the decoder, and the cap on visual tokens per image."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.assemble import arrange_crops
from llava.pruning import AutoPrune, Dense, get_method
from llava.pruning.budget import crop_quotas
from llava.utils import UserError
from tests.model.test_parity_next import GREEDY, NEXT_FIELDS, PROCESSOR, S
from tests.model.tiny import PATCHES, tiny_images, tiny_model
from tests.pruning.models import masked_oracle

I = IMAGE_TOKEN_INDEX  # noqa: E741
ROWS = [[1, 5, I, 7, 8, 9], [1, I, 6, I, 4, 3, 2, 11]]
SIZES = [(120, 50), (300, 9), (40, 90)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=5, text={"num_hidden_layers": 5}, **NEXT_FIELDS)


@pytest.fixture(autouse=True)
def own_merge_type(model):
    yield
    model.set_patch_merge_type(None)
    model.config.mm_patch_merge_type = "spatial_unpad"


@pytest.fixture
def unpadded(model):
    model.set_patch_merge_type("spatial_unpad")
    return model


def inputs(model, rows=ROWS, sizes=SIZES) -> dict:
    noise = np.random.default_rng(3)
    images = [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "images": process_images(images, PROCESSOR, model.config),
        "image_sizes": sizes,
    }


def parts(model) -> SimpleNamespace:
    """The decoder as the oracle wants it."""
    return SimpleNamespace(model=model.get_decoder(), lm_head=model.lm_head)


METHODS = {
    "autoprune": AutoPrune(target_tokens=10, x0=2.0, recycle_fraction=0.0),
    "autoprune-original": AutoPrune(target_tokens=10, x0=2.0, recycle_fraction=0.0, positions="original"),
    "fastv": get_method("fastv")(target_tokens=40),
    "fastervlm": get_method("fastervlm")(target_tokens=12),
    "capped": Dense(visual_token_num=20),
}


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_unpadded_run_equals_the_masking_oracle(unpadded, name):
    """From pixels to decoded tokens: nothing dropped but masked, newlines always there, two images in a prompt."""
    model, method, call = unpadded, METHODS[name], inputs(unpadded)
    with method.attach(model) as run:
        got = model.generate(**call, max_new_tokens=3, output_logits=True, return_dict_in_generate=True, **GREEDY)
        prepared = model.prepare_multimodal_inputs(**call)
    logits = torch.stack(got.logits, 1)
    for row, trace in enumerate(run.traces):
        assert min(trace.tokens_out) < trace.visual_tokens
        shift = prepared.inputs_embeds.shape[1] - prepared.layout.lengths[row]
        spans = [(start - shift, end - shift) for start, end in prepared.layout.spans[row]]
        kept = [identity.tolist() for identity in trace.kept]
        tokens, expected = masked_oracle(
            parts(model),
            prepared.inputs_embeds[row, shift:],
            spans,
            kept,
            3,
            kept[0] if name in ("fastervlm", "capped") else None,
            method.positions == "compact",
        )
        assert got.sequences[row].tolist() == tokens
        torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_newlines_reach_the_trace_and_the_text_rows_begin_behind_them(unpadded):
    model = unpadded
    dense = model.prepare_multimodal_inputs(**inputs(model))
    with METHODS["autoprune"].attach(model) as run:
        model.generate(**inputs(model), max_new_tokens=1, **GREEDY)
    for row, trace in enumerate(run.traces):
        newlines = dense.layout.structure_counts[row]
        text = len(ROWS[row]) - ROWS[row].count(I)
        assert (trace.structure_tokens, trace.text_tokens) == (newlines, text + newlines) and newlines > 0
        assert trace.visual_tokens + trace.text_tokens == dense.layout.lengths[row]
        behind = len(ROWS[row]) - 1 - (len(ROWS[row]) - 1 - ROWS[row][::-1].index(I))
        assert dense.inputs_embeds.shape[1] - dense.layout.text_starts[row] == behind


@torch.no_grad()
def test_newline_vectors_stand_between_the_rows(model):
    prepared = model.prepare_multimodal_inputs(**inputs(model))
    newline = model.model.image_newline
    for row, spans in enumerate(prepared.layout.structure):
        for start, end in spans:
            assert torch.equal(prepared.inputs_embeds[row, start:end], newline.expand(end - start, -1))


@torch.no_grad()
@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_cls_attention_follows_the_features(model, merge_type):
    """Encode crops one by one, then look up every visual token's crop and patch."""
    model.set_patch_merge_type(merge_type)
    call = inputs(model)
    tokens = model.encode_visual_tokens(call["images"], SIZES, with_cls_attention=True)
    for image, crops, size in zip(tokens, call["images"], SIZES, strict=True):
        alone = model.encode_visual_tokens(crops, with_cls_attention=True)  # a plain stack: every crop an image
        features = torch.stack([crop.features for crop in alone])
        attention = torch.stack([crop.cls_attention for crop in alone])
        grid = {3: None, 4: (3, 1) if size[0] > size[1] else (1, 3), 5: (2, 2)}[len(crops)] or (
            (2, 1) if size[0] > size[1] else (1, 2)
        )
        source = arrange_crops(merge_type, PATCHES, len(crops), grid, size).source_N
        patches = [int(i) for i in source if i >= 0]
        assert len(image.cls_attention) == len(patches) == len(image.crops)
        for place, flat in enumerate(patches):
            crop, patch = divmod(flat, PATCHES)
            assert image.crops[place] == crop
            torch.testing.assert_close(image.cls_attention[place], attention[crop, patch])
        visual = torch.cat([image.features[start:end] for start, end in image.spans])
        expected = features.flatten(0, 1)[patches]
        torch.testing.assert_close(visual, expected, atol=1e-5, rtol=1e-5)


def test_default_merge_types(model):
    assert model.merge_type() == "spatial_unpad"
    with AutoPrune(target_tokens=4).attach(model):
        assert model.merge_type() == "spatial"
    with Dense().attach(model):
        assert model.merge_type() == "spatial_unpad"
    with Dense(visual_token_num=2880).attach(model):  # scripts pass it to dense runs too
        assert model.merge_type() == "spatial_unpad"
    with get_method("random")().attach(model):
        model.set_patch_merge_type("flat")
        assert model.merge_type() == "flat" == model.config.mm_patch_merge_type


@torch.no_grad()
def test_pruned_runs_are_spatial_by_default(model):
    """What the published code does: all patches of all crops, no newline."""
    call = inputs(model)
    with AutoPrune(target_tokens=4).attach(model) as run:
        model.generate(**call, max_new_tokens=1, **GREEDY)
    crops = [len(image) for image in call["images"]]
    assert [trace.visual_tokens for trace in run.traces] == [crops[0] * PATCHES, (crops[1] + crops[2]) * PATCHES]
    assert [trace.structure_tokens for trace in run.traces] == [0, 0]


@torch.no_grad()
def test_a_merging_tower_is_spatial_and_says_so_where_something_else_was_chosen(model, caplog):
    call = inputs(model)
    counts = []
    for choice in (None, "spatial_unpad", "spatial_unpad"):
        model.set_patch_merge_type(choice)
        with get_method("tome")(target_tokens=30).attach(model) as run:
            model.generate(**call, max_new_tokens=1, **GREEDY)
        counts.append([(trace.visual_tokens, trace.structure_tokens) for trace in run.traces])
        assert ("'spatial' instead of 'spatial_unpad'" in caplog.text) == (choice is not None)
    assert counts[0] == counts[1] == counts[2] and caplog.text.count("instead of") == 1


def test_newlines_need_a_checkpoint_that_has_them():
    with pytest.raises(UserError, match="needs a checkpoint with image_newline"):
        tiny_model().set_patch_merge_type("spatial_unpad")


@torch.no_grad()
def test_single_crops_end_in_a_newline_only_where_llava_merges(model):
    """LLaVA merges lists and stacks of crops; a plain stack of images it takes as it is."""
    images = tiny_images(2)
    plain = model.encode_visual_tokens(images)
    assert [len(image.features) for image in plain] == [PATCHES, PATCHES]
    for given in (list(images), images[:, None], [images[:1], images[1]]):
        merged = model.encode_visual_tokens(given)
        assert [len(image.features) for image in merged] == [PATCHES + 1, PATCHES + 1]
        assert torch.equal(merged[1].features[-1], model.model.image_newline)
        torch.testing.assert_close(merged[0].features[:-1], plain[0].features, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("merge_type", ["spatial", "spatial_unpad"])
@pytest.mark.parametrize("method", [Dense, AutoPrune], ids=["dense", "autoprune"])
def test_a_cap_of_all_tokens_is_no_cap_whatever_the_number_of_crops(model, merge_type, method):
    """The scripts' --visual-token-num 2880 = 5 x 576: here 5 x 16; the published code fails above one crop's 16."""
    model.set_patch_merge_type(merge_type)
    results = []
    for cap in (None, 5 * PATCHES):
        with method(visual_token_num=cap).attach(model) as run:
            results.append((model.generate(**inputs(model), max_new_tokens=3, **GREEDY), run.traces))
    (free, traces), (capped, capped_traces) = results
    assert torch.equal(free, capped)
    for one, other in zip(traces, capped_traces, strict=True):
        assert one.tokens_in == other.tokens_in and one.visual_tokens == other.visual_tokens


@torch.no_grad()
@pytest.mark.parametrize("merge_type", ["spatial", "spatial_unpad"])
def test_a_smaller_cap_keeps_of_every_crop_its_most_attended_share(model, merge_type):
    model.set_patch_merge_type(merge_type)
    call = inputs(model)
    tokens = model.encode_visual_tokens(call["images"], SIZES, with_cls_attention=True)
    with Dense(visual_token_num=20).attach(model) as run:
        model.generate(**call, max_new_tokens=2, **GREEDY)
    for trace, images in zip(run.traces, (tokens[:1], tokens[1:]), strict=True):
        expected, offset = [], 0
        for image in images:
            sizes = Counter(image.crops)
            quotas = crop_quotas([sizes[crop] for crop in sorted(sizes)], 20)
            assert sum(quotas) == min(20, len(image.crops)) and min(quotas) > 0
            for crop, quota in zip(sorted(sizes), quotas, strict=True):
                own = [i for i, label in enumerate(image.crops) if label == crop]
                own.sort(key=lambda i: -image.cls_attention[i].item())
                expected += [offset + i for i in own[:quota]]
            offset += len(image.crops)
        assert trace.kept[0].tolist() == sorted(expected)
        # The very wide picture has lost all its tiles to unpadding and is below the cap.
        assert trace.tokens_in == [sum(min(20, len(image.crops)) for image in images)] * 5


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (20000, 50), (50, 20000)], ids=str)
@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_thin_pictures_run_dense_and_pruned(model, size, merge_type):
    model.set_patch_merge_type(merge_type)
    call = inputs(model, [[1, I, 7, 8]], [size])
    for method in (Dense(), AutoPrune(target_tokens=4), get_method("fastervlm")(target_tokens=4)):
        with method.attach(model) as run:
            tokens = model.generate(**call, max_new_tokens=2, **GREEDY)
        assert tokens.shape == (1, 2) and run.traces[0].visual_tokens >= PATCHES


@torch.no_grad()
def test_long_prompts_are_cut_inside_an_image(unpadded):
    model, call = unpadded, inputs(unpadded)
    whole = model.prepare_multimodal_inputs(**call, with_cls_attention=True)
    model.config.tokenizer_model_max_length = 2 + PATCHES + 12  # row 0: ends inside the tiles, behind a newline
    try:
        cut = model.prepare_multimodal_inputs(**call, with_cls_attention=True)
        with AutoPrune(target_tokens=6).attach(model) as run:
            model(**call)
    finally:
        del model.config.tokenizer_model_max_length
    length = 2 + PATCHES + 12
    shift = whole.inputs_embeds.shape[1] - whole.layout.lengths[0]
    assert torch.equal(cut.inputs_embeds[0], whole.inputs_embeds[0, shift : shift + length])
    for row in range(2):
        assert cut.layout.counts[row] + cut.layout.structure_counts[row] <= length
        assert len(cut.cls_attention[row]) == cut.layout.counts[row] == sum(map(len, cut.layout.crops[row]))
        assert torch.equal(cut.cls_attention[row], whole.cls_attention[row][: cut.layout.counts[row]])
    assert len(run.traces) == 2


def test_settings_that_are_not_supported_are_refused(model):
    picture = Image.new("RGB", (S, S))
    for ratio in ("anyres_max_9", "anyres_max"):
        with pytest.raises(UserError, match=f"image_aspect_ratio '{ratio}' is not supported"):
            process_images([picture], PROCESSOR, SimpleNamespace(image_aspect_ratio=ratio))
