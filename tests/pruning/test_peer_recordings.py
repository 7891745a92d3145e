"""Methods against recordings of their authors' code, where those lie beside the checkout (`../shared/golden/peers`)."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from llava.pruning import VisualLayout, get_method
from llava.pruning.engine.sequence import Sequences
from llava.pruning.engine.view import LayerView, SampleIds
from llava.pruning.methods.cdpruner import clip_relevance, normalized
from llava.pruning.methods.mmtok import cover_order, text_coverage, vision_coverage
from llava.pruning.vision import CLS_ATTENTION, VisionView
from tests.conftest import ROOT

PEERS = ROOT.parent / "shared" / "golden" / "peers"
# Method -> names of the features and of the attention of CLS, and of its options by the recording's parameters.
RECORDED = {
    "vispruner": ("features", "attn", {"important_ratio": "important_ratio"}),
    "scope": ("features", "cls_attn", {"alpha": "alpha"}),
}


@cache
def recording(name):
    description = json.loads((PEERS / f"{name}.json").read_text(encoding="utf-8"))
    return description.get("cases", {}), np.load(PEERS / f"{name}.npz")


def cases(*names):
    for name in names:
        if not (PEERS / f"{name}.json").is_file():
            reason = f"{PEERS} has no recording of {name}"
            yield pytest.param(name, "", marks=pytest.mark.skip(reason=reason), id=name)
            continue
        for case, content in recording(name)[0].items():
            if content["params"].get("combined") != "add":  # an ablation that is left out, see the method
                yield pytest.param(name, case, id=f"{name}-{case}")


@pytest.mark.parametrize(("name", "case"), list(cases(*RECORDED)))
def test_the_authors_code_keeps_the_same_patches(name, case):
    features, attention, options = RECORDED[name]
    content, arrays = recording(name)
    parameters = content[case]["params"]
    source = parameters.get("inputs_of_case", case)
    if f"{source}/{features}" not in arrays:
        pytest.skip("its inputs are those of a case that is not here")
    tokens = torch.from_numpy(arrays[f"{source}/{features}"]).float()
    cls = torch.from_numpy(arrays[f"{source}/{attention}"]).float()
    crops, patches = tokens.shape[:2]
    side = round(patches**0.5)
    view = VisionView(
        tokens,
        {CLS_ATTENTION: cls.mean(1) if cls.ndim == 3 else cls},
        parameters.get("T") or parameters["visual_token_num"],
        torch.arange(patches).expand(crops, -1),
        (side, side),
    )
    method = get_method(name)(target_tokens=view.target, **{own: parameters[theirs] for own, theirs in options.items()})
    assert method.reduce(view).origin_NK.tolist() == arrays[f"{case}/out_kept"].tolist()


@pytest.mark.parametrize(("name", "case"), list(cases("cdpruner")))
def test_cdpruner_keeps_the_same_patches(name, case):
    content, arrays = recording(name)
    parameters = content[case]["params"]
    source = parameters.get("inputs_of_case", case)
    if f"{source}/features" not in arrays:
        pytest.skip("its inputs are those of a case that is not here")
    tokens, patches, texts = (
        torch.from_numpy(arrays[f"{source}/{array}"]).float() for array in ("features", "image_embeds", "text_embeds")
    )
    relevance = clip_relevance(patches, texts)
    prompts = (0,) * len(tokens)  # the recording normalizes over its batch: tiles of one image
    torch.testing.assert_close(normalized(relevance, prompts), torch.from_numpy(arrays[f"{case}/out_relevance"]))
    view = VisionView(
        tokens,
        {"relevance": relevance},
        parameters["visual_token_num"],
        torch.arange(tokens.shape[1]).expand(len(tokens), -1),
        (tokens.shape[1], 1),
        prompts=prompts,
    )
    method = get_method(name)(relevance="clip")
    assert method.reduce(view).origin_NK.tolist() == arrays[f"{case}/out_kept"].tolist()


@pytest.mark.parametrize(("name", "case"), list(cases("holov")))
def test_holov_keeps_the_same_patches_of_every_chunk(name, case):
    content, arrays = recording(name)
    parameters = content[case]["params"]
    source = parameters.get("inputs_of_case", case)
    if f"{source}/tokens" not in arrays:
        pytest.skip("its inputs are those of a case that is not here")
    tokens, attention = (torch.from_numpy(arrays[f"{source}/{array}"]).float() for array in ("tokens", "attention"))
    target, crops, patches = parameters["new_image_token_num"], *attention.shape
    method = get_method(name)(chunks=parameters["num_patches"], alpha=parameters["alpha"])
    recorded = [sorted(row) for row in arrays[f"{case}/out_kept"].tolist()]  # -1: a zero token in a patch's stead
    shares = method.by_share(tokens, attention, target)
    assert [row.nonzero().flatten().tolist() for row in shares] == [[i for i in row if i >= 0] for row in recorded]
    places = torch.arange(patches).expand(crops, -1)
    reduction = method.reduce(VisionView(tokens, {CLS_ATTENTION: attention}, target, places, (patches, 1)))
    for kept, row in zip(reduction.origin_NK.tolist(), recorded, strict=True):
        assert len(set(kept)) == target and set(kept) >= {i for i in row if i >= 0}


@pytest.mark.parametrize(("name", "case"), list(cases("mmtok")))
def test_mmtok_chooses_the_same_patches_in_the_same_order(name, case):
    content, arrays = recording(name)
    parameters = content[case]["params"]
    source = parameters.get("inputs_of_case", case)
    if f"{source}/vision" not in arrays:
        pytest.skip("its inputs are those of a case that is not here")
    projected, tokens, text = (
        torch.from_numpy(arrays[f"{source}/{array}"]).float() for array in ("vision", "vision_clip", "text")
    )
    padding = torch.zeros(len(tokens), dtype=torch.bool)
    padding[parameters["exclude"] or []] = True
    view = VisionView(
        tokens[None],
        {},
        parameters["T"],
        torch.arange(len(tokens))[None],
        (len(tokens), 1),
        project=lambda _: projected[None],
        prompts=(0,),
        texts=[text],
        padding_NP=padding[None],
    )
    names = {"vision_weight": "alpha", "text_temperature": "tv_temp", "vision_temperature": "vv_temp"}
    method = get_method(name)(**{own: parameters[theirs] for own, theirs in names.items()})
    assert method.reduce(view).origin_NK[0].tolist() == arrays[f"{case}/out_kept"].tolist()
    both = [text_coverage(view, parameters["tv_temp"]), vision_coverage(view.tokens_NPC, parameters["vv_temp"])]
    order = cover_order(torch.cat((both[0], both[1] * parameters["alpha"]), 1), parameters["T"], padding[None])
    assert order[0].tolist() == arrays[f"{case}/out_order"].tolist()


@pytest.mark.parametrize(("name", "case"), list(cases("dart")))
def test_dart_keeps_the_same_tokens(name, case):
    content, arrays = recording(name)
    parameters = content[case]["params"]
    source = parameters.get("inputs_of_case", case)
    if f"{source}/K_states" not in arrays:
        pytest.skip("its inputs are those of a case that is not here")
    if case.endswith("verbatim"):
        pytest.skip("the reshape that mixes tokens is a stated deviation")
    keys, states = (torch.from_numpy(arrays[f"{source}/{array}"]).float() for array in ("K_states", "last_layer_state"))
    first, count = parameters["image_token_start_index"], parameters["N"]
    images, words = parameters["pivot_image_token"], parameters["pivot_text_token"]
    budget = parameters["max_num_trunction"]
    if parameters["retain_token_num_for_llava_next"] is not None:
        budget = min(parameters["retain_token_num_for_llava_next"], count - images)
    kept = images + (images + words) * (budget // (images + words))
    for padding in (0, 3):  # in front: a row of a batch
        keys, states = (torch.nn.functional.pad(side, (0, 0, padding, 0)) for side in (keys, states))
        cache = DynamicCache()
        cache.update(keys, keys, 0)
        start = first + padding
        layout = VisualLayout.from_spans([[(start, start + count)]])
        length = (parameters["seq"],)
        view = LayerView(
            layer=0,
            num_layers=2,
            counts=(count,),
            prompt_counts=(count,),
            query_rows=(parameters["seq"] - first - count,),
            samples=SampleIds((0,)),
            sequences=Sequences.start(states, layout, length, None, False),
            initial_facts={},
            cache=cache,
            norm=torch.nn.Identity(),
        )
        method = get_method("dart")(visual_pivots=images, text_pivots=words)
        assert method.choose(view, (kept,)).keep_BK[0].tolist() == arrays[f"{case}/out_kept_sorted"].tolist()
