"""Methods against recordings of their authors' code, where those lie beside the checkout (`../shared/golden/peers`)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache

from llava.model.tower_merging import TowerMerger
from llava.model.vision import encode_crops
from llava.pruning import VisualLayout, get_method
from llava.pruning.coverage import coverage_order
from llava.pruning.diversity import weighted_order
from llava.pruning.engine.sequence import Sequences
from llava.pruning.engine.view import LayerView, SampleIds
from llava.pruning.methods.cdpruner import clip_relevance, normalized
from llava.pruning.methods.flowcut import FlowCut, flow_scores, to_drop
from llava.pruning.methods.gtp_vit import AttentionSummary, passed_on, summary, token_graph, token_scores
from llava.pruning.methods.mmtok import text_coverage, vision_coverage
from llava.pruning.methods.zooprune import sensitivity, zero_to_one
from llava.pruning.vision import CLS_ATTENTION, TowerHide, TowerKeep, VisionView
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


@pytest.mark.parametrize(("name", "case"), [case for case in cases("vscan") if not case.values[1].startswith("e2e")])
def test_vscan_keeps_and_merges_the_same_patches(name, case):
    content, arrays = recording(name)
    parameters = content[case]["params"]
    source = parameters.get("inputs_of_case", case)
    if f"{source}/features" not in arrays:
        pytest.skip("its inputs are those of a case that is not here")
    tokens, shallow, deep = (
        torch.from_numpy(arrays[f"{source}/{array}"]).float() for array in ("features", "attn_l5", "attn_m2")
    )
    crops, patches = tokens.shape[:2]
    view = VisionView(
        tokens,
        {"local": shallow.mean(1), CLS_ATTENTION: deep.mean(1)},
        parameters["visual_token_num"],
        torch.arange(patches).expand(crops, -1),
        (24, 24),
    )
    options = {"window": parameters["window"], "local_share": parameters["local_ratio"]}
    reduction = get_method(name)(fill=False, **options).reduce(view)
    assert reduction.origin_NK.tolist() == arrays[f"{case}/out_kept"].tolist()
    merged = torch.from_numpy(arrays[f"{case}/out_merged"])
    torch.testing.assert_close(reduction.tokens_NKC, merged, atol=1e-5, rtol=1e-5)


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
    coverage = torch.cat((both[0], both[1] * parameters["alpha"]), 1).transpose(1, 2)
    order = coverage_order(coverage, parameters["T"], last_NP=padding[None])
    assert order[0].tolist() == arrays[f"{case}/out_order"].tolist()


@pytest.mark.parametrize(("name", "case"), list(cases("flowcut")))
def test_flowcut_cuts_the_same_patches(name, case):
    content, arrays = recording(name)
    parameters, recorded = content[case]["params"], {a: arrays[f"{case}/{a}"] for a in content[case]["outputs"]}
    if case.startswith("fn_"):
        attention, semantic, value = (
            torch.from_numpy(arrays[f"{case}/{array}"]).float() for array in ("cls_attn", "semantic", "value")
        )
        torch.testing.assert_close(flow_scores(attention, semantic, value), torch.from_numpy(recorded["out_score"]))
        for left, target, dropped in recorded["out_prune_ratio"].tolist():
            assert to_drop(attention, torch.tensor([attention.shape[1]]), target, left).tolist() == [dropped]
        return
    own = [parameters.get(key, case) for key in ("weights_of_case", "pixels_of_case")]
    weights = {key: arrays[key] for key in arrays.files if key.startswith(f"{own[0]}/w/")}
    if not weights or f"{own[1]}/pixel_values" not in arrays:
        pytest.skip("its inputs are those of a case that is not here")
    config = CLIPVisionConfig(
        hidden_size=parameters["C"],
        intermediate_size=len(weights[f"{own[0]}/w/encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=parameters["layers"],
        num_attention_heads=parameters["H"],
        image_size=parameters["image_size"],
        patch_size=parameters["patch_size"],
        hidden_act=parameters["hidden_act"],
        layer_norm_eps=parameters["layer_norm_eps"],
    )
    tower = CLIPVisionModel(config).eval()
    said = {key.removeprefix(f"{own[0]}/w/"): torch.from_numpy(value).float() for key, value in weights.items()}
    missing, unknown = tower.load_state_dict(said, strict=False)
    assert not unknown and all("post_layernorm" in key or "position_ids" in key for key in missing)
    pixels = torch.from_numpy(arrays[f"{own[1]}/pixel_values"]).float()
    first = []
    for row, picture in enumerate(pixels):
        merger = TowerMerger(method := Counting(target_tokens=parameters["target_num"]), parameters["target_num"])
        with torch.no_grad():
            encoded = encode_crops(tower, picture[None], merger=merger)
        first.append(next(parameters["N"] - count for count in method.counts if count < parameters["N"]))
        if len(pixels) > 1 and method.counts != recorded["out_tokens"].tolist()[: len(method.counts)]:
            continue  # the published code takes the number of another picture of the batch
        assert method.counts == recorded["out_tokens"].tolist()[: len(method.counts)]
        features, origins, _ = merger.in_raster(encoded.features_NPC)
        assert origins[0].tolist() == recorded["out_keep"][row].tolist()
        torch.testing.assert_close(features[0], torch.from_numpy(recorded["out_features"][row]), atol=1e-5, rtol=1e-4)
    assert max(first) == recorded["out_prune_num"][0]  # of a batch the published code takes the largest number


@dataclass(frozen=True, kw_only=True)
class Counting(FlowCut):
    """With a list of the patches that each layer leaves."""

    counts: list = field(default_factory=list)

    def merge(self, view):
        step = super().merge(view)
        there = view.sizes_NT[:, 1:] > 0
        if isinstance(step, TowerHide):
            there = there & ~step.hide_NT[:, 1:]
        self.counts.append(step.keep_NK.shape[1] - 1 if isinstance(step, TowerKeep) else int(there.sum()))
        return step


@pytest.mark.parametrize(("name", "case"), list(cases("zooprune")))
def test_zooprune_chooses_the_same_patches_in_the_same_order(name, case):
    content, arrays = recording(name)
    parameters = content[case]["params"]
    source = parameters.get("inputs_of_case", case)
    if f"{source}/pre" not in arrays:
        pytest.skip("its inputs are those of a case that is not here")
    tokens, directions, w0, b0, w1, b1 = (
        torch.from_numpy(arrays[f"{source}/{array}"]).float() for array in ("pre", "u", "w0", "b0", "w1", "b1")
    )

    def project(features):
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(features, w0, b0))
        return torch.nn.functional.linear(hidden, w1, b1)

    raw = sensitivity(tokens, project, directions, parameters["h"])
    recorded = torch.from_numpy(arrays[f"{case}/out_importance"])
    torch.testing.assert_close(raw[0], recorded, atol=1e-5, rtol=1e-4)  # differences of float32 numbers, over h
    order = weighted_order(project(tokens), zero_to_one(raw), None, parameters["k"])[0].tolist()
    assert order == arrays[f"{case}/out_order"].tolist()
    assert sorted(order) == arrays[f"{case}/out_kept"].tolist()


# A recording's selection -> the method's.
GTP = {"MixedAttn": "mixed", "SumAttn": "sum", "DiagAttn": "diagonal", "IMGAttn": "received", "CLSAttn": "cls"}


@pytest.mark.parametrize(("name", "case"), list(cases("gtp_vit")))
def test_gtp_vit_keeps_and_passes_on_the_same(name, case):
    content, arrays = recording(name)
    parameters = content[case]["params"]
    selection, heads = re.fullmatch(r"(\w+)(Max|Mean)", parameters["selection"]).groups()
    if selection not in GTP or parameters["token_scales"]:
        pytest.skip("an ablation that is left out, see the method")
    recorded = {array: torch.from_numpy(arrays[f"{case}/{array}"]) for array in content[case]["outputs"]}
    if f"{case}/attn" in arrays:
        weights = torch.from_numpy(arrays[f"{case}/attn"]).float()
        attention = AttentionSummary(weights.diagonal(0, 2, 3), weights.sum(2), weights[:, :, 0])
    else:
        attention = summary(*(torch.from_numpy(arrays[f"{case}/{array}"]).float() for array in "qk"), 1.0)
    states, first = (torch.from_numpy(arrays[f"{case}/{array}"]).float() for array in ("x", "x0"))
    order = token_scores(attention, GTP[selection], heads.lower()).argsort(dim=1, descending=True, stable=True) + 1
    kept, gone = order[:, : -parameters["num_prop"]], order[:, -parameters["num_prop"] :]
    assert kept.tolist() == recorded["out_kept"].tolist() and gone.tolist() == recorded["out_prop"].tolist()
    if parameters["propagation"] == "Mean":
        return  # an ablation that is left out, see the method
    if parameters["propagation"] != "GraphProp":
        return
    graph = token_graph(first[:, 1:], parameters["graph_type"].lower(), parameters["num_neighbours"])
    if "out_graph_full" in recorded:
        torch.testing.assert_close(graph, recorded["out_graph_full"])
    crop = torch.arange(len(graph))[:, None, None]
    if "out_graph" in recorded:
        torch.testing.assert_close(graph[crop, kept[:, :, None] - 1, kept[:, None] - 1], recorded["out_graph"])
    edges = graph[crop, kept[:, None] - 1, gone[:, :, None] - 1]
    index = torch.cat((torch.zeros_like(kept[:, :1]), kept), 1)
    hidden = passed_on(states, index, gone, edges, parameters["alpha"])
    torch.testing.assert_close(hidden, recorded["out_x"], atol=1e-5, rtol=1e-5)


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
